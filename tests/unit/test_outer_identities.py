"""The identities of ordered momentum (docs/algorithms.md, section 1), on the shard's own decisions and numbers."""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline_server.ledger import Schedule, ScheduleKind
from paceline_server.rules import Contribution, Numbers, Rates
from paceline_server.rules.ordered_momentum import OrderedMomentum
from support_core import ASYNC, BARRIER, QUORUM, PlayedFragment, assert_near, names, normal, only_answer

SIZE = 3
prop = settings(deadline=None, derandomize=True, max_examples=40)
momenta = st.sampled_from([0.0, 0.3, 0.5, 0.9, 0.97])
rates = st.sampled_from([0.05, 0.4, 0.7, 1.0])
orders = st.randoms(use_true_random=False)


# --- Independent references, in float64 and straight from the page.


class PrintedLoop:
    """The server loop as section 1 prints it, with its labels and its ceil, one arrival at a time."""

    def __init__(self, w: torch.Tensor, *, num_workers: int, eta: float, beta: float) -> None:
        self.w, self.u = w.double(), torch.zeros_like(w, dtype=torch.float64)
        self.c, self.t = 0, 0
        self.num_workers, self.eta, self.beta = num_workers, eta, beta

    def bin_of(self, label: int) -> int:
        """The bin of gradients computed at the parameters with that label."""
        return math.ceil(label / self.num_workers)

    def arrive(self, g: torch.Tensor, label: int) -> int:
        """Take a gradient computed at the parameters with that label; returns the label of the reply."""
        eta, beta = self.eta, self.beta
        if math.ceil(self.t / self.num_workers) > self.c:
            self.w -= beta * self.u
            self.u *= beta
            self.c += 1
        d = self.c - self.bin_of(label)
        assert d >= 0
        self.u += eta * beta**d * g.double()
        self.w -= eta * (1 - beta ** (d + 1)) / (1 - beta) * g.double()
        self.t += 1
        return self.t


def momentum_sgd(w: torch.Tensor, gradients: list[torch.Tensor], eta: float, beta: float) -> tuple[torch.Tensor, ...]:
    """Polyak's momentum: u = beta u + eta g ; w -= u, one step for each gradient."""
    w, u = w.double(), torch.zeros_like(w, dtype=torch.float64)
    for g in gradients:
        u = beta * u + eta * g.double()
        w = w - u
    return w, u


class LabelledGradients:
    """Gradients by label: one for each of the K workers at label 0, and one for every label after it."""

    def __init__(self, num_workers: int, seed: int) -> None:
        self._num_workers, self._seed = num_workers, seed

    def of(self, worker: int, label: int) -> torch.Tensor:
        """The gradient that the worker computes at the parameters with that label."""
        return normal(SIZE, self._seed + (worker if label == 0 else self._num_workers + label))

    def bin_sums(self, num_bins: int) -> list[torch.Tensor]:
        """The sum of each bin's K gradients."""
        everyone = range(self._num_workers)
        sums = [torch.stack([self.of(worker, 0) for worker in everyone]).double().sum(0)]
        for b in range(1, num_bins):
            labels = range((b - 1) * self._num_workers + 1, b * self._num_workers + 1)
            sums.append(torch.stack([self.of(0, label) for label in labels]).double().sum(0))
        return sums


def arrivals(num_workers: int, num_bins: int, order: Random) -> Iterator[tuple[int, int]]:
    """Worker and label of each arrival, in a random order in which every gradient of num_bins bins arrives."""
    label_of = dict.fromkeys(range(num_workers), 0)
    last_label = (num_bins - 1) * num_workers
    for t in range(num_workers * num_bins):
        worker = order.choice([worker for worker, label in label_of.items() if label <= last_label])
        yield worker, label_of[worker]
        label_of[worker] = t + 1


def asynchronous(num_workers: int, *, lr: float, momentum: float, look_ahead: bool = False) -> PlayedFragment:
    """A fragment under the asynchronous schedule with quota K."""
    schedule = Schedule(kind=ASYNC, quota=num_workers, look_ahead=look_ahead)
    return PlayedFragment(schedule, lr=lr, momentum=momentum, size=SIZE)


