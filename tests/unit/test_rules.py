"""Every outer rule against its formula, written once more in float64, over random arrivals through the pure core."""

import math
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline_server import fragment as fragment_module
from paceline_server.fragment import FragmentValues
from paceline_server.ledger import Decision, Ledger, Outcome, Schedule
from paceline_server.rules import Contribution, Numbers, Rates, RuleSettings
from paceline_server.rules.ordered_momentum import OrderedMomentum
from paceline_server.rules.registry import RULES, outer_rule
from paceline_wire import codecs
from support_core import ASYNC, EXACT, assert_near, names, normal, only_answer
from support_rules import (
    REFERENCES,
    AsynchronousWorkers,
    LocalMomentumWorker,
    PlayedRule,
    asynchronous,
    asynchronous_arrivals,
    gradients_of_round,
)

SIZE = 3
prop = settings(deadline=None, derandomize=True, max_examples=40)
momenta = st.sampled_from([0.0, 0.3, 0.5, 0.9])
lrs = st.sampled_from([0.05, 0.4, 0.7, 1.0])
orders = st.randoms(use_true_random=False)
every_rule = pytest.mark.parametrize("name", RULES)


def settings_of(lr: float = 0.7, beta: float = 0.5, inner_steps: int = 1) -> RuleSettings:
    """Constant rates."""
    return RuleSettings(rates=Rates(peak_lr=lr, full_momentum=beta), inner_steps=inner_steps)


def test_every_rule_has_a_reference() -> None:
    """No rule of ours is left out below; OrLoMo is compared with averaging instead of a loop."""
    assert set(RULES) - {"orlomo"} == set(REFERENCES)


# --- The formulas.


@pytest.mark.parametrize("name", REFERENCES)
@prop
@given(num_workers=st.integers(1, 6), num_bins=st.integers(1, 6), lr=lrs, beta=momenta, order=orders)
def test_a_rule_is_its_formula(
    name: str, num_workers: int, num_bins: int, lr: float, beta: float, order: Random
) -> None:
    """At every arrival the parameters, and what the worker is sent, are those of the printed formula."""
    rule = outer_rule(name, settings_of(lr, beta))
    played = asynchronous(rule, num_workers, late_bins=2 if name == "ormo-da" else None)
    reference = REFERENCES[name](played.initial, num_workers=num_workers, lr=lr, beta=beta)
    workers = AsynchronousWorkers(played, num_workers)
    for arrival in asynchronous_arrivals(num_workers, order, num_bins=num_bins):
        g = normal(SIZE, arrival.t)
        workers.push(arrival.worker, g)
        reference.arrive(g.double(), arrival)
        assert_near(reference.w, played.w)
        assert_near(reference.sent(), played.numbers.published())


@prop
@given(num_workers=st.integers(1, 5), pushes=st.integers(1, 30), order=orders)
def test_every_kth_arrival_completes_a_turn(num_workers: int, pushes: int, order: Random) -> None:
    """Places count arrivals, whoever they are from and whichever bin they belong to."""
    played = asynchronous(outer_rule("sgd", settings_of(beta=0.0)), num_workers)
    workers = AsynchronousWorkers(played, num_workers)
    for _ in range(pushes):
        workers.push(order.randrange(num_workers), normal(SIZE, 1))
    assert [push.place for push in played.contributions] == [t % num_workers for t in range(pushes)]
    assert [push.completes_turn for push in played.contributions] == [
        t % num_workers == num_workers - 1 for t in range(pushes)
    ]


def test_a_turn_ends_although_workers_leave() -> None:
    """When the quota falls below what a turn has already got, the next push completes it."""
    played = PlayedRule(Schedule(kind=ASYNC), outer_rule("delayed-nesterov", settings_of()), workers=4)
    a, *others = names(4)
    base = only_answer(played.push(a, 1, 0)).bin
    for seq in (2, 3):
        base = only_answer(played.push(a, seq, base)).bin
    played.leave(*others)
    for seq in range(4, 9):
        base = only_answer(played.push(a, seq, base)).bin
    assert [push.completes_turn for push in played.contributions] == [
        *[False] * 3,
        True,  # the fourth of four
        False,  # it was given bin 1, which began with four workers
        True,  # bin 2 began with one
        True,
        True,
    ]


def test_a_refused_push_takes_no_place() -> None:
    """What never enters is no part of a turn."""
    played = asynchronous(outer_rule("delayed-nesterov", settings_of()), 2)
    a, b = names(2)
    played.push(a, 1, 0)
    played.push(a, 2, 0, problem="it is not finite")
    played.push(b, 1, 0)
    assert [push.place for push in played.contributions] == [0, 1]


