"""Outer rules for tests: a fragment played under any rule, and the rules' formulas written once more, in float64.

The references know arrivals and nothing else: no bins but their own, no shares, no pieces, no product code.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

import torch

from paceline_server.fragment import FragmentValues
from paceline_server.ledger import Decision, Ledger, PushRequest, Schedule, ScheduleKind, decide_push
from paceline_server.rules import Contribution, OuterRule
from paceline_server.rules.heloco import DirectionCorrection
from support_core import ASYNC, PlayedFragment, names, normal, only_answer

PARTICIPATION = ScheduleKind.PARTICIPATION


class PlayedRule(PlayedFragment):
    """A fragment under any rule, whose pushes may say how many tokens they stand for."""

    def __init__(
        self,
        schedule: Schedule,
        rule: OuterRule,
        *,
        workers: int | tuple[str, ...] = (),
        initial: torch.Tensor | None = None,
        size: int = 3,
        correction: DirectionCorrection | None = None,
        tensor_bounds: Sequence[tuple[int, int]] = (),
    ) -> None:
        rates = rule.rates
        super().__init__(
            schedule, lr=rates.peak_lr, momentum=rates.full_momentum, workers=workers, initial=initial, size=size
        )
        self.numbers = FragmentValues(
            self.initial.clone(), rule, correction=correction, tensor_bounds=tensor_bounds or [(0, len(self.initial))]
        )
        self.contributions: list[Contribution] = []

    def push(
        self,
        worker: str,
        seq: int,
        base_bin: int,
        gradient: torch.Tensor | None = None,
        *,
        incarnation: int = 1,
        problem: str | None = None,
        tokens: int | None = None,
    ) -> Decision:
        """Let a push arrive; without a gradient it is one of ones."""
        request = PushRequest(
            worker=worker, incarnation=incarnation, seq=seq, base_bin=base_bin, problem=problem, tokens=tokens
        )
        decision, ledger = decide_push(self.schedule, self.ledger, self.now_s, self.roster, request)
        self._follow(decision, ledger, torch.ones_like(self.initial) if gradient is None else gradient)
        return decision

    def _follow(self, decision: Decision, ledger: Ledger, gradient: torch.Tensor | None) -> None:
        super()._follow(decision, ledger, gradient)
        if decision.contribution is not None:
            self.contributions.append(decision.contribution)


@dataclass(frozen=True)
class Arrival:
    """One push under the asynchronous schedule with K workers: the label of its parameters, and who pushes.

    Attributes:
        t: Counts arrivals from 0.
        worker: Who pushes.
        label: The label of the parameters that it was computed at.
        bin: That label's bin, ceil(label / K).
    """

    t: int
    worker: int
    label: int
    bin: int


def asynchronous_arrivals(num_workers: int, order: Random, *, num_bins: int) -> Iterator[Arrival]:
    """Arrivals in a random order, in which all the gradients of num_bins bins arrive."""
    labels = dict.fromkeys(range(num_workers), 0)
    last_label = (num_bins - 1) * num_workers
    for t in range(num_workers * num_bins):
        worker = order.choice([worker for worker, label in labels.items() if label <= last_label])
        yield Arrival(t, worker, labels[worker], math.ceil(labels[worker] / num_workers))
        labels[worker] = t + 1


class AsynchronousWorkers:
    """Workers of a played fragment that remember their bins and count their pushes."""

    def __init__(self, played: PlayedRule, num_workers: int) -> None:
        self._played = played
        self._names = names(num_workers)
        self._seqs = [0] * num_workers
        self._bins = [0] * num_workers

    def push(self, worker: int, gradient: torch.Tensor, *, tokens: int | None = None) -> Decision:
        """Let a worker push what it computed at the newest parameters it was sent."""
        self._seqs[worker] += 1
        decision = self._played.push(
            self._names[worker], self._seqs[worker], self._bins[worker], gradient, tokens=tokens
        )
        self._bins[worker] = only_answer(decision).bin
        return decision


def asynchronous(rule: OuterRule, num_workers: int, *, size: int = 3, late_bins: int | None = None) -> PlayedRule:
    """A fragment under the asynchronous schedule with quota K."""
    schedule = Schedule(kind=ASYNC, quota=num_workers, late_bins=late_bins)
    return PlayedRule(schedule, rule, workers=num_workers, size=size)


class Reference:
    """A rule as algorithms.md writes it; one `arrive` is one arrival."""

    def __init__(self, w: torch.Tensor, *, num_workers: int, lr: float, beta: float) -> None:
        self.w = w.double().clone()
        self.num_workers, self.lr, self.beta = num_workers, lr, beta
        self.eta = lr / num_workers
        self.m = torch.zeros_like(self.w)

    def arrive(self, g: torch.Tensor, arrival: Arrival) -> None:
        """Let a gradient (float64 [n]) arrive."""
        raise NotImplementedError

    def sent(self) -> torch.Tensor:
        """What the worker is sent."""
        return self.w


class SgdReference(Reference):
    """W -= eta g."""

    def arrive(self, g: torch.Tensor, arrival: Arrival) -> None:
        """One arrival."""
        self.w = self.w - self.eta * g


class MomentumReference(Reference):
    """U = beta u + eta g ; w -= u."""

    def arrive(self, g: torch.Tensor, arrival: Arrival) -> None:
        """One arrival."""
        self.m = self.beta * self.m + self.eta * g
        self.w = self.w - self.m


class NesterovReference(Reference):
    """V = beta v + D ; theta -= eta (D + beta v), as torch.optim.SGD(nesterov=True) does."""

    def arrive(self, g: torch.Tensor, arrival: Arrival) -> None:
        """One arrival."""
        self.m = self.beta * self.m + g
        self.w = self.w - self.eta * (g + self.beta * self.m)


class DelayedNesterovReference(Reference):
    """S += g ; every N-th push m = beta m + S/N ; w -= lr (beta m + g/N) ; S = 0, else w -= lr g/N."""

    def __init__(self, w: torch.Tensor, *, num_workers: int, lr: float, beta: float) -> None:
        super().__init__(w, num_workers=num_workers, lr=lr, beta=beta)
        self.total = torch.zeros_like(self.w)

    def arrive(self, g: torch.Tensor, arrival: Arrival) -> None:
        """One arrival."""
        n = self.num_workers
        self.total = self.total + g
        if (arrival.t + 1) % n == 0:
            self.m = self.beta * self.m + self.total / n
            self.w = self.w - self.lr * (self.beta * self.m + g / n)
            self.total = torch.zeros_like(self.total)
        else:
            self.w = self.w - self.lr * g / n


class Smega2Reference(Reference):
    """S = (s+1) mod K ; G += g ; w -= eta (g + beta m) ; at s = 0 m = beta m + G/K, G = 0."""

    def __init__(self, w: torch.Tensor, *, num_workers: int, lr: float, beta: float) -> None:
        super().__init__(w, num_workers=num_workers, lr=lr, beta=beta)
        self.s, self.total = 0, torch.zeros_like(self.w)

    def arrive(self, g: torch.Tensor, arrival: Arrival) -> None:
        """One arrival."""
        self.s = (self.s + 1) % self.num_workers
        self.total = self.total + g
        self.w = self.w - self.eta * (g + self.beta * self.m)
        if self.s == 0:
            self.m = self.beta * self.m + self.total / self.num_workers
            self.total = torch.zeros_like(self.total)

    def sent(self) -> torch.Tensor:
        """W - eta beta ((s/K) G + (K + s (beta - 1)) m)."""
        k, s = self.num_workers, self.s
        return self.w - self.eta * self.beta * ((s / k) * self.total + (k + s * (self.beta - 1)) * self.m)


class MomentumLookAheadReference(Reference):
    """M = beta m + (1 - beta) D ; w -= eta (beta m + D)."""

    def arrive(self, g: torch.Tensor, arrival: Arrival) -> None:
        """One arrival."""
        self.m = self.beta * self.m + (1 - self.beta) * g
        self.w = self.w - self.eta * (self.beta * self.m + g)


class OrderedMomentumReference(Reference):
    """Section 1's loop with its ceil; late_bins: the part min(1, late_bins / d) of a push that is d bins late."""

    late_bins: float = math.inf

    def __init__(self, w: torch.Tensor, *, num_workers: int, lr: float, beta: float) -> None:
        super().__init__(w, num_workers=num_workers, lr=lr, beta=beta)
        self.c = 0

    def arrive(self, g: torch.Tensor, arrival: Arrival) -> None:
        """One arrival."""
        beta = self.beta
        if math.ceil(arrival.t / self.num_workers) > self.c:
            self.w = self.w - beta * self.m
            self.m = beta * self.m
            self.c += 1
        d = self.c - arrival.bin
        eta = self.eta * min(1.0, self.late_bins / d if d else 1.0)
        self.m = self.m + eta * beta**d * g
        self.w = self.w - eta * (1 - beta ** (d + 1)) / (1 - beta) * g