def play(
    played: PlayedFragment, num_workers: int, gradients: LabelledGradients, num_bins: int, order: Random
) -> Iterator[tuple[int, torch.Tensor]]:
    """Let workers push until num_bins bins are full; yields the label and gradient of each arrival after it."""
    workers = names(num_workers)
    base_bin, seqs = Counter[str](), Counter[str]()
    for worker, label in arrivals(num_workers, num_bins, order):
        name, g = workers[worker], gradients.of(worker, label)
        seqs[name] += 1
        answer = only_answer(played.push(name, seqs[name], base_bin[name], g))
        base_bin[name] = answer.bin
        yield label, g


# --- The identities.


@prop
@given(
    num_workers=st.integers(1, 6),
    num_bins=st.integers(1, 6),
    lr=rates,
    beta=momenta,
    order=orders,
    seed=st.integers(0, 9),
)
def test_any_arrival_order_ends_in_the_state_of_momentum_sgd(
    num_workers: int, num_bins: int, lr: float, beta: float, order: Random, seed: int
) -> None:
    """Whatever the order of arrival, w and u end as momentum SGD on the sums of each bin's K gradients ends."""
    played = asynchronous(num_workers, lr=lr, momentum=beta)
    gradients = LabelledGradients(num_workers, 100 * seed)
    for _ in play(played, num_workers, gradients, num_bins, order):
        pass
    steps = gradients.bin_sums(num_bins)
    steps += [torch.zeros(SIZE)] * (played.open_bin + 1 - num_bins)
    w, u = momentum_sgd(played.initial, steps, lr / num_workers, beta)
    assert_near(w, played.w)
    assert_near(u, played.u)


def test_arrival_orders_agree_where_plain_momentum_spreads() -> None:
    """Over 50 orders of the same gradients, ordered momentum ends in one state; momentum by arrival does not."""
    num_workers, num_bins, lr, beta = 4, 8, 0.7, 0.9
    gradients = LabelledGradients(num_workers, 0)
    ordered, plain = [], []
    for seed in range(50):
        order = Random(seed)  # not for secrets
        played = asynchronous(num_workers, lr=lr, momentum=beta)
        arrived = [g for _, g in play(played, num_workers, gradients, num_bins, order)]
        ordered.append(played.w.double())
        plain.append(momentum_sgd(played.initial, arrived, lr / num_workers, beta)[0])

    def spread(ends: list[torch.Tensor]) -> float:
        return float((torch.stack(ends).amax(0) - torch.stack(ends).amin(0)).max())

    assert spread(ordered) < 1e-4
    assert spread(plain) > 1.0


@prop
@given(num_workers=st.integers(1, 7), num_bins=st.integers(1, 6), lr=rates, beta=momenta, order=orders)
def test_the_shard_follows_the_printed_loop(
    num_workers: int, num_bins: int, lr: float, beta: float, order: Random
) -> None:
    """At every arrival, bins, lateness, w and u are those of the loop of section 1 with its ceil labels."""
    played = asynchronous(num_workers, lr=lr, momentum=beta)
    loop = PrintedLoop(played.initial, num_workers=num_workers, eta=lr / num_workers, beta=beta)
    for label, g in play(played, num_workers, LabelledGradients(num_workers, 0), num_bins, order):
        reply = loop.arrive(g, label)
        assert loop.c == played.open_bin
        assert loop.bin_of(label) == played.entered[-1].bin
        assert loop.bin_of(reply) == played.ledger.issuing_bin
        assert_near(loop.w, played.w)
        assert_near(loop.u, played.u)
        played.assert_closed_form()


@prop
@given(num_workers=st.integers(1, 8), num_bins=st.integers(1, 8), order=orders)
def test_every_bin_holds_exactly_quota_gradients(num_workers: int, num_bins: int, order: Random) -> None:
    """With K workers and quota K every bin gets K gradients, however unequal the workers' speeds."""
    played = asynchronous(num_workers, lr=1.0, momentum=0.5)
    for _ in play(played, num_workers, LabelledGradients(num_workers, 0), num_bins, order):
        pass
    assert dict.fromkeys(range(num_bins), num_workers) == Counter(entered.bin for entered in played.entered)