@pytest.mark.parametrize("name", ["sgd", "momentum", "nesterov", "delayed-nesterov", "smega2", "mla"])
@prop
@given(num_workers=st.integers(1, 5), lr=lrs, beta=momenta, order=orders)
def test_lateness_does_not_matter_to_the_rules_of_arrival(
    name: str, num_workers: int, lr: float, beta: float, order: Random
) -> None:
    """They know arrivals only: from stale bases or fresh ones, the same pushes make the same bits."""
    rule = outer_rule(name, settings_of(lr, beta))
    ends = []
    for stale in (False, True):
        values = FragmentValues(normal(SIZE, 7), rule)
        for t in range(12):
            push = Contribution(
                bins_late=t if stale else 0, bin=0, share=1 / num_workers, place=t % num_workers, quota=num_workers
            )
            decision = Decision(outcome=Outcome.APPLIED, contribution=push, bins_opened_before=t % 2, reason="due")
            values.follow(decision, EXACT, codecs.encode(EXACT, normal(SIZE, t)))
        ends.append(values.w)
    assert torch.equal(*ends)


@prop
@given(num_workers=st.integers(1, 5), num_bins=st.integers(1, 5), lr=lrs, order=orders)
def test_without_momentum_ordered_momentum_is_sgd(num_workers: int, num_bins: int, lr: float, order: Random) -> None:
    """With beta = 0 the rules ormo and sgd give the same parameters."""
    plays = [asynchronous(outer_rule(name, settings_of(lr, 0.0)), num_workers) for name in ("ormo", "sgd")]
    workers = [AsynchronousWorkers(played, num_workers) for played in plays]
    for arrival in asynchronous_arrivals(num_workers, order, num_bins=num_bins):
        for each in workers:
            each.push(arrival.worker, normal(SIZE, arrival.t))
        assert torch.equal(plays[0].w, plays[1].w)


@every_rule
def test_a_rule_begins_with_what_it_was_given(name: str) -> None:
    """Before the first push the parameters, and what workers are sent, are the initial ones; the momentum is 0."""
    values = FragmentValues(normal(SIZE, 7), outer_rule(name, settings_of()))
    assert torch.equal(normal(SIZE, 7), values.published())
    assert torch.equal(torch.zeros(SIZE), values.momentum)


@every_rule
def test_pieces_give_the_same_bits_as_the_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rule treats all elements alike, so that it may be given any piece."""
    rule, size = outer_rule(name, settings_of(inner_steps=3)), 1000
    ends = []
    for piece_elements in (256, 1 << 20):
        monkeypatch.setattr(fragment_module, "PIECE_ELEMENTS", piece_elements)
        played = asynchronous(rule, 3, size=size)
        workers = AsynchronousWorkers(played, 3)
        for t in range(15):
            workers.push(t * t % 3, normal(played.numbers.push_elements, t))
        ends.append((played.w, played.numbers.published(), *played.numbers.state.values()))
    assert all(torch.equal(pieces, whole) for pieces, whole in zip(*ends, strict=True))


@every_rule
def test_publishing_changes_nothing(name: str) -> None:
    """To send the parameters leaves them and the rule's state as they are, whenever it happens."""
    played = asynchronous(outer_rule(name, settings_of(inner_steps=2)), 2)
    workers = AsynchronousWorkers(played, 2)
    for t in range(5):
        workers.push(t % 2, normal(played.numbers.push_elements, t))
        before = [played.w.clone(), *(vector.clone() for vector in played.numbers.state.values())]
        first = played.numbers.published().clone()
        assert torch.equal(first, played.numbers.published())
        assert all(map(torch.equal, before, [played.w, *played.numbers.state.values()]))


# --- Delay-adaptive, and what bounds a very late push.


@pytest.mark.parametrize("late_bins", [1, 2, 4])
@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("bins_late", [0, 1, 2, 3, 4, 5, 50, 1000, 100_000])
def test_a_very_late_push_moves_the_parameters_little(late_bins: int, beta: float, bins_late: int) -> None:
    """At most eta / (1 - beta) min(1, late_bins / d) of it at once, and no more in the end."""
    rule = OrderedMomentum(rates=Rates(peak_lr=0.7, full_momentum=beta))
    played = asynchronous(rule, 1, late_bins=late_bins)
    played.ledger, played.open_bin = Ledger(open_bin=bins_late, issuing_bin=bins_late), bins_late
    decision = played.push("worker-0", 1, 0, torch.ones(SIZE))
    assert decision.contribution is not None
    part = min(1.0, late_bins / bins_late) if bins_late else 1.0
    assert (decision.contribution.bins_late, decision.contribution.share) == (bins_late, part)
    moved = float((played.initial - played.w).abs().max())
    bound = 0.7 / (1 - beta) * part
    assert moved <= bound * (1 + 1e-5) + 1e-6
    played.numbers.follow(Decision(outcome=Outcome.CLOSED, bins_opened_before=3000, reason="due"))
    assert_near(played.initial.double() - bound, played.w, 1e-4)


# --- OrLoMo.


