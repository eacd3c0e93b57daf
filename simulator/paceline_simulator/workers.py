"""What a simulated worker is like: its speed, its link, and when it is there."""

import math
from dataclasses import dataclass
from enum import Enum

from paceline_wire.errors import InvalidInputError


class Manner(Enum):
    """How a worker is absent."""

    VANISH = "vanish"
    """It dies without a word: what is in flight is lost, and its lease runs out. It comes back as a new process."""
    LEAVE = "leave"
    """It leaves at once, without a last push; what is in flight is lost. It comes back as a new process."""
    STALL = "stall"
    """It freezes: what it has sent arrives, its lease may run out, and it goes on later where it was."""


@dataclass(frozen=True, kw_only=True)
class Absence:
    """A time without a worker.

    Attributes:
        from_s: When it begins, seconds of virtual time.
        to_s: When it ends; infinite if never.
        manner: How it is absent.
    """

    from_s: float
    to_s: float = math.inf
    manner: Manner = Manner.VANISH

    def __post_init__(self) -> None:
        if not self.from_s < self.to_s:
            raise InvalidInputError(f"an absence from {self.from_s:g} s to {self.to_s:g} s has no length")


@dataclass(frozen=True, kw_only=True)
class WorkerSpec:
    """One worker of a simulation.

    Attributes:
        step_s: Seconds of virtual time that an inner step takes.
        jitter: Sigma of the lognormal factor, of mean 1, that is drawn for every round's steps.
        delay_s: One-way delay of its link.
        uplink_bytes_per_s: Rate towards the server; transfers follow each other.
        downlink_bytes_per_s: Rate from the server; likewise.
        joins_s: When it joins.
        absences: When it is away; in order, without overlap.
        name: Its name in the run; None: "worker-" and its number.
    """

    step_s: float
    jitter: float = 0.0
    delay_s: float = 0.0
    uplink_bytes_per_s: float = math.inf
    downlink_bytes_per_s: float = math.inf
    joins_s: float = 0.0
    absences: tuple[Absence, ...] = ()
    name: str | None = None

    def __post_init__(self) -> None:
        if not (self.step_s > 0 and math.isfinite(self.step_s)):
            raise InvalidInputError(f"inner steps of {self.step_s} s cannot be simulated; they must take some time")
        if min(self.jitter, self.delay_s, self.joins_s) < 0:
            raise InvalidInputError("jitter, delay_s and joins_s must not be negative")
        if min(self.uplink_bytes_per_s, self.downlink_bytes_per_s) <= 0:
            raise InvalidInputError("a link's rates must be positive")
        ends = [self.joins_s, *(absence.to_s for absence in self.absences)]
        if any(absence.from_s <= end for absence, end in zip(self.absences, ends, strict=False)):
            raise InvalidInputError("absences must be in order, without overlap, and after the worker has joined")


class Link:
    """One direction of a worker's link: transfers queue up behind each other, then take the delay.

    Args:
        bytes_per_s: Its rate.
        delay_s: Its one-way delay.
    """

    def __init__(self, bytes_per_s: float, delay_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._delay_s = delay_s
        self._free_s = 0.0

    def arrival_s(self, now_s: float, num_bytes: int) -> float:
        """When the last byte arrives of a message that is handed over now."""
        self._free_s = max(now_s, self._free_s) + num_bytes / self._bytes_per_s
        return self._free_s + self._delay_s