@pytest.mark.parametrize("look_ahead", [False, True])
@prop
@given(lr=rates, beta=momenta, num_steps=st.integers(1, 12), order=orders)
def test_one_worker_makes_ordinary_momentum_sgd(
    look_ahead: bool, lr: float, beta: float, num_steps: int, order: Random
) -> None:
    """K = 1 is momentum SGD, answer by answer, as torch.optim.SGD does it; Nesterov's where answers look ahead."""
    played = asynchronous(1, lr=lr, momentum=beta, look_ahead=look_ahead)
    theta = torch.nn.Parameter(played.initial.double())
    # torch keeps the rate outside of its momentum; with a constant rate that is the same.
    optimizer = torch.optim.SGD([theta], lr=lr, momentum=beta, nesterov=look_ahead and beta > 0)
    for label, g in play(played, 1, LabelledGradients(1, 0), num_steps, order):
        theta.grad = g.double()
        optimizer.step()
        assert label + look_ahead == played.open_bin
        assert_near(theta.detach(), played.w)


@prop
@given(num_workers=st.integers(1, 6), num_bins=st.integers(1, 5), lr=rates, order=orders)
def test_without_momentum_it_is_asynchronous_sgd(num_workers: int, num_bins: int, lr: float, order: Random) -> None:
    """With beta = 0 each arrival makes w -= eta g, whatever its lateness."""
    played = asynchronous(num_workers, lr=lr, momentum=0.0)
    w = played.initial.double()
    for _, g in play(played, num_workers, LabelledGradients(num_workers, 0), num_bins, order):
        w -= lr / num_workers * g.double()
        assert_near(w, played.w)


def barrier_rounds(
    played: PlayedFragment, num_workers: int, num_rounds: int, order: Random
) -> Iterator[tuple[torch.Tensor, int]]:
    """Play rounds in which everybody pushes, in random order; yields each round's mean and the bin it is answered."""
    base_bin = 0
    for number in range(num_rounds):
        round_gradients = [normal(SIZE, 50 * number + worker) for worker in range(num_workers)]
        arriving = list(zip(names(num_workers), round_gradients, strict=True))
        order.shuffle(arriving)
        decision = None
        for name, g in arriving:
            assert decision is None or not decision.answers
            decision = played.push(name, number + 1, base_bin, g)
        assert decision is not None
        assert set(names(num_workers)) == {answer.worker for answer in decision.answers}
        (base_bin,) = {answer.bin for answer in decision.answers}
        yield torch.stack(round_gradients).double().mean(0), base_bin


@prop
@given(num_workers=st.integers(1, 6), lr=rates, beta=momenta, order=orders, quota_is_set=st.booleans())
def test_a_barrier_that_opens_after_the_reply_is_polyak_momentum(
    num_workers: int, lr: float, beta: float, order: Random, quota_is_set: bool
) -> None:
    """Barrier without look-ahead: every reply is Polyak's momentum SGD on the means, as torch.optim.SGD does it."""
    schedule = Schedule(kind=BARRIER, quota=num_workers if quota_is_set else None)
    played = PlayedFragment(schedule, lr=lr, momentum=beta, workers=num_workers, size=SIZE)
    theta = torch.nn.Parameter(played.initial.double())
    optimizer = torch.optim.SGD([theta], lr=lr, momentum=beta)
    for number, (mean, base_bin) in enumerate(barrier_rounds(played, num_workers, 6, order)):
        theta.grad = mean
        optimizer.step()
        assert number + 1 == base_bin
        assert_near(theta.detach(), played.w)


@prop
@given(num_workers=st.integers(1, 6), lr=rates, beta=momenta, order=orders)
def test_a_barrier_that_looks_ahead_is_nesterov(num_workers: int, lr: float, beta: float, order: Random) -> None:
    """Barrier with look-ahead: every reply is what torch.optim.SGD(nesterov=True) makes of the means (DiLoCo)."""
    schedule = Schedule(kind=BARRIER, quota=num_workers, look_ahead=True)
    played = PlayedFragment(schedule, lr=lr, momentum=beta, workers=num_workers, size=SIZE)
    theta = torch.nn.Parameter(played.initial.double())
    optimizer = torch.optim.SGD([theta], lr=lr, momentum=beta, nesterov=beta > 0)
    for mean, _ in barrier_rounds(played, num_workers, 6, order):
        theta.grad = mean
        optimizer.step()
        assert_near(theta.detach(), played.w)


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("bins_late", [0, 1, 5, 40])
def test_a_gradient_moves_w_by_the_same_in_the_end_however_late(beta: float, bins_late: int) -> None:
    """The final displacement is eta / (1 - beta) for every lateness, and what is not made at once is in u."""
    rule, g = OrderedMomentum(rates=Rates(peak_lr=0.7, full_momentum=beta)), normal(SIZE, 1)
    w = torch.zeros(SIZE)
    numbers = Numbers(w=w, state={"u": torch.zeros(SIZE)})
    rule.apply(numbers, g.clone(), Contribution(bins_late=bins_late, share=0.25))
    eta = 0.7 * 0.25
    assert_near(-eta * (1 - beta ** (bins_late + 1)) / (1 - beta) * g.double(), w)
    for _ in range(400):
        rule.open_bin(numbers, bins_late + 1)
    assert_near(-eta / (1 - beta) * g.double(), w)