def averaged(
    initial: torch.Tensor, rounds: list[list[list[torch.Tensor]]], *, steps: int, eta: float, beta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Synchronous averaging: everybody starts from the mean parameters and momentum, and makes its local steps."""
    x, v = initial.double(), torch.zeros_like(initial, dtype=torch.float64)
    for workers in rounds:
        ends = []
        for gradients in workers or [[torch.zeros_like(initial)] * steps]:
            y, p = x, v
            for g in gradients:
                p = beta * p + eta * g.double()
                y = y - p
            ends.append((y, p))
        x = torch.stack([y for y, _ in ends]).mean(0)
        v = torch.stack([p for _, p in ends]).mean(0)
    return x, v


@prop
@given(
    num_workers=st.integers(1, 5),
    num_bins=st.integers(1, 5),
    steps=st.integers(1, 6),
    beta=momenta,
    order=orders,
)
def test_orlomo_is_averaging_in_any_order(
    num_workers: int, num_bins: int, steps: int, beta: float, order: Random
) -> None:
    """However late they come, bins of local-momentum pushes end as the mean of parameters and momentum."""
    inner_lr = 0.3
    rule = outer_rule("orlomo", settings_of(lr=1.0, beta=beta, inner_steps=steps))
    played, worker = asynchronous(rule, num_workers), LocalMomentumWorker(eta=inner_lr, beta=beta)
    workers, arrived = AsynchronousWorkers(played, num_workers), [0] * num_bins
    for arrival in asynchronous_arrivals(num_workers, order, num_bins=num_bins):
        place, arrived[arrival.bin] = arrived[arrival.bin], arrived[arrival.bin] + 1
        workers.push(arrival.worker, worker.round(gradients_of_round(arrival.bin, place, steps)))
    assert arrived == [num_workers] * num_bins
    rounds = [[gradients_of_round(b, place, steps) for place in range(num_workers)] for b in range(num_bins)]
    rounds += [[]] * (played.open_bin + 1 - num_bins)
    # The open bin's momentum has moved the parameters by its local steps already; its empty rounds do the same.
    x, v = averaged(played.initial, rounds, steps=steps, eta=inner_lr, beta=beta)
    assert_near(x, played.w, 5e-5)
    assert_near(v, played.u, 5e-5)


@prop
@given(num_workers=st.integers(1, 5), num_bins=st.integers(1, 5), beta=momenta, lr=lrs, order=orders)
def test_orlomo_with_one_step_is_ordered_momentum(
    num_workers: int, num_bins: int, beta: float, lr: float, order: Random
) -> None:
    """With H = 1, q = p = inner_lr g, and both rules do the same with it."""
    orlomo = asynchronous(outer_rule("orlomo", settings_of(lr, beta, inner_steps=1)), num_workers)
    ormo = asynchronous(outer_rule("ormo", settings_of(lr, beta)), num_workers)
    local, plain = AsynchronousWorkers(orlomo, num_workers), AsynchronousWorkers(ormo, num_workers)
    worker = LocalMomentumWorker(eta=0.3, beta=beta)
    for arrival in asynchronous_arrivals(num_workers, order, num_bins=num_bins):
        g = normal(SIZE, arrival.t)
        local.push(arrival.worker, worker.round([g]))
        plain.push(arrival.worker, 0.3 * g)
        assert_near(ormo.w, orlomo.w)
        assert_near(ormo.u, orlomo.u)


def test_an_orlomo_push_is_one_encoding_of_both_vectors() -> None:
    """Q and p travel behind each other, 2 n elements; p is not what q is."""
    values = FragmentValues(torch.zeros(4), outer_rule("orlomo", settings_of(lr=1.0, beta=0.5, inner_steps=2)))
    assert values.push_elements == 8
    push = Contribution(bins_late=1, share=1.0)
    payload = codecs.encode(EXACT, torch.cat((torch.full((4,), 10.0), torch.full((4,), 1.0))))
    values.follow(Decision(outcome=Outcome.APPLIED, contribution=push, reason="due"), EXACT, payload)
    # H d = 2: u += 0.25 p, w -= q + 0.5 (1 - 0.25) / 0.5 p.
    assert_near(torch.full((4,), 0.25), values.state["u"])
    assert_near(torch.full((4,), -10.75), values.w)


# --- What rules are told.


def test_rules_that_have_no_bins_ignore_them() -> None:
    """Opening a bin moves the parameters under the ordered rules only."""
    for name in RULES:
        rule = outer_rule(name, settings_of(inner_steps=2))
        state = {vector: torch.ones(SIZE) for vector in rule.state}
        numbers = Numbers(w=torch.zeros(SIZE), state=state)
        rule.open_bin(numbers, 1)
        moved = not torch.equal(torch.zeros(SIZE), numbers.w)
        assert moved == (name in ("ormo", "ormo-da", "orlomo"))


@every_rule
def test_no_push_makes_parameters_that_are_not_finite(name: str) -> None:
    """The largest shares and latenesses that a ledger decides keep numbers finite."""
    rule = outer_rule(name, settings_of(beta=0.9, inner_steps=50))
    values = FragmentValues(torch.zeros(SIZE), rule)
    for place, bins_late in enumerate((0, 1, 10**6, 10**9)):
        push = Contribution(bins_late=bins_late, share=1.0, bin=3, place=place % 2, quota=2)
        decision = Decision(outcome=Outcome.APPLIED, contribution=push, bins_opened_before=1, reason="due")
        values.follow(decision, EXACT, codecs.encode(EXACT, torch.ones(values.push_elements)))
        assert all(math.isfinite(x) for x in values.published().tolist())
