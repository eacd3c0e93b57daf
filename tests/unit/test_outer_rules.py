"""Every outer rule against its formula, written once more in float64 for a single fragment in order of arrival."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline_server import fragment as fragment_module
from paceline_server.fragment import FragmentValues
from paceline_server.ledger import Ledger, PushRequest, Roster, Schedule, ScheduleKind, decide_push
from paceline_server.rules import Contribution, Numbers, Rates, RuleSettings
from paceline_server.rules.heloco import DirectionCorrection
from paceline_server.rules.ordered_momentum import OrderedMomentum
from paceline_server.rules.orlomo import OrderedLocalMomentum
from paceline_server.rules.rates import STEP_FALLS, Decay
from paceline_server.rules.registry import RULES, outer_rule
from paceline_wire import codecs
from support_core import EXACT, assert_near, normal

SIZE, LR, BETA = 5, 0.4, 0.8
momenta = st.sampled_from([0.0, 0.5, 0.9])


@dataclass
class Literal:
    """A method of docs/rules.md, gradient by gradient; eta = lr / K."""

    w: torch.Tensor
    workers: int
    lr: float = LR
    beta: float = BETA
    m: torch.Tensor = field(init=False)
    total: torch.Tensor = field(init=False)
    count: int = 0

    def __post_init__(self) -> None:
        self.w = self.w.double().clone()
        self.m, self.total = torch.zeros_like(self.w), torch.zeros_like(self.w)

    @property
    def eta(self) -> float:
        """The rate of one gradient."""
        return self.lr / self.workers

    def published(self) -> torch.Tensor:
        """What workers are sent."""
        return self.w


class LiteralSGD(Literal):
    """w -= eta g."""

    def arrive(self, g: torch.Tensor) -> None:
        """Take a gradient."""
        self.w = self.w - self.eta * g


class LiteralMomentum(Literal):
    """u = beta u + eta g ; w -= u."""

    def arrive(self, g: torch.Tensor) -> None:
        """Take a gradient."""
        self.m = self.beta * self.m + self.eta * g
        self.w = self.w - self.m


class LiteralNesterov(Literal):
    """torch.optim.SGD(nesterov=True) with rate eta, fed in order of arrival."""

    def arrive(self, g: torch.Tensor) -> None:
        """Take a gradient."""
        self.m = self.beta * self.m + g
        self.w = self.w - self.eta * (g + self.beta * self.m)


class LiteralDelayedNesterov(Literal):
    """S += g ; every K-th: m = beta m + S/K, w -= lr (beta m + g/K), S = 0 ; else w -= lr g/K."""

    def arrive(self, g: torch.Tensor) -> None:
        """Take a gradient."""
        self.count += 1
        self.total = self.total + g
        if self.count % self.workers:
            self.w = self.w - self.lr * g / self.workers
            return
        self.m = self.beta * self.m + self.total / self.workers
        self.w = self.w - self.lr * (self.beta * self.m + g / self.workers)
        self.total = torch.zeros_like(self.total)


class LiteralLookAhead(Literal):
    """m = beta m + (1 - beta) g ; w -= eta (beta m + g)."""

    def arrive(self, g: torch.Tensor) -> None:
        """Take a gradient."""
        self.m = self.beta * self.m + (1 - self.beta) * g
        self.w = self.w - self.eta * (self.beta * self.m + g)


class LiteralSmega2(Literal):
    """SMEGA2 as printed: s = (s + 1) mod K ; G += g ; w -= eta (g + beta m) ; at s = 0: m = beta m + G/K, G = 0."""

    def arrive(self, g: torch.Tensor) -> None:
        """Take a gradient."""
        self.count = (self.count + 1) % self.workers
        self.total = self.total + g
        self.w = self.w - self.eta * (g + self.beta * self.m)
        if self.count == 0:
            self.m = self.beta * self.m + self.total / self.workers
            self.total = torch.zeros_like(self.total)

    def published(self) -> torch.Tensor:
        """W - eta beta ((s/K) G + (K + s (beta - 1)) m)."""
        s, k = self.count, self.workers
        return self.w - self.eta * self.beta * ((s / k) * self.total + (k + s * (self.beta - 1)) * self.m)


LITERAL: dict[str, Callable[..., Literal]] = {
    "sgd": LiteralSGD,
    "momentum": LiteralMomentum,
    "nesterov": LiteralNesterov,
    "delayed-nesterov": LiteralDelayedNesterov,
    "mla": LiteralLookAhead,
    "smega2": LiteralSmega2,
}


def rates(lr: float = LR, momentum: float = BETA, **others: object) -> Rates:
    """Return coefficients."""
    return Rates(peak_lr=lr, full_momentum=momentum, **others)  # type: ignore[arg-type]


def rule_settings(lr: float = LR, momentum: float = BETA) -> RuleSettings:
    """Return what a rule is made from."""
    return RuleSettings(rates=rates(lr, momentum), inner_steps=3)


@pytest.mark.parametrize("name", LITERAL)
@given(workers=st.integers(1, 5), arrivals=st.lists(st.integers(0, 4), max_size=30), seed=st.integers(0, 9))
@settings(max_examples=25, deadline=None)
def test_a_rule_is_its_formula_in_order_of_arrival(name: str, workers: int, arrivals: list[int], seed: int) -> None:
    """Through the ledger, with K constant: parameters and what is published, after every push."""
    schedule = Schedule(kind=ScheduleKind.ASYNC, quota=workers)
    start = normal(SIZE, seed)
    values = FragmentValues(start.clone(), outer_rule(name, rule_settings()))
    literal, ledger = LITERAL[name](start, workers), Ledger()
    seqs, bins = [0] * workers, [0] * workers
    for number, arriving in enumerate(arrivals):
        worker = arriving % workers
        seqs[worker] += 1
        push = PushRequest(worker=str(worker), incarnation=1, seq=seqs[worker], base_bin=bins[worker])
        roster = Roster(active=frozenset(str(index) for index in range(workers)), most_active=workers)
        decision, ledger = decide_push(schedule, ledger, 0.0, roster, push)
        g = normal(SIZE, 100 * seed + number)
        values.follow(decision, EXACT, codecs.encode(EXACT, g))
        bins[worker] = decision.answers[0].bin
        literal.arrive(g.double())  # type: ignore[attr-defined]
        assert_near(literal.w, values.w)
        assert_near(literal.published(), values.published())


# --- OrLoMo.


@given(
    momentum=momenta,
    inner_steps=st.integers(1, 4),
    bins=st.integers(1, 4),
    order=st.randoms(use_true_random=False),
)
@settings(max_examples=40, deadline=None)
def test_local_momentum_in_any_order_is_synchronous_averaging(
    momentum: float, inner_steps: int, bins: int, order: object
) -> None:
    """For given inner gradients: parameters and momentum of K workers, averaged after every round, in any order."""
    workers, inner_lr = 3, 0.1
    start = normal(SIZE, 1).double()
    gradients = torch.randn(bins, workers, inner_steps, SIZE, generator=torch.Generator().manual_seed(2)).double()
    theta, velocity = start.clone(), torch.zeros(SIZE).double()
    for of_bin in gradients:
        ends = []
        for of_worker in of_bin:
            x, p = theta.clone(), velocity.clone()
            for g in of_worker:
                p = momentum * p + inner_lr * g
                x = x - p
            ends.append((x, p))
        theta = torch.stack([x for x, _ in ends]).mean(0)
        velocity = torch.stack([p for _, p in ends]).mean(0)
    rule = OrderedLocalMomentum(rates=rates(1.0, momentum), inner_steps=inner_steps)
    numbers = Numbers(w=start.float(), state={"u": torch.zeros(SIZE)})
    pushes = [(of, worker) for of in range(bins) for worker in range(workers)]
    order.shuffle(pushes)  # type: ignore[attr-defined]
    opened = 0
    for of, worker in pushes:
        while opened < of:
            opened += 1
            rule.open_bin(numbers, opened)
        p, q = torch.zeros(SIZE).double(), torch.zeros(SIZE).double()
        for g in gradients[of, worker]:
            p = momentum * p + inner_lr * g
            q = q + p
        push = Contribution(bin=of, bins_late=opened - of, share=1 / workers)
        rule.apply(numbers, torch.stack((q, p)).float(), push)
    assert_near(theta, numbers.w, 1e-4)
    assert_near(velocity, numbers.state["u"], 1e-4)


def test_one_local_step_is_ordered_momentum() -> None:
    """With H = 1, p = q: OrLoMo's numbers are OrMo's."""
    ours = Numbers(w=torch.zeros(SIZE), state={"u": torch.zeros(SIZE)})
    theirs = Numbers(w=torch.zeros(SIZE), state={"u": torch.zeros(SIZE)})
    local, plain = OrderedLocalMomentum(rates=rates(), inner_steps=1), OrderedMomentum(rates=rates())
    for number, late in enumerate((0, 1, 3, 0, 2)):
        g, push = normal(SIZE, number), Contribution(bin=5, bins_late=late, share=0.25)
        local.apply(ours, torch.stack((g, g)), push)
        plain.apply(theirs, g.clone(), push)
        local.open_bin(ours, 9)
        plain.open_bin(theirs, 9)
    assert_near(theirs.w.double(), ours.w)
    assert_near(theirs.state["u"].double(), ours.state["u"])


def test_a_push_of_both_momenta_reaches_the_rule_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """One payload of 2 n elements: the outer gradient, then the momentum, whatever the size of pieces."""
    rule, size = OrderedLocalMomentum(rates=rates(), inner_steps=3), 700
    q, p = normal(size, 1), normal(size, 2)
    payload = codecs.encode(EXACT, torch.cat((q, p)))
    ends = []
    for pieces in (256, 1 << 20):
        monkeypatch.setattr(fragment_module, "PIECE_ELEMENTS", pieces)
        values = FragmentValues(torch.zeros(size), rule)
        decision, _ = decide_push(
            Schedule(kind=ScheduleKind.ASYNC, quota=1),
            Ledger(),
            0.0,
            Roster(active=frozenset({"a"}), most_active=1),
            PushRequest(worker="a", incarnation=1, seq=1, base_bin=0),
        )
        values.follow(decision, EXACT, payload)
        ends.append(values.w)
    assert torch.equal(*ends)
    assert_near(-LR * q.double(), ends[0])


# --- Rates that change by bin.


@given(
    momentum=momenta,
    warmup=st.integers(0, 6),
    decay=st.sampled_from(list(Decay)),
    pushes=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=12),
)
@settings(max_examples=60, deadline=None)
def test_order_does_not_matter_while_the_rates_change(
    momentum: float, warmup: int, decay: Decay, pushes: list[tuple[int, int]]
) -> None:
    """On time or late, a push of a bin ends in the same numbers: its rate and what bins opened since carried on."""
    of_bins = rates(0.5, momentum, decay=decay, warmup_bins=3, momentum_warmup_bins=warmup, total_bins=8)
    rule, last = OrderedMomentum(rates=of_bins), 19
    on_time, late = [Numbers(w=torch.zeros(SIZE), state={"u": torch.zeros(SIZE)}) for _ in range(2)]
    for opened in range(last + 1):
        for numbers in (on_time, late):
            if opened:
                rule.open_bin(numbers, opened)
        for number, (of, delay) in enumerate(pushes):
            g = normal(SIZE, number)
            if of == opened:
                rule.apply(on_time, g.clone(), Contribution(bin=of, bins_late=0, share=0.5))
            if of + delay == opened:
                rule.apply(late, g.clone(), Contribution(bin=of, bins_late=delay, share=0.5))
    assert_near(on_time.w.double(), late.w)
    assert_near(on_time.state["u"].double(), late.state["u"])


def test_the_rate_rises_and_falls_as_configured() -> None:
    """Linear warm-up to the peak, then constant, linear, cosine or by tenths, to the final share and no further."""
    rising = rates(0.8, warmup_bins=3)
    assert [rising.lr(of) for of in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8])
    linear = rates(1.0, decay=Decay.LINEAR, total_bins=10, final_share=0.2)
    assert [linear.lr(of) for of in (0, 5, 10, 99)] == pytest.approx([1.0, 0.6, 0.2, 0.2])
    cosine = rates(1.0, decay=Decay.COSINE, total_bins=10, final_share=0.0)
    assert [cosine.lr(of) for of in (0, 5, 10)] == pytest.approx([1.0, 0.5, 0.0])
    step = rates(1.0, decay=Decay.STEP, total_bins=100)
    falls = [round(100 * fall) for fall in STEP_FALLS]
    assert [step.lr(of) for of in (falls[0] - 1, falls[0], falls[1])] == pytest.approx([1.0, 0.1, 0.01])
    warm = rates(1.0, 0.8, momentum_warmup_bins=4)
    assert [warm.momentum(of) for of in range(6)] == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 0.8])


def test_constant_rates_are_the_closed_form() -> None:
    """What later bins make of a gradient is beta^d and (1 - beta^(d+1)) / (1 - beta)."""
    for late in (0, 1, 7):
        part_in_u, part_in_w = rates().carried(3, late)
        assert part_in_u == BETA**late
        assert math.isclose(part_in_w, (1 - BETA ** (late + 1)) / (1 - BETA))


# --- HeLoCo's correction.


def corrected(g: torch.Tensor, momentum: torch.Tensor, **constants: float) -> torch.Tensor:
    """Return what the correction makes of one tensor's push."""
    changed = g.clone()
    DirectionCorrection(**constants).correct(changed, momentum, [(0, len(g))])
    return changed


