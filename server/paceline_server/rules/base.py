"""What an outer rule is: a few vectors of state beside the parameters, and what a push and a new bin do to them.

A rule never sees a worker, a clock or a socket. The ledger decides which bin a push belongs to and how much of the
learning rate it has; the rule turns that into numbers. It is called with pieces of a fragment (views, changed in
place), so it must treat all elements alike and keep nothing of its own between calls.

Every operation rounds once, to float32, without fused multiply-add, so that a compiled kernel can give the same bits.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch

from paceline_server.rules.rates import Rates


@dataclass(frozen=True, kw_only=True)
class Contribution:
    """What the schedule decided about one push.

    Attributes:
        bins_late: Bins opened since the one that the push belongs to (d).
        share: The push's part of the learning rate: 1 / quota, so that a full bin makes one step of the mean; more or
            less by its tokens, and less if it is very late.
        bin: The bin that it belongs to (b); bin + bins_late is open.
        place: Its place among the quota's pushes in the order of arrival, from 0.
        quota: Pushes that make a turn; also the workers that share a bin.
    """

    bins_late: int
    share: float
    bin: int = 0
    place: int = 0
    quota: int = 1

    @property
    def completes_turn(self) -> bool:
        """Whether this is the last of the quota's pushes in the order of arrival."""
        return self.place + 1 >= self.quota


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """Views of a piece of a fragment, to be changed in place.

    Attributes:
        w: The parameters, float32 [n].
        state: The rule's own vectors by name, float32 [n] each, zero at the beginning.
    """

    w: torch.Tensor
    state: Mapping[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class RuleSettings:
    """What the configuration says that rules may need.

    Attributes:
        rates: Learning rate and momentum coefficient by bin.
        inner_steps: Inner steps in a round (H).
    """

    rates: Rates
    inner_steps: int


@dataclass(frozen=True, kw_only=True)
class OuterRule(ABC):
    """Base of all rules; a subclass needs `apply`, and what else differs.

    Attributes:
        rates: Learning rate and momentum coefficient by bin.
        state: Names of the vectors that the rule keeps of each fragment (4 bytes per parameter each).
        momentum_vector: The one of them that points where the parameters are going, for corrections of direction and
            workers' predictions; None: the rule has none.
        local_momentum: Whether workers push their local momentum too; `apply` then gets both, float32 [2, n].
    """

    rates: Rates
    state: ClassVar[tuple[str, ...]] = ()
    momentum_vector: ClassVar[str | None] = None
    local_momentum: ClassVar[bool] = False

    @classmethod
    def of(cls, settings: RuleSettings) -> Self:
        """The rule as configured."""
        return cls(rates=settings.rates)

    @abstractmethod
    def apply(self, numbers: Numbers, g: torch.Tensor, push: Contribution) -> None:
        """Let a push (float32 [n], may be overwritten) enter."""

    def open_bin(self, numbers: Numbers, bin: int) -> None:  # noqa: A002, B027  # most rules know no bins
        """Do what the beginning of a bin brings."""

    def published(self, numbers: Numbers, newest: Contribution | None) -> torch.Tensor:
        """What workers are sent (float32 [n]); newest is the last push that entered, None before the first."""
        return numbers.w
