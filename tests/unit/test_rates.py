"""Coefficients that change from bin to bin: their values, and that ordered momentum keeps its closed form."""

import math
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline_server.ledger import Decision, Schedule, ScheduleKind
from paceline_server.rules import Rates
from paceline_server.rules.ordered_momentum import OrderedMomentum
from paceline_server.rules.rates import Decay
from support_core import ASYNC, BARRIER, QUORUM, assert_near, normal
from support_rules import PARTICIPATION, AsynchronousWorkers, PlayedRule, asynchronous, asynchronous_arrivals

SIZE = 3
prop = settings(deadline=None, derandomize=True, max_examples=60)
orders = st.randoms(use_true_random=False)
changing_rates = st.builds(
    Rates,
    peak_lr=st.sampled_from([0.1, 0.7]),
    full_momentum=st.sampled_from([0.0, 0.5, 0.9]),
    decay=st.sampled_from(Decay),
    warmup_bins=st.integers(0, 5),
    momentum_warmup_bins=st.integers(0, 8),
    total_bins=st.integers(1, 12),
    final_share=st.sampled_from([0.0, 0.1, 1.0]),
)


# --- The values.


def test_the_learning_rate_warms_up_linearly() -> None:
    """Three bins of warm-up are a quarter, a half and three quarters of the peak; bin 3 has all of it."""
    rates = Rates(peak_lr=0.8, full_momentum=0.5, warmup_bins=3)
    assert [rates.lr(b) for b in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8])


def test_the_momentum_warms_up_linearly() -> None:
    """Over four bins from 0 to its value."""
    rates = Rates(peak_lr=1.0, full_momentum=0.8, momentum_warmup_bins=4)
    assert [rates.momentum(b) for b in range(6)] == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 0.8])


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        (Decay.CONSTANT, [1.0] * 5),
        (Decay.LINEAR, [1.0, 0.775, 0.55, 0.325, 0.1]),
        (Decay.COSINE, [0.1 + 0.9 * (1 + math.cos(math.pi * part)) / 2 for part in (0, 0.25, 0.5, 0.75, 1)]),
        (Decay.STEP, [1.0, 1.0, 1.0, 0.1, 0.01]),
    ],
)
def test_the_learning_rate_falls_after_its_warm_up(decay: Decay, expected: list[float]) -> None:
    """At 0, 25, 50, 75 and 100 % of the way from the warm-up's end to total_bins, and as at 100 % ever after."""
    rates = Rates(peak_lr=1.0, full_momentum=0.0, decay=decay, warmup_bins=20, total_bins=120, final_share=0.1)
    assert [rates.lr(20 + 25 * quarter) for quarter in range(5)] == pytest.approx(expected)
    assert rates.lr(10**9) == pytest.approx(expected[-1])


@pytest.mark.parametrize(("bin_number", "expected"), [(59, 1.0), (60, 0.1), (84, 0.1), (85, 0.01)])
def test_steps_are_at_60_and_85_percent(bin_number: int, expected: float) -> None:
    """The rate is divided by ten from that very bin on."""
    rates = Rates(peak_lr=1.0, full_momentum=0.0, decay=Decay.STEP, total_bins=100)
    assert rates.lr(bin_number) == pytest.approx(expected)


@prop
@given(rates=changing_rates)
def test_rates_stay_within_their_bounds(rates: Rates) -> None:
    """Every bin's rate is in [0, peak] and its momentum in [0, full]; after all warm-ups they only fall."""
    lrs = [rates.lr(b) for b in range(30)]
    assert all(0 <= lr <= rates.peak_lr * (1 + 1e-12) for lr in lrs)
    assert all(0 <= rates.momentum(b) <= rates.full_momentum for b in range(30))
    assert lrs[rates.warmup_bins :] == sorted(lrs[rates.warmup_bins :], reverse=True)


@prop
@given(rates=changing_rates, bin_number=st.integers(0, 20), bins_late=st.integers(0, 20))
def test_carried_is_the_product_of_the_bins_between(rates: Rates, bin_number: int, bins_late: int) -> None:
    """The part in u is the product of the coefficients of the bins opened since; that in w, the sum of all such."""
    products = [
        math.prod(rates.momentum(b) for b in range(bin_number + 1, bin_number + 1 + opened))
        for opened in range(bins_late + 1)
    ]
    assert rates.carried(bin_number, bins_late) == pytest.approx((products[-1], sum(products)), rel=1e-12, abs=1e-300)


def test_constant_rates_carry_by_the_printed_formula() -> None:
    """With a constant beta: beta^d and (1 - beta^(d+1)) / (1 - beta)."""
    rates = Rates(peak_lr=1.0, full_momentum=0.9)
    assert rates.carried(5, 7) == pytest.approx((0.9**7, (1 - 0.9**8) / (1 - 0.9)), rel=1e-14)


def test_carrying_very_far_is_finite() -> None:
    """A push of the first bin that comes in the 10^12th has nothing left in u, and 1 / (1 - beta) in w."""
    assert Rates(peak_lr=1.0, full_momentum=0.5).carried(0, 10**12) == (0.0, 2.0)


# --- Order does not matter, whatever changes from bin to bin.


def bin_gradient(bin_number: int, place: int) -> torch.Tensor:
    """The gradient of one place in a bin."""
    return normal(SIZE, 100 * bin_number + place)