def test_the_worked_figure() -> None:
    """K = 4: with two pushes of the third bin in, u_10 = beta^2 (4 g) + beta (4 g) + (2 g)."""
    lr, beta, played = 0.4, 0.5, PlayedFragment(Schedule(kind=BARRIER, quota=4), lr=0.4, momentum=0.5, workers=4)
    for number in range(10):
        bin_number, worker = divmod(number, 4)
        played.push(names(4)[worker], bin_number + 1, bin_number)
    expected = lr / 4 * (beta**2 * 4 + beta * 4 + 2)
    assert_near(torch.full_like(played.u, expected), played.u)


def test_the_worked_figure_when_nobody_waits() -> None:
    """K = 4, asynchronous, in order: the tenth arrival opens bin 3 first, so everything stands one power further."""
    lr, beta, played = 0.4, 0.5, asynchronous(4, lr=0.4, momentum=0.5)
    one = torch.ones(SIZE)
    loop = PrintedLoop(played.initial, num_workers=4, eta=lr / 4, beta=beta)
    labels, bins = [0] * 4, [0] * 4
    for number in range(10):
        labels[number % 4] = loop.arrive(one, labels[number % 4])
        bins[number % 4] = only_answer(played.push(names(4)[number % 4], number // 4 + 1, bins[number % 4])).bin
    assert loop.c == played.open_bin == 3
    expected = lr / 4 * (beta**3 * 4 + beta**2 * 4 + beta * 2)
    assert_near(torch.full_like(played.u, expected), played.u)
    assert_near(loop.u, played.u)


# --- Membership that changes at random: each worker's newest seq and base bin, and what may happen next.

Workers = dict[str, tuple[int, int]]


def _join(played: PlayedFragment, workers: Workers, order: Random) -> None:
    name = f"worker-{len(workers)}"
    workers[name] = (0, played.ledger.issuing_bin)
    played.join(name)


def _leave(played: PlayedFragment, workers: Workers, order: Random) -> None:
    if len(played.active) > 1:
        played.leave(order.choice(sorted(played.active)))


def _push(played: PlayedFragment, workers: Workers, order: Random) -> None:
    """An active worker, or one that was just lost, pushes what it computed from its newest base."""
    waiting = played.ledger.waiting
    free = sorted(name for name in workers if name not in waiting)
    if not free:
        return
    name = order.choice(free)
    seq, base_bin = workers[name]
    workers[name] = (seq + 1, base_bin)
    decision = played.push(name, seq + 1, base_bin, normal(SIZE, order.randrange(1000)))
    for answer in decision.answers:
        workers[answer.worker] = (answer.seq, answer.bin)


def _close(played: PlayedFragment, workers: Workers, order: Random) -> None:
    played.now_s += order.choice([0.1, 1.0, 10.0])
    decision = played.close()
    for answer in decision.answers if decision is not None else ():
        workers[answer.worker] = (answer.seq, answer.bin)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    kind=st.sampled_from([ASYNC, BARRIER, QUORUM]),
    quota=st.none() | st.integers(1, 5),
    look_ahead=st.booleans(),
    beta=momenta,
    order=orders,
)
def test_the_closed_form_holds_while_workers_come_and_go(
    kind: ScheduleKind, quota: int | None, look_ahead: bool, beta: float, order: Random
) -> None:
    """Whoever joins, leaves, is lost, comes late or closes a bin: w and u are the closed form of what entered."""
    schedule = Schedule(
        kind=kind,
        quota=quota,
        quorum=min(2, quota or 2) if kind is QUORUM else None,
        look_ahead=look_ahead,
    )
    played = PlayedFragment(schedule, lr=0.5, momentum=beta, size=SIZE)
    workers: Workers = {}
    _join(played, workers, order)
    actions: list[Callable[[PlayedFragment, Workers, Random], None]] = [*[_push] * 6, _join, _leave, _close]
    for _ in range(60):
        order.choice(actions)(played, workers, order)
        played.assert_closed_form()
    assert played.entered