class DelayAdaptiveReference(OrderedMomentumReference):
    """The same with min(1, 2 K / tau), tau pushes late, counted in bins."""

    late_bins = 2


REFERENCES: dict[str, type[Reference]] = {
    "sgd": SgdReference,
    "momentum": MomentumReference,
    "nesterov": NesterovReference,
    "delayed-nesterov": DelayedNesterovReference,
    "smega2": Smega2Reference,
    "mla": MomentumLookAheadReference,
    "ormo": OrderedMomentumReference,
    "ormo-da": DelayAdaptiveReference,
}
"""References by the name of the rule; orlomo has its own tests."""


class LocalMomentumWorker:
    """A worker's round under OrLoMo: p = beta p + eta g ; q += p, from p = q = 0."""

    def __init__(self, *, eta: float, beta: float) -> None:
        self._eta, self._beta = eta, beta

    def round(self, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
        """Make one step for each gradient; returns q and p behind each other (float32 [2 n])."""
        p = torch.zeros_like(gradients[0], dtype=torch.float64)
        q = torch.zeros_like(p)
        for g in gradients:
            p = self._beta * p + self._eta * g.double()
            q = q + p
        return torch.cat((q, p)).float()


def gradients_of_round(bin_number: int, place: int, steps: int, size: int = 3) -> list[torch.Tensor]:
    """The gradients of one worker's inner steps, the same for the same bin and place in it."""
    return [normal(size, 10_000 * bin_number + 100 * place + step) for step in range(steps)]
