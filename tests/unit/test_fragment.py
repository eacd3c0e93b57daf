"""A fragment's numbers follow decisions: the same in pieces as whole, in the order that a decision names."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from paceline_server import fragment as fragment_module
from paceline_server.fragment import PIECE_ELEMENTS, FragmentValues
from paceline_server.ledger import Decision, Outcome
from paceline_server.rules import Contribution, Rates
from paceline_server.rules.ordered_momentum import PLAIN_AVERAGE, OrderedMomentum
from paceline_wire import codecs
from support_core import EXACT, assert_near, normal

RULE = OrderedMomentum(rates=Rates(peak_lr=0.7, full_momentum=0.9))
prop = settings(deadline=None, derandomize=True, max_examples=30)
each_codec = pytest.mark.parametrize("name", codecs.CODEC_NAMES)


def applied(before: int, after: int, bins_late: int, share: float = 0.25) -> Decision:
    """A decision that lets a push in."""
    return Decision(
        outcome=Outcome.APPLIED,
        bins_opened_before=before,
        contribution=Contribution(bins_late=bins_late, share=share),
        bins_opened_after=after,
        reason="as the test says",
    )


decisions = st.lists(
    st.tuples(
        st.builds(applied, st.integers(0, 2), st.integers(0, 2), st.integers(0, 5), st.sampled_from([1.0, 0.5, 1 / 3]))
        | st.builds(
            lambda opened: Decision(outcome=Outcome.CLOSED, bins_opened_before=opened, reason="due"), st.integers(0, 2)
        ),
        st.integers(0, 99),
    ),
    min_size=1,
    max_size=8,
)


def follow(values: FragmentValues, decision: Decision, codec: codecs.Codec, seed: int) -> None:
    """Follow a decision, with a push of normal numbers if it lets one in."""
    push = codecs.encode(codec, normal(values.num_elements, seed)) if decision.contribution is not None else None
    values.follow(decision, codec, push)


@each_codec
@prop
@example(history=[(applied(1, 1, 1), 5)], num_elements=257)
@given(history=decisions, num_elements=st.integers(1, 2000))
def test_pieces_give_the_same_bits_as_the_whole(
    name: str, history: list[tuple[Decision, int]], num_elements: int
) -> None:
    """Whatever the size of the pieces that are worked on, w and u are the same, bit for bit."""
    codec = codecs.codec(name)
    ends = []
    for piece_elements in (256, 512, PIECE_ELEMENTS):
        values = FragmentValues(normal(num_elements, 1), RULE)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fragment_module, "PIECE_ELEMENTS", piece_elements)
            for decision, seed in history:
                follow(values, decision, codec, seed)
        ends.append((values.w, values.state["u"]))
    for w, u in ends[1:]:
        assert torch.equal(ends[0][0], w)
        assert torch.equal(ends[0][1], u)


@prop
@given(history=decisions)
def test_the_numbers_follow_in_the_order_that_a_decision_names(history: list[tuple[Decision, int]]) -> None:
    """Bins open first, the push enters then with its coefficients, and the last bins open after it."""
    values = FragmentValues(normal(5, 1), RULE)
    w, u = normal(5, 1).double(), torch.zeros(5, dtype=torch.float64)
    beta = RULE.rates.full_momentum
    for decision, seed in history:
        follow(values, decision, EXACT, seed)
        for _ in range(decision.bins_opened_before):
            u = beta * u
            w = w - u
        if decision.contribution is not None:
            late, g = decision.contribution.bins_late, normal(5, seed).double()
            eta = RULE.rates.peak_lr * decision.contribution.share
            u = u + eta * beta**late * g
            w = w - eta * sum(beta**power for power in range(late + 1)) * g
        for _ in range(decision.bins_opened_after):
            u = beta * u
            w = w - u
        assert_near(w, values.w)
        assert_near(u, values.state["u"])


def test_the_same_history_gives_the_same_bits() -> None:
    """Following the same decisions with the same payloads twice ends in identical numbers, as a replay must."""
    ends = []
    for _ in range(2):
        values = FragmentValues(normal(1000, 1), RULE)
        for seed in range(20):
            follow(values, applied(seed % 2, seed % 3 == 0, seed % 4), codecs.codec("int4"), seed)
        ends.append((values.w, values.state["u"]))
    assert torch.equal(ends[0][0], ends[1][0])
    assert torch.equal(ends[0][1], ends[1][1])


def test_nothing_to_do_changes_nothing() -> None:
    """A duplicate or an early answer leaves w and u as they are."""
    values = FragmentValues(normal(300, 1), RULE)
    follow(values, applied(0, 0, 0), EXACT, 2)
    w, u = values.w.clone(), values.state["u"].clone()
    values.follow(Decision(outcome=Outcome.DUPLICATE, reason="seen before"))
    assert torch.equal(w, values.w)
    assert torch.equal(u, values.state["u"])


@each_codec
def test_a_push_is_not_changed_by_entering(name: str) -> None:
    """The payload stays what it was, so that the journal and a retry have the same bytes."""
    codec, values = codecs.codec(name), FragmentValues(normal(600, 1), RULE)
    payload = codecs.encode(codec, normal(600, 2))
    before = payload.clone()
    values.follow(applied(1, 1, 1), codec, payload)
    assert torch.equal(before, payload)


@each_codec
def test_an_answer_is_the_parameters_as_they_stand(name: str) -> None:
    """What is encoded for workers is w, and encoding changes nothing."""
    codec, values = codecs.codec(name), FragmentValues(normal(600, 1), RULE)
    values.follow(applied(0, 1, 0), EXACT, codecs.encode(EXACT, normal(600, 2)))
    w = values.w.clone()
    assert torch.equal(codecs.encode(codec, w), values.encoded(codec))
    assert torch.equal(w, values.w)


@pytest.mark.parametrize("num_workers", [1, 2, 3, 7])
def test_buffers_become_the_mean_of_the_workers(num_workers: int) -> None:
    """Under the rule for averaged buffers a full bin moves them to the workers' mean, without momentum."""
    start = normal(50, 0)
    values = FragmentValues(start.clone(), PLAIN_AVERAGE)
    ends = [normal(50, 1 + worker) for worker in range(num_workers)]
    for end in ends:
        values.follow(applied(0, 0, 0, share=1 / num_workers), EXACT, codecs.encode(EXACT, start - end))
    assert_near(torch.stack(ends).double().mean(0), values.w, 1e-6)
    values.follow(Decision(outcome=Outcome.CLOSED, bins_opened_before=5, reason="due"))
    assert_near(torch.stack(ends).double().mean(0), values.w, 1e-6)