def test_a_push_that_points_along_the_momentum_stays() -> None:
    """At a cosine of at least `keep`, and without any momentum, nothing changes."""
    m = normal(SIZE, 1)
    assert torch.equal(corrected(2 * m, m), 2 * m)
    assert torch.equal(corrected(m, torch.zeros(SIZE)), m)
    assert torch.equal(corrected(torch.zeros(SIZE), m), torch.zeros(SIZE))


@given(seed=st.integers(0, 200), size=st.floats(0.01, 100.0))
def test_a_weakly_aligned_push_turns_and_keeps_its_length(seed: int, size: float) -> None:
    """With 0 <= cosine < keep the push turns towards the momentum by the formula, its length unchanged."""
    m, g = normal(SIZE, seed), size * normal(SIZE, seed + 1000)
    cosine = torch.nn.functional.cosine_similarity(g, m, dim=0)
    if not 0 <= cosine < 0.5:
        return
    after = corrected(g, m)
    assert math.isclose(float(after.norm()), float(g.norm()), rel_tol=1e-4)
    assert torch.nn.functional.cosine_similarity(after, m, dim=0) > cosine
    confidence = g.norm() / (g.norm() + m.norm())
    part = min(1.0, float((0.5 - cosine) * confidence))
    direction = (1 - part) * g / g.norm() + part * m / m.norm()
    assert_near((g.norm() * direction / direction.norm()).double(), after, 1e-4)