@prop
@given(rates=changing_rates, num_workers=st.integers(1, 5), num_bins=st.integers(1, 8), order=orders)
def test_any_arrival_order_is_momentum_sgd_with_each_bins_rates(
    rates: Rates, num_workers: int, num_bins: int, order: Random
) -> None:
    """Whatever the order, w and u end as Polyak's momentum whose step b has the rate and coefficient of bin b."""
    played = asynchronous(OrderedMomentum(rates=rates), num_workers)
    workers, arrived = AsynchronousWorkers(played, num_workers), [0] * num_bins
    for arrival in asynchronous_arrivals(num_workers, order, num_bins=num_bins):
        workers.push(arrival.worker, bin_gradient(arrival.bin, arrived[arrival.bin]))
        arrived[arrival.bin] += 1
    w, u = played.initial.double(), torch.zeros(SIZE, dtype=torch.float64)
    for b in range(played.open_bin + 1):
        mean = torch.zeros(SIZE, dtype=torch.float64)
        if b < num_bins:
            mean = torch.stack([bin_gradient(b, place).double() for place in range(num_workers)]).mean(0)
        u = rates.momentum(b) * u + rates.lr(b) * mean
        w = w - u
    assert_near(w, played.w)
    assert_near(u, played.u)


class ElasticRun:
    """Workers that come, go, are lost and come late, under any schedule, and what w and u must then be."""

    def __init__(self, played: PlayedRule, rates: Rates, order: Random) -> None:
        self.played, self._rates, self._order = played, rates, order
        self._workers: dict[str, tuple[int, int]] = {}  # newest seq and base bin
        self._old_bases: list[int] = [0]
        self.gradients: list[torch.Tensor] = []
        self.join()

    def act(self) -> None:
        """Let one thing happen."""
        self._order.choice([*[self.push] * 6, self.push_late, self.join, self.leave, self.come_back, self.look])()

    def join(self) -> None:
        """A new worker, from the newest values."""
        name = f"worker-{len(self._workers)}"
        self._workers[name] = (0, self.played.ledger.issuing_bin)
        self.played.join(name)

    def leave(self) -> None:
        """A worker leaves or is lost; it may push all the same."""
        if self.played.active:
            self.played.leave(self._order.choice(sorted(self.played.active)))

    def come_back(self) -> None:
        """A worker is active again."""
        self.played.join(self._order.choice(sorted(self._workers)))

    def look(self) -> None:
        """Time passes, and the shard looks whether the bin closes."""
        self.played.now_s += self._order.choice([0.1, 1.0, 10.0])
        decision = self.played.close()
        if decision is not None:
            self._receive(decision)

    def push(self) -> None:
        """Somebody pushes what it computed from its newest base."""
        free = sorted(name for name in self._workers if name not in self.played.ledger.waiting)
        if free:
            name = self._order.choice(free)
            self._push(name, self._workers[name][1])

    def push_late(self) -> None:
        """Somebody pushes from a base of long ago."""
        free = sorted(name for name in self._workers if name not in self.played.ledger.waiting)
        if free:
            self._push(self._order.choice(free), self._order.choice(self._old_bases))

    def assert_closed_form(self) -> None:
        """W and u are sums over what entered: own bin's rate, and the product of the bins opened since."""
        c = self.played.open_bin
        w, u = self.played.initial.double(), torch.zeros(SIZE, dtype=torch.float64)
        for push, g in zip(self.played.contributions, self.gradients, strict=True):
            eta = self._rates.lr(push.bin) * push.share
            products = [
                math.prod(self._rates.momentum(j) for j in range(push.bin + 1, opened + 1))
                for opened in range(push.bin, c + 1)
            ]
            u += eta * products[-1] * g.double()
            w -= eta * sum(products) * g.double()
        assert_near(w, self.played.w)
        assert_near(u, self.played.u)

    def _push(self, name: str, base_bin: int) -> None:
        seq, newest_base = self._workers[name]
        self._old_bases.append(base_bin)
        self._workers[name] = (seq + 1, newest_base)
        g = normal(SIZE, len(self.gradients))
        self.gradients.append(g)
        tokens = self._order.choice([None, 0, 5, 50])
        self._receive(self.played.push(name, seq + 1, base_bin, g, tokens=tokens))
        push = self.played.contributions[-1]
        assert push.bin == base_bin
        assert 0 <= push.share <= 1

    def _receive(self, decision: Decision) -> None:
        for answer in decision.answers:
            self._workers[answer.worker] = (answer.seq, answer.bin)


@settings(deadline=None, derandomize=True, max_examples=120)
@given(
    kind=st.sampled_from([ASYNC, PARTICIPATION, BARRIER, QUORUM]),
    quota=st.none() | st.integers(1, 5),
    look_ahead=st.booleans(),
    late_bins=st.none() | st.integers(1, 3),
    rates=changing_rates,
    order=orders,
)
def test_the_closed_form_holds_with_changing_rates_while_workers_come_and_go(
    kind: ScheduleKind, quota: int | None, look_ahead: bool, late_bins: int | None, rates: Rates, order: Random
) -> None:
    """Under every schedule, with late pushes taken in part and tokens counted, w and u are the generalized form."""
    schedule = Schedule(
        kind=kind,
        quota=quota,
        quorum=min(2, quota or 2) if kind is QUORUM else None,
        look_ahead=look_ahead,
        late_bins=late_bins,
    )
    run = ElasticRun(PlayedRule(schedule, OrderedMomentum(rates=rates), size=SIZE), rates, order)
    for _ in range(60):
        run.act()
        run.assert_closed_form()
    assert run.gradients
