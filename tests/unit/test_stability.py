"""The linear stability model: against printed tables, known formulas, every worker played out, and the real core."""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from paceline_server import stability
from paceline_server.ledger import Schedule
from paceline_server.stability import Estimate, StabilitySetting
from support_core import ASYNC, BARRIER, PlayedFragment, assert_near, names

prop = settings(deadline=None, derandomize=True, max_examples=60)
momenta = st.sampled_from([0.0, 0.3, 0.5, 0.8, 0.9])
estimates: st.SearchStrategy[Estimate] = st.sampled_from(["delayed", "1/M", "1", "local", "predicted"])
rates = st.floats(0.05, 2.0)
contractions = st.floats(0.05, 2.0)

BETAS = [0.0, 0.3, 0.5, 0.8, 0.9]


def run_of(
    lr: float = 1.0, momentum: float = 0.5, workers: int = 4, *, look_ahead: bool = True, delay: int = 1, **rest: object
) -> StabilitySetting:
    """A setting with the values that most of these tests want."""
    setting = StabilitySetting(lr=lr, momentum=momentum, workers=workers, look_ahead=look_ahead, delay=delay)
    return replace(setting, **rest)  # type: ignore[arg-type]


@st.composite
def any_setting(draw: st.DrawFn) -> StabilitySetting:
    """A setting small enough to be played with every worker."""
    workers = draw(st.integers(1, 4))
    groups = draw(st.sampled_from([1, workers]))
    return StabilitySetting(
        lr=draw(rates),
        momentum=draw(momenta),
        workers=workers,
        look_ahead=draw(st.booleans()),
        delay=draw(st.integers(0, 3)),
        estimate=draw(estimates),
        groups=groups,
        ordered=draw(st.booleans()) if groups == workers else True,
    )


# --- Every worker played out, in plain arithmetic: the reference.


@dataclass
class PlainWorker:
    """A worker's numbers."""

    start: float
    velocity: float = 0.0
    in_flight: list[float] = field(default_factory=list)
    unread: list[tuple[float, float]] = field(default_factory=list)


class PlainRun:
    """The server and all M workers, with the distance from the optimum as their only parameter."""

    def __init__(self, setting: StabilitySetting, contraction: float) -> None:
        self.setting, self.contraction = setting, contraction
        self.w, self.u = 1.0, 0.0
        self.workers = [
            PlainWorker(1.0, 0.0, [0.0] * setting.delay, [(1.0, 0.0)] * setting.delay) for _ in range(setting.workers)
        ]

    def numbers(self) -> list[float]:
        """The whole state."""
        state = [self.w, self.u]
        for worker in self.workers:
            state += [worker.start, worker.velocity, *worker.in_flight, *itertools.chain(*worker.unread)]
        return state

    def set_numbers(self, state: list[float]) -> None:
        """Set the whole state."""
        values = iter(state)
        delay = self.setting.delay
        self.w, self.u = next(values), next(values)
        self.workers = [
            PlainWorker(
                next(values),
                next(values),
                [next(values) for _ in range(delay)],
                [(next(values), next(values)) for _ in range(delay)],
            )
            for _ in range(self.setting.workers)
        ]

    def open_bin(self) -> None:
        """Open the next bin."""
        self.w -= self.setting.momentum * self.u
        self.u *= self.setting.momentum

    def apply(self, g: float, share: float, bins_late: int) -> None:
        """Let a push enter."""
        beta, eta = self.setting.momentum, self.setting.lr * share
        self.u += eta * beta**bins_late * g
        self.w -= eta * sum(beta**k for k in range(bins_late + 1)) * g

    def play_round(self) -> None:
        """Let everybody push once."""
        if self.setting.groups == 1:
            self._play_together()
        else:
            self._play_one_after_another()

    def _play_together(self) -> None:
        gradients = [self.contraction * worker.start for worker in self.workers]
        if not self.setting.look_ahead:
            self.open_bin()
        for g in gradients:
            self.apply(g, 1 / self.setting.workers, self._whole_bins_late())
        if self.setting.look_ahead:
            self.open_bin()
        for worker, g in zip(self.workers, gradients, strict=True):
            self._next_round(worker, g)

    def _whole_bins_late(self) -> int:
        return max(0, self.setting.delay - 1) if self.setting.ordered else 0

    def _play_one_after_another(self) -> None:
        """Labels as the ordered momentum loop gives them, far from the start; see docs/algorithms.md, section 2."""
        setting, many = self.setting, self.setting.workers
        first = 1000 * many
        for t, worker in enumerate(self.workers, start=first):
            label = t + 1 - many * max(1, setting.delay)
            bins_late = math.ceil(t / many) - math.ceil(label / many)
            starts_bin = t % many == (0 if setting.look_ahead else 1 % many)
            opens = starts_bin or not setting.ordered
            if opens and not setting.look_ahead:
                self.open_bin()
            g = self.contraction * worker.start
            self.apply(g, 1 / many, bins_late if setting.ordered else 0)
            if opens and setting.look_ahead:
                self.open_bin()
            self._next_round(worker, g)

    def _next_round(self, worker: PlainWorker, g: float) -> None:
        setting = self.setting
        worker.velocity = setting.momentum * worker.velocity + g
        worker.in_flight.append(self._expected(worker, g))
        worker.unread.append((self.w, self.u))
        w, u = worker.unread.pop(0)
        worker.in_flight.pop(0)
        if setting.estimate == "predicted":
            server = PlainRun(setting, self.contraction)
            server.w, server.u = w, u
            for pushed in worker.in_flight:
                if not setting.look_ahead:
                    server.open_bin()
                server.apply(pushed, 1.0, self._whole_bins_late())
                if setting.look_ahead:
                    server.open_bin()
            worker.start = server.w
        else:
            worker.start = w - sum(worker.in_flight)

    def _expected(self, worker: PlainWorker, g: float) -> float:
        setting = self.setting
        if setting.estimate == "delayed":
            return 0.0
        if setting.estimate in ("local", "predicted"):
            return g
        own = g + setting.momentum * worker.velocity if setting.look_ahead else worker.velocity
        return setting.lr * own * (1.0 if setting.estimate == "1" else 1 / setting.workers)

    def matrix(self) -> NDArray[np.float64]:
        """The matrix of one round, column by column."""
        size = len(self.numbers())
        columns = []
        for number in range(size):
            self.set_numbers([float(number == other) for other in range(size)])
            self.play_round()
            columns.append(self.numbers())
        return np.array(columns).T