@given(seed=st.integers(0, 200))
def test_a_push_against_the_momentum_loses_part_of_what_opposes_it(seed: int) -> None:
    """With a negative cosine, only the part along the momentum shrinks, and never past zero."""
    m, g = normal(SIZE, seed), normal(SIZE, seed + 1000)
    unit = m / m.norm()
    along = torch.dot(g, unit)
    if along >= 0:
        return
    after = corrected(g, m)
    assert_near((g - along * unit).double(), after - torch.dot(after, unit) * unit, 1e-4)
    assert float(along) <= float(torch.dot(after, unit)) <= 1e-5


def test_tensors_are_corrected_each_by_itself_before_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a fragment of two tensors, the one that agrees with the momentum stays; pieces make no difference."""
    size, ends = 600, []
    bounds = [(0, 250), (250, 600)]
    first, second = normal(size, 1), normal(size, 2)
    second[:250] = first[:250]
    for pieces in (256, 1 << 20):
        monkeypatch.setattr(fragment_module, "PIECE_ELEMENTS", pieces)
        rule = outer_rule("mla", rule_settings())
        values = FragmentValues(torch.zeros(size), rule, correction=DirectionCorrection(), tensor_bounds=bounds)
        plain = FragmentValues(torch.zeros(size), rule)
        ledger = Ledger()
        for seq, g in enumerate((first, second), start=1):
            decision, ledger = decide_push(
                Schedule(kind=ScheduleKind.ASYNC, quota=1),
                ledger,
                0.0,
                Roster(active=frozenset({"a"}), most_active=1),
                PushRequest(worker="a", incarnation=1, seq=seq, base_bin=seq - 1),
            )
            for fragment in (values, plain):
                fragment.follow(decision, EXACT, codecs.encode(EXACT, g))
        assert torch.equal(values.w[:250], plain.w[:250])
        assert not torch.equal(values.w[250:], plain.w[250:])
        ends.append(values.w)
    assert torch.equal(*ends)


@pytest.mark.parametrize("name", RULES)
def test_every_rule_keeps_a_fragment_that_gets_nothing_as_it_is(name: str) -> None:
    """Bins that open before the first push move nothing, and nothing is published but the parameters."""
    start = normal(SIZE, 3)
    rule = outer_rule(name, rule_settings())
    numbers = Numbers(w=start.clone(), state={vector: torch.zeros(SIZE) for vector in rule.state})
    for opened in range(1, 5):
        rule.open_bin(numbers, opened)
    assert torch.equal(numbers.w, start)
    assert torch.equal(rule.published(numbers, None), start)
