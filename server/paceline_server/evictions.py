"""Workers that an operator keeps out of the run, for a time or until they are admitted again.

A name stands for all whose names begin with it and a dot, too: a credential may act under all of these.

Pure: time is an argument, nothing waits.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from paceline_wire.errors import EvictedError


@dataclass(frozen=True, kw_only=True)
class EvictedWorker:
    """One worker that is kept out.

    Attributes:
        worker: Its name.
        reason: Why, as the operator said it; empty: not said.
        remaining_s: Seconds until it may join again; None: not until it is admitted.
    """

    worker: str
    reason: str
    remaining_s: float | None = None


class Evictions:
    """Who is kept out by an operator."""

    def __init__(self) -> None:
        self._evicted: dict[str, EvictedWorker] = {}
        self._until_s: dict[str, float] = {}

    def begin(self, now: float, worker: str, reason: str, duration_s: float | None) -> bool:
        """Keep a worker out from now on; whether it was kept out already."""
        was_evicted = self.holds(now, worker)
        self._evicted[worker] = EvictedWorker(worker=worker, reason=reason)
        self._until_s.pop(worker, None)
        if duration_s is not None:
            self._until_s[worker] = now + duration_s
        return was_evicted

    def end(self, now: float, worker: str) -> bool:
        """Let a worker in again; whether it was kept out."""
        was_evicted = self.holds(now, worker)
        self._evicted.pop(worker, None)
        self._until_s.pop(worker, None)
        return was_evicted

    def holds(self, now: float, worker: str) -> bool:
        """Whether a name is kept out."""
        return worker in self._evicted and now < self._until_s.get(worker, float("inf"))

    def wider(self, now: float, worker: str) -> str | None:
        """The evicted name that is not a worker's own and stands for it; None: there is none."""
        return next((name for name in _names_for(worker)[1:] if self.holds(now, name)), None)

    def refuse(self, now: float, worker: str) -> None:
        """Turn a worker away that is kept out.

        Raises:
            EvictedError: It is; the text says why and for how long.
        """
        evicted = next((name for name in _names_for(worker) if self.holds(now, name)), None)
        if evicted is None:
            return
        reason = self._evicted[evicted].reason
        until_s = self._until_s.get(evicted)
        raise EvictedError(
            f"worker {worker!r} was evicted by the run's operator"
            + (f" ({reason})" if reason else "")
            + (" and is refused until it is admitted again" if until_s is None else f" for {until_s - now:.0f} s more")
        )

    def workers(self, now: float) -> tuple[EvictedWorker, ...]:
        """All that are kept out."""
        return tuple(
            replace(held, remaining_s=self._until_s[worker] - now if worker in self._until_s else None)
            for worker, held in self._evicted.items()
            if self.holds(now, worker)
        )

    def restore(self, now: float, workers: Iterable[EvictedWorker]) -> None:
        """Take up who was kept out; time while the shard was down does not count."""
        held = list(workers)
        self._evicted = {each.worker: replace(each, remaining_s=None) for each in held}
        self._until_s = {each.worker: now + each.remaining_s for each in held if each.remaining_s is not None}

    def release_due(self, now: float) -> list[str]:
        """Forget the evictions that are over; returns a sentence for each."""
        over = [worker for worker, until_s in self._until_s.items() if now >= until_s]
        for worker in over:
            del self._until_s[worker], self._evicted[worker]
        return [f"the eviction of worker {worker} is over; it may join again" for worker in over]


def stands_for(name: str, worker: str) -> bool:
    """Whether evicting a name concerns a worker."""
    return name in _names_for(worker)


def _names_for(worker: str) -> list[str]:
    """The names whose eviction concerns a worker: its own, and those that it begins with before a dot."""
    parts = worker.split(".")
    return [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