@prop
@given(setting=any_setting(), contraction=contractions)
def test_the_small_matrices_say_what_all_workers_together_do(setting: StabilitySetting, contraction: float) -> None:
    """The radius is that of the matrix of all M workers, as far as a distance can tell (see the private momentum)."""
    eigenvalues = np.abs(np.linalg.eigvals(PlainRun(setting, contraction).matrix()))
    unread_momentum = setting.estimate not in ("1", "1/M") or setting.delay == 0
    # The reference always keeps a private momentum; where no estimate reads it, it decays by beta on its own.
    expected = [value for value in eigenvalues if not (unread_momentum and math.isclose(value, setting.momentum))]
    actual = stability.spectral_radius(setting, contraction)
    # Defective eigenvalues near 0 are only found to the n-th root of the precision.
    assert actual == pytest.approx(max(expected, default=0.0), abs=2e-3 if actual < 0.2 else 1e-6)


def played_distances(setting: StabilitySetting, contraction: float, num_rounds: int) -> Iterator[float]:
    """Play blocking or delayed workers against the real core; yields w after every round."""
    kind = BARRIER if setting.groups == 1 else ASYNC
    schedule = Schedule(kind=kind, quota=setting.workers, look_ahead=setting.look_ahead)
    played = PlayedFragment(
        schedule, lr=setting.lr, momentum=setting.momentum, workers=setting.workers, initial=torch.ones(1)
    )
    starts = dict.fromkeys(names(setting.workers), 1.0)
    unread = {name: [(1.0, 0)] * setting.delay for name in starts}
    base_bins = dict.fromkeys(starts, 0)
    for number in range(num_rounds):
        for name in names(setting.workers):
            g = torch.tensor([contraction * starts[name]])
            decision = played.push(name, number + 1, base_bins[name], g)
            for answer in decision.answers:
                unread[answer.worker].append((float(played.w), answer.bin))
                starts[answer.worker], base_bins[answer.worker] = unread[answer.worker].pop(0)
                if setting.delay == 1:
                    # An answer that is read when the next round ends has been held when that round is pushed.
                    base_bins[answer.worker] = unread[answer.worker][0][1]
        yield float(played.w)


