"""HeLoCo's correction of direction: its three cases, tensor by tensor, and before which rules it works."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from paceline_server import fragment as fragment_module
from paceline_server.fragment import FragmentValues
from paceline_server.ledger import Decision, Outcome
from paceline_server.rules import Contribution, OuterRule, Rates, RuleSettings
from paceline_server.rules.heloco import DirectionCorrection
from paceline_server.rules.registry import RULES, outer_rule
from paceline_wire import codecs
from support_core import EXACT, assert_near, normal
from support_rules import AsynchronousWorkers, PlayedRule, asynchronous

prop = settings(deadline=None, derandomize=True, max_examples=60)
HELOCO = DirectionCorrection()


def printed(d: torch.Tensor, m: torch.Tensor, correction: DirectionCorrection) -> torch.Tensor:
    """The three cases as heloco.py prints them, in float64."""
    d, m = d.double(), m.double()
    length, reference = float(d.norm()), float(m.norm())
    if length == 0 or reference == 0:
        return d
    c = float(d @ m) / (length * reference)
    conf = length / (length + correction.kappa * reference)
    if c >= correction.keep:
        return d
    if c >= 0:
        turned = min(1.0, correction.turn * (correction.keep - c) * conf)
        mixed = (1 - turned) * d / length + turned * m / reference
        return mixed * (length / float(mixed.norm()))
    s = min(correction.shrink * -c * conf, correction.most)
    return d - s * c * length * m / reference


def at_angle(degrees: float, length: float = 2.0) -> torch.Tensor:
    """A push at that angle to the first axis."""
    return length * torch.tensor([math.cos(math.radians(degrees)), math.sin(math.radians(degrees)), 0.0])


def corrected(d: torch.Tensor, m: torch.Tensor, correction: DirectionCorrection = HELOCO) -> torch.Tensor:
    """A push of one tensor after the correction."""
    g = d.clone()
    correction.correct(g, m, [(0, len(d))])
    return g


AXIS = torch.tensor([3.0, 0.0, 0.0])


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """The cosine of two vectors."""
    return float(torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0))


corrections = st.builds(
    DirectionCorrection,
    keep=st.sampled_from([0.1, 0.5, 0.9]),
    turn=st.sampled_from([0.5, 1.0, 5.0]),
    shrink=st.sampled_from([0.5, 1.0, 5.0]),
    most=st.sampled_from([0.5, 1.0]),
    kappa=st.sampled_from([0.1, 1.0, 10.0]),
)


@prop
@given(
    correction=corrections,
    seed=st.integers(0, 200),
    size=st.integers(1, 12),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    towards=st.sampled_from([-2.0, -0.5, 0.0, 0.3, 1.0]),
)
def test_a_push_is_corrected_by_the_printed_formula(
    correction: DirectionCorrection, seed: int, size: int, scale: float, towards: float
) -> None:
    """In all three cases, for every choice of the constants."""
    m = normal(size, seed)
    d = (normal(size, seed + 1000) + towards * m) * scale
    expected = printed(d, m, correction)
    assert_near(expected / scale, corrected(d, m, correction) / scale, 1e-4)


@pytest.mark.parametrize("degrees", [0, 20, 59])
def test_an_aligned_push_stays(degrees: float) -> None:
    """From a cosine of 0.5 on nothing changes, not a bit."""
    assert torch.equal(at_angle(degrees), corrected(at_angle(degrees), AXIS))


@pytest.mark.parametrize("degrees", [61, 75, 89])
def test_a_weakly_aligned_push_turns_and_keeps_its_length(degrees: float) -> None:
    """Below 0.5 it comes closer to the momentum, no further than the momentum's own direction."""
    g = corrected(at_angle(degrees), AXIS)
    assert float(g.norm()) == pytest.approx(2.0, rel=1e-6)
    assert cosine(at_angle(degrees), AXIS) < cosine(g, AXIS) <= 1.0


@pytest.mark.parametrize("degrees", [91, 120, 180])
def test_an_opposing_push_loses_part_of_what_opposes(degrees: float) -> None:
    """What is across the momentum stays; what is against it becomes smaller and never turns around."""
    d, g = at_angle(degrees), corrected(at_angle(degrees), AXIS)
    assert float(g[1]) == pytest.approx(float(d[1]), abs=1e-6)
    assert float(d[0]) < float(g[0]) <= 1e-6
    assert float(g.norm()) <= float(d.norm())


@prop
@given(seed=st.integers(0, 500), size=st.integers(1, 9), correction=corrections)
def test_a_correction_never_lengthens_a_push(seed: int, size: int, correction: DirectionCorrection) -> None:
    """Kept, turned or shortened: its length does not grow, and its cosine with the momentum does not fall."""
    m, d = normal(size, seed), normal(size, seed + 1000)
    g = corrected(d, m, correction)
    assert float(g.norm()) <= float(d.norm()) * (1 + 1e-5)
    assume(float(g.norm()) > 1e-4)
    assert cosine(g, m) >= cosine(d, m) - 1e-5


