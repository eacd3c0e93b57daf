"""Plays workers against the pure core of a shard: one fragment's ledger and numbers, without sockets or a clock."""

from dataclasses import dataclass

import pytest
import torch

from paceline.place import Place
from paceline_server.fragment import FragmentValues
from paceline_server.ledger import (
    Answer,
    Decision,
    Ledger,
    PushRequest,
    Roster,
    Schedule,
    ScheduleKind,
    decide_close,
    decide_push,
)
from paceline_server.rules.ordered_momentum import OrderedMomentum
from paceline_server.rules.rates import Rates
from paceline_wire import codecs

EXACT = codecs.codec("fp32")

ACCELERATOR = torch.device(torch.accelerator.current_accelerator() or "cuda").type
"""The GPU that torch sees here; without one "cuda", for tests that `needs_gpu` skips."""

needs_gpu = pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs a GPU")

DEVICES = ("cpu", pytest.param(ACCELERATOR, marks=needs_gpu))
"""Parameters of tests that hold on every device."""


@dataclass(frozen=True)
class Where:
    """Where a model is, and whether the exchange works on its numbers on the host all the same."""

    device: str
    on_host: bool = False

    @property
    def place(self) -> Place:
        """Where the exchange works on them."""
        return Place(torch.device(self.device), on_host=self.on_host)


PLACES = (
    pytest.param(Where("cpu"), id="cpu"),
    pytest.param(Where(ACCELERATOR), marks=needs_gpu, id="gpu"),
    pytest.param(Where(ACCELERATOR, on_host=True), marks=needs_gpu, id="gpu-host"),
)
"""Parameters of tests that hold wherever a model is and the exchange works on it."""

ASYNC, QUORUM, BARRIER = ScheduleKind.ASYNC, ScheduleKind.QUORUM, ScheduleKind.BARRIER


def normal(size: int, seed: int) -> torch.Tensor:
    """Return normally distributed float32 [size], the same for the same seed."""
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def assert_near(expected: torch.Tensor, actual: torch.Tensor, tolerance: float = 2e-5) -> None:
    """Compare in float64, relative to the largest expected number (at least 1): the measure of float32's rounding."""
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0.0, atol=tolerance * scale)


@dataclass(frozen=True)
class Entered:
    """A gradient (float64 [n]) that entered, as its decision said: in which bin, and at which learning rate."""

    bin: int
    eta: float
    gradient: torch.Tensor


class PlayedFragment:
    """One fragment of a shard, with a clock and a roster that the test plays.

    Every decision is followed at once, and checked for what must hold of all: the numbers are never in a later bin than
    the ledger says, a lateness is never negative, and there is a reason.
    """

    def __init__(
        self,
        schedule: Schedule,
        *,
        lr: float,
        momentum: float,
        workers: int | tuple[str, ...] = (),
        initial: torch.Tensor | None = None,
        size: int = 3,
    ) -> None:
        self.schedule = schedule
        self.lr, self.momentum = lr, momentum
        self.initial = normal(size, 7) if initial is None else initial.clone()
        self.numbers = FragmentValues(
            self.initial.clone(), OrderedMomentum(rates=Rates(peak_lr=lr, full_momentum=momentum))
        )
        self.ledger = Ledger()
        self.now_s = 0.0
        self.active: set[str] = set()
        self.most_active = 0
        self.entered: list[Entered] = []
        self.open_bin = 0
        self.join(*(names(workers) if isinstance(workers, int) else workers))

    @property
    def w(self) -> torch.Tensor:
        """The parameters."""
        return self.numbers.w

    @property
    def u(self) -> torch.Tensor:
        """The momentum."""
        return self.numbers.state["u"]

    @property
    def roster(self) -> Roster:
        """Who counts now."""
        return Roster(active=frozenset(self.active), most_active=self.most_active)

    def join(self, *workers: str) -> None:
        """Make workers active."""
        self.active |= set(workers)
        self.most_active = max(self.most_active, len(self.active))

    def leave(self, *workers: str) -> None:
        """Make workers inactive, whether they left or were lost."""
        self.active -= set(workers)

    def push(
        self,
        worker: str,
        seq: int,
        base_bin: int,
        gradient: torch.Tensor | None = None,
        *,
        incarnation: int = 1,
        problem: str | None = None,
    ) -> Decision:
        """Let a push arrive; without a gradient it is one of ones."""
        request = PushRequest(worker=worker, incarnation=incarnation, seq=seq, base_bin=base_bin, problem=problem)
        decision, ledger = decide_push(self.schedule, self.ledger, self.now_s, self.roster, request)
        self._follow(decision, ledger, torch.ones_like(self.initial) if gradient is None else gradient)
        return decision

    def close(self) -> Decision | None:
        """Let the shard look whether the bin closes."""
        decided = decide_close(self.schedule, self.ledger, self.now_s, self.roster)
        if decided is None:
            return None
        self._follow(*decided, gradient=None)
        return decided[0]

    def closed_form(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (w, u) in float64 from the gradients that entered, by the closed form of algorithms.md section 1."""
        beta, c = self.momentum, self.open_bin
        w, u = self.initial.double(), torch.zeros_like(self.initial, dtype=torch.float64)
        for entered in self.entered:
            late = c - entered.bin
            u += entered.eta * beta**late * entered.gradient
            w -= entered.eta * (1 - beta ** (late + 1)) / (1 - beta) * entered.gradient
        return w, u

    def assert_closed_form(self) -> None:
        """Compare the numbers with the closed form."""
        w, u = self.closed_form()
        assert_near(w, self.w)
        assert_near(u, self.u)

    def _follow(self, decision: Decision, ledger: Ledger, gradient: torch.Tensor | None) -> None:
        assert decision.reason
        assert decision.bins_opened_before >= 0
        assert decision.bins_opened_after >= 0
        contribution = decision.contribution
        if contribution is None or gradient is None:
            assert contribution is None
            self.numbers.follow(decision)
        else:
            assert contribution.bins_late >= 0
            self.numbers.follow(decision, EXACT, codecs.encode(EXACT, gradient))
            self.entered.append(
                Entered(
                    bin=self.open_bin + decision.bins_opened_before - contribution.bins_late,
                    eta=self.lr * contribution.share,
                    gradient=gradient.double(),
                )
            )
        self.open_bin += decision.bins_opened_before + decision.bins_opened_after
        self.ledger = ledger
        assert self.open_bin == ledger.open_bin <= ledger.issuing_bin


def names(count: int) -> tuple[str, ...]:
    """Return the names of that many workers."""
    return tuple(f"worker-{number}" for number in range(count))


def only_answer(decision: Decision) -> Answer:
    """Return the answer of a decision that gives exactly one."""
    (answer,) = decision.answers
    return answer