@pytest.mark.parametrize("look_ahead", [False, True])
@pytest.mark.parametrize("delay", [0, 1])
@pytest.mark.parametrize("workers", [1, 2, 3, 5])
@pytest.mark.parametrize("together", [False, True])
def test_the_reference_does_what_the_core_does(look_ahead: bool, delay: int, workers: int, together: bool) -> None:
    """Distances over 20 rounds are those of the server's own decisions and numbers, with labels, bins and lateness."""
    groups = 1 if together else workers
    setting = run_of(0.5, 0.6, workers, look_ahead=look_ahead, delay=delay, estimate="delayed", groups=groups)
    reference = PlainRun(setting, 0.7)
    for distance in played_distances(setting, 0.7, 20):
        reference.play_round()
        assert_near(torch.tensor([reference.w], dtype=torch.float64), torch.tensor([distance]))


# --- The printed tables.

COLUMNS: list[tuple[Estimate, int, int]] = [
    ("1", 4, 0),
    ("1/M", 2, 1),
    ("1/M", 4, 1),
    ("1/M", 8, 1),
    ("1", 4, 1),
    ("delayed", 4, 1),
]

DOCUMENTED = {
    (0.7, 0.9): "1.94 1.10 0.59 0.46 0.97 0.36",
    (0.4, 0.9): "2.00 1.92 1.04 0.80 1.70 0.63",
    (0.7, 0.5): "2.00 1.69 1.09 0.93 1.07 0.80",
    (0.4, 0.5): "2.00 2.00 1.91 1.62 1.88 1.40",
}


@pytest.mark.parametrize(("lr", "beta"), DOCUMENTED)
def test_the_table_of_section_9(lr: float, beta: float) -> None:
    """docs/algorithms.md, section 9: the largest stable part of a distance, digit by digit."""
    limits = [
        stability.largest_stable_contraction(run_of(lr, beta, workers, delay=delay, estimate=estimate))
        for estimate, workers, delay in COLUMNS
    ]
    # Halves are rounded up: weight 1 at 0.4 and 0.5 is 1.875.
    printed = [f"{math.floor(limit * 100 + 0.5 + 1e-6) / 100:.2f}" for limit in limits]
    assert " ".join(printed) == DOCUMENTED[lr, beta]


ORDERING = {
    2: "2.000/2.000 1.395/1.000 1.187/0.400 1.125/0.200",
    4: "1.780/1.780 1.105/0.797 0.861/0.289 0.794/0.139",
    8: "1.672/1.672 0.998/0.766 0.750/0.271 0.682/0.126",
    16: "1.621/1.621 0.951/0.769 0.702/0.277 0.635/0.127",
}


@pytest.mark.parametrize("workers", ORDERING)
def test_ordering_enlarges_the_stable_region_under_asynchrony(workers: int) -> None:
    """Blocking workers one after another: the largest stable lr, ordered / by arrival, at beta 0, 0.5, 0.8, 0.9."""
    limits = []
    for beta in (0.0, 0.5, 0.8, 0.9):
        setting = run_of(1.0, beta, workers, look_ahead=False, delay=0, groups=workers)
        ordered = stability.largest_stable_lr(setting)
        by_arrival = stability.largest_stable_lr(replace(setting, ordered=False))
        assert ordered >= by_arrival - 1e-6
        limits.append(f"{ordered:.3f}/{by_arrival:.3f}")
    assert " ".join(limits) == ORDERING[workers]


# --- Formulas [derived] for the largest stable product of lr and contraction.


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(
    ("look_ahead", "delay", "estimate", "formula"),
    [
        pytest.param(True, 0, "1", lambda b: 2 * (1 + b) / (1 + 2 * b), id="blocking Nesterov"),
        pytest.param(False, 0, "1", lambda b: 2 * (1 + b), id="blocking Polyak"),
        pytest.param(True, 1, "1", lambda b: (1 + b) / (1 + 2 * b), id="weight 1, Nesterov: docs, section 9"),
        pytest.param(False, 1, "1", lambda b: 1 + b, id="weight 1, Polyak"),
        pytest.param(False, 1, "delayed", lambda b: 1 - b, id="delayed Polyak"),
        pytest.param(True, 1, "predicted", lambda b: 1 / (1 + b), id="predicted, Nesterov"),
        pytest.param(False, 1, "predicted", lambda b: 1.0, id="predicted, Polyak"),
    ],
)
def test_limits_that_have_a_formula(
    beta: float, look_ahead: bool, delay: int, estimate: Estimate, formula: Callable[[float], float]
) -> None:
    """Where the characteristic polynomial can be solved by hand, the limit is its root."""
    setting = run_of(1.0, beta, look_ahead=look_ahead, delay=delay, estimate=estimate)
    assert stability.largest_stable_lr(setting) == pytest.approx(formula(beta), rel=1e-6)