@pytest.mark.parametrize(
    ("d", "m"),
    [
        (torch.ones(3), torch.zeros(3)),
        (torch.zeros(3), torch.ones(3)),
        (torch.full((3,), 3e38), -torch.ones(3)),
        (torch.ones(3), torch.full((3,), -3e38)),
        (torch.tensor([3e38, 1e38, -3e38]), torch.full((3,), 1e-3)),
        (torch.full((3,), 1e-40), -torch.ones(3)),
    ],
    ids=["no momentum", "no push", "overflow", "momentum overflows", "weakly aligned and overflows", "squares vanish"],
)
def test_a_push_that_cannot_be_compared_stays(d: torch.Tensor, m: torch.Tensor) -> None:
    """Without a direction on either side, or with numbers whose squares leave float32, nothing changes."""
    assert torch.equal(d, corrected(d, m))


def test_each_tensor_is_corrected_by_itself() -> None:
    """One tensor of a fragment may stay while its neighbour turns; what lies between bounds stays too."""
    d = torch.cat((at_angle(0), at_angle(180), torch.tensor([-7.0])))
    m = torch.cat((AXIS, AXIS, torch.tensor([5.0])))
    g = d.clone()
    HELOCO.correct(g, m, [(0, 3), (3, 6)])
    assert torch.equal(d[:3], g[:3])
    assert_near(printed(d[3:6], m[3:6], HELOCO), g[3:6])
    assert torch.equal(d[6:], g[6:])
    together = d.clone()
    HELOCO.correct(together, m, [(0, 7)])
    assert not torch.equal(g, together)


# --- Before a rule.


def rule_named(name: str) -> OuterRule:
    """A rule with momentum."""
    return outer_rule(name, RuleSettings(rates=Rates(peak_lr=0.7, full_momentum=0.5), inner_steps=2))


def with_heloco(name: str, *, size: int, bounds: list[tuple[int, int]]) -> PlayedRule:
    """An asynchronous fragment of two workers whose pushes are corrected."""
    played = asynchronous(rule_named(name), 2, size=size)
    played.numbers = FragmentValues(played.initial.clone(), rule_named(name), correction=HELOCO, tensor_bounds=bounds)
    return played


MOMENTUM_RULES = [name for name, rule in RULES.items() if rule.momentum_vector is not None]


@pytest.mark.parametrize("name", MOMENTUM_RULES)
def test_it_composes_with_every_rule_that_has_a_momentum(name: str) -> None:
    """The rule gets the corrected push: the same as pushing what the formula makes of it, tensor by tensor."""
    size, bounds = 12, [(0, 5), (5, 12)]
    played, by_hand = with_heloco(name, size=size, bounds=bounds), asynchronous(rule_named(name), 2, size=size)
    workers, others = AsynchronousWorkers(played, 2), AsynchronousWorkers(by_hand, 2)
    for t in range(12):
        push = normal(played.numbers.push_elements, t)
        workers.push(t % 2, push)
        for start, end in bounds:
            push[start:end] = printed(push[start:end], by_hand.numbers.momentum[start:end], HELOCO).float()
        others.push(t % 2, push)
        assert_near(by_hand.w, played.w)
    assert not torch.equal(asynchronous(rule_named(name), 2, size=size).w, played.w)


def test_without_a_momentum_it_does_nothing() -> None:
    """The rule sgd has none, so its pushes enter as they are; so does every rule's first."""
    push = Decision(outcome=Outcome.APPLIED, contribution=Contribution(bins_late=0, share=1.0), reason="due")
    for name in ("sgd", *MOMENTUM_RULES):
        plain = FragmentValues(torch.zeros(6), rule_named(name))
        values = FragmentValues(torch.zeros(6), rule_named(name), correction=HELOCO, tensor_bounds=[(0, 6)])
        pushes = [normal(plain.push_elements, seed) for seed in range(3 if name == "sgd" else 1)]
        for each in (plain, values):
            for g in pushes:
                each.follow(push, EXACT, codecs.encode(EXACT, g))
        assert torch.equal(plain.w, values.w)


@pytest.mark.parametrize("name", ["ormo", "mla", "orlomo"])
def test_pieces_do_not_divide_what_is_corrected(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor larger than the pieces that rules are given is corrected whole: the same bits either way."""
    ends = []
    for piece_elements in (256, 1 << 20):
        monkeypatch.setattr(fragment_module, "PIECE_ELEMENTS", piece_elements)
        played = with_heloco(name, size=1000, bounds=[(0, 700), (700, 1000)])
        workers = AsynchronousWorkers(played, 2)
        for t in range(8):
            workers.push(t % 2, normal(played.numbers.push_elements, t))
        ends.append((played.w, played.numbers.momentum))
    assert all(map(torch.equal, *ends))


def test_a_push_is_not_changed_by_its_correction() -> None:
    """The payload that came stays as it is: it may be sent again, or be in a journal."""
    played = with_heloco("ormo", size=6, bounds=[(0, 6)])
    workers = AsynchronousWorkers(played, 2)
    workers.push(0, torch.ones(6))
    payload = codecs.encode(EXACT, -torch.ones(6))
    before = payload.clone()
    push = Decision(outcome=Outcome.APPLIED, contribution=Contribution(bins_late=0, share=0.5), reason="due")
    played.numbers.follow(push, EXACT, payload)
    assert torch.equal(before, payload)
