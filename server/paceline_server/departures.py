"""Workers that are gone, and for how long a shard remembers them. Pure: time is an argument, nothing waits.

Workers without a fixed name come under a new one at every start, so whatever is kept by name would grow for ever.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

REMEMBERED_S = 7 * 24 * 3600.0
"""A week: a worker that was cut off for that long must be started anew."""

LEDGERS_REMEMBER_LEFT_S = 15 * 60.0
"""What a worker that left had pushed is of no use to it any more, but to one that goes on from its saved state."""

MOST_REMEMBERED = 4096
"""Gone workers that are remembered at most; beyond that, those that went first are forgotten."""


@dataclass(frozen=True, kw_only=True)
class GoneWorker:
    """A worker that is no longer a member.

    Attributes:
        worker: Its name.
        incarnation: The incarnation that went.
        gone_s: When, in seconds of the caller's clock; where a state is remembered, for how many seconds it is gone.
        left: Whether it left; otherwise it was given up, and may come back.
    """

    worker: str
    incarnation: int
    gone_s: float
    left: bool


class Departures:
    """The workers that are gone, in the order in which they went."""

    def __init__(self) -> None:
        self._gone: dict[str, GoneWorker] = {}

    def add(self, now: float, worker: str, incarnation: int, *, left: bool) -> None:
        """Note that a worker is gone."""
        self._gone.pop(worker, None)
        self._gone[worker] = GoneWorker(worker=worker, incarnation=incarnation, gone_s=now, left=left)

    def returned(self, worker: str) -> None:
        """Note that a worker is back."""
        self._gone.pop(worker, None)

    def has_left(self, worker: str, incarnation: int) -> bool:
        """Whether an incarnation has left, which is for good."""
        gone = self._gone.get(worker)
        return gone is not None and gone.left and gone.incarnation == incarnation

    def is_gone(self, worker: str, incarnation: int) -> bool:
        """Whether an incarnation is gone and remembered."""
        gone = self._gone.get(worker)
        return gone is not None and gone.incarnation == incarnation

    def forget_due(self, now: float) -> list[str]:
        """Forget those that have been gone for too long, or are too many; returns their names."""
        forgotten = []
        for gone in list(self._gone.values()):
            if len(self._gone) <= MOST_REMEMBERED and now < gone.gone_s + REMEMBERED_S:
                break
            del self._gone[gone.worker]
            forgotten.append(gone.worker)
        return forgotten

    def in_ledgers(self, now: float) -> frozenset[str]:
        """Names of those whose pushes must still be known, so that what is sent again is not applied again."""
        return frozenset(
            gone.worker for gone in self._gone.values() if not gone.left or now < gone.gone_s + LEDGERS_REMEMBER_LEFT_S
        )

    def state(self, now: float) -> tuple[GoneWorker, ...]:
        """All of them, with the seconds since they went."""
        return tuple(replace(gone, gone_s=now - gone.gone_s) for gone in self._gone.values())

    def restore(self, now: float, workers: Iterable[GoneWorker]) -> None:
        """Take up a remembered state; time while the shard was down does not count."""
        self._gone = {gone.worker: replace(gone, gone_s=now - gone.gone_s) for gone in workers}