@pytest.mark.parametrize("workers", [1, 2, 3, 8, 16])
def test_asynchronous_sgd_ends_where_delayed_gradient_descent_does(workers: int) -> None:
    """Without momentum, x' = x - (lr/K) a x of K - 1 pushes ago is stable up to lr a = 2 K sin(pi / (4 K - 2))."""
    setting = run_of(1.0, 0.0, workers, look_ahead=False, delay=0, groups=workers)
    expected = 2 * workers * math.sin(math.pi / (4 * workers - 2))
    assert stability.largest_stable_lr(setting) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("beta", BETAS)
def test_one_over_m_becomes_delayed_with_many_workers(beta: float) -> None:
    """The own share of ever more workers vanishes, and what is left is to expect nothing."""
    many = run_of(1.0, beta, 100_000, estimate="1/M")
    nothing = run_of(1.0, beta, 100_000, estimate="delayed")
    assert stability.largest_stable_lr(many) == pytest.approx(stability.largest_stable_lr(nothing), rel=1e-3)


@pytest.mark.parametrize("estimate", ["1", "1/M", "delayed"])
def test_blocking_nesterov_can_arrive_in_two_rounds(estimate: Estimate) -> None:
    """At lr a = 1 the characteristic polynomial of blocking Nesterov is z^2, whatever is estimated."""
    setting = run_of(1.0, 0.5, delay=0, estimate=estimate)
    # A double root is only found to the square root of the precision.
    assert stability.spectral_radius(setting, 1.0) == pytest.approx(0.0, abs=1e-4)


# --- Properties.


@prop
@given(setting=any_setting(), contraction=contractions)
def test_the_limits_separate_decay_from_growth(setting: StabilitySetting, contraction: float) -> None:
    """Nothing grows at the limit or at fractions of it, and something does just above it."""
    limit = stability.largest_stable_contraction(setting)
    for part in (0.1, 0.5, 0.9, 1.0):
        assert stability.spectral_radius(setting, part * limit) <= 1 + 1e-6
    if limit < stability.MAX_CONTRACTION:
        assert stability.spectral_radius(setting, limit + 1e-4) > 1
    lr = stability.largest_stable_lr(setting, contraction)
    if lr > 0:
        assert stability.spectral_radius(replace(setting, lr=lr), contraction) <= 1 + 1e-6
    assert stability.spectral_radius(replace(setting, lr=lr + 1e-3), contraction) > 1


@prop
@given(setting=any_setting(), contraction=contractions)
def test_only_the_product_of_rate_and_contraction_counts(setting: StabilitySetting, contraction: float) -> None:
    """Every outer gradient is multiplied by lr, save where a worker goes on from its own end point."""
    if setting.estimate == "local":
        setting = replace(setting, estimate="1")
    product = replace(setting, lr=setting.lr * contraction)
    expected = stability.spectral_radius(product, 1.0)
    assert stability.spectral_radius(setting, contraction) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("look_ahead", [False, True])
@pytest.mark.parametrize("estimate", ["delayed", "1", "local", "predicted"])
def test_only_one_over_m_knows_how_many_push_together(look_ahead: bool, estimate: Estimate) -> None:
    """Whatever else a worker expects, two workers in step are as stable as a hundred."""
    two, hundred = (run_of(0.7, 0.5, count, look_ahead=look_ahead, estimate=estimate) for count in (2, 100))
    assert stability.largest_stable_contraction(two) == stability.largest_stable_contraction(hundred)


@pytest.mark.parametrize("look_ahead", [False, True])
@pytest.mark.parametrize("estimate", ["delayed", "1/M"])
@pytest.mark.parametrize("beta", BETAS)
def test_later_answers_are_never_more_stable(beta: float, estimate: Estimate, look_ahead: bool) -> None:
    """The largest stable lr falls with the delay where little is expected; bold estimates bend this by a percent."""
    limits = [
        stability.largest_stable_lr(run_of(1.0, beta, look_ahead=look_ahead, delay=delay, estimate=estimate))
        for delay in range(6)
    ]
    assert limits == sorted(limits, reverse=True)


def test_one_worker_is_its_own_group() -> None:
    """A single worker has nobody to differ from, so that with weight 1 it is as stable as when blocking."""
    for beta in BETAS:
        blocking = run_of(1.0, beta, 1, delay=0)
        assert stability.largest_stable_lr(replace(blocking, delay=1)) == stability.largest_stable_lr(blocking)


@pytest.mark.parametrize(
    ("name", "value"),
    [("lr", -0.1), ("lr", math.nan), ("momentum", 1.0), ("workers", 0), ("groups", 5), ("groups", 0), ("delay", -1)],
)
def test_settings_out_of_range_are_refused(name: str, value: float) -> None:
    """What the model does not describe raises, and the message shows the values."""
    with pytest.raises(ValueError, match="out of its range: StabilitySetting"):
        run_of(**{name: value})  # type: ignore[arg-type]


def test_momentum_by_arrival_needs_arrivals_and_estimates_have_names() -> None:
    """Where all push together no order of arrival is modelled; an unknown estimate is named with those that are."""
    with pytest.raises(ValueError, match="momentum by arrival"):
        run_of(ordered=False)
    with pytest.raises(ValueError, match="'2', not one of delayed, 1/M, 1, local, predicted"):
        run_of(estimate="2")


# --- What an operator is told.


@pytest.mark.parametrize("workers", [1, 2, 4, 8, 16, 64])
@pytest.mark.parametrize(("asynchronous", "mean_bins_late"), [(True, 0.97), (False, 0.0)])
def test_the_defaults_are_not_warned_of(workers: int, asynchronous: bool, mean_bins_late: float) -> None:
    """0.7 and 0.5 with weight 1 are stable on a fresh model, answered at once (Polyak) or together (Nesterov)."""
    setting = stability.setting_seen(
        lr=0.7,
        momentum=0.5,
        workers=workers,
        look_ahead=not asynchronous,
        estimate="1",
        asynchronous=asynchronous,
        mean_bins_late=mean_bins_late,
    )
    assert stability.warning_of(setting) is None


def test_a_warning_says_what_is_set_and_what_would_do() -> None:
    """The published outer rate and momentum with four eager workers, which blow up on a fresh model."""
    warning = stability.warning_of(run_of(0.7, 0.9, 4, estimate="1/M"))
    assert warning == (
        "lr 0.7 with momentum 0.9 may blow up on a fresh model: with 4 workers, answers 1 round late and own weight "
        "1/M, the linear model is stable while a round removes at most 0.59 of the distance to an optimum, and a fresh "
        "model's removes nearly all of it; at this momentum an lr of up to 0.41 is stable"
    )
    assert "1 worker, answers 2 rounds late" in str(stability.warning_of(run_of(5.0, 0.5, 1, delay=2)))


def test_where_no_rate_helps_the_warning_says_so() -> None:
    """Going on from the own end point, unlike the others, is unstable at contraction 1 whatever the rate."""
    warning = stability.warning_of(run_of(0.7, 0.5, 4, delay=2, estimate="local", groups=4))
    assert warning is not None
    assert warning.endswith("at this momentum no lr is stable, so choose another own weight")


@prop
@given(setting=any_setting())
def test_the_advised_rate_is_not_warned_of(setting: StabilitySetting) -> None:
    """Who follows the advice is not warned again."""
    warning = stability.warning_of(setting)
    if warning is not None and "up to" in warning:
        advised = float(warning.rpartition("up to ")[2].partition(" ")[0])
        assert 0 < advised < setting.lr
        assert stability.warning_of(replace(setting, lr=advised)) is None


@pytest.mark.parametrize(
    ("mean_bins_late", "asynchronous", "delay"),
    [
        (0.0, False, 1),
        (0.1, False, 1),
        (0.2, False, 2),
        (1.0, False, 2),
        (0.0, True, 1),
        (0.97, True, 1),
        (1.1, True, 1),
        (1.2, True, 2),
        (1.97, True, 2),
        (50.0, True, 8),
        (50.0, False, 8),
    ],
)
def test_lateness_is_rounded_up_to_a_delay(mean_bins_late: float, asynchronous: bool, delay: int) -> None:
    """Asynchronous answers are a bin late of themselves; elsewhere a push on time may still be a round old."""
    assert stability.delay_seen(mean_bins_late, asynchronous=asynchronous) == delay


def test_few_groups_stand_for_many_workers() -> None:
    """What a server assumes of 16 asynchronous workers is within a tenth of the model with each by itself."""
    seen = stability.setting_seen(
        lr=0.7,
        momentum=0.8,
        workers=16,
        look_ahead=False,
        estimate="1",
        asynchronous=True,
        mean_bins_late=1.9,
    )
    assert (seen.groups, seen.delay) == (6, 2)
    each_alone = stability.largest_stable_lr(replace(seen, groups=16))
    assert each_alone <= stability.largest_stable_lr(seen) <= 1.1 * each_alone
