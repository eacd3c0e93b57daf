"""How long each worker may be silent, by the history of its own heartbeats. Pure: time is an argument."""

from dataclasses import dataclass

from paceline_wire.liveness import Gaps

HEARTBEATS_PER_LEASE = 15
"""Enough of them that a worker's history counts before its first lease could run out."""

SHORTEST_HEARTBEAT_S, LONGEST_HEARTBEAT_S = 0.2, 2.0
"""What a shard asks for, whatever the lease: a thousand workers at two seconds are 500 small calls a second."""

LOST_HEARTBEATS = 3
"""Heartbeats that may be missing however regular they are, and in the shortest lease."""

SHORTEST_SILENCE_S = 1.0
"""Allowed even where heartbeats are asked for more often: any busy machine holds a process up for so long."""

_SILENCE_AGAIN = 1.5
"""A worker that came back after a silence may be silent for so much longer the next time."""


def heartbeat_interval_s(lease_s: float) -> float:
    """Seconds between the heartbeats that workers are asked for."""
    wanted_s = min(max(lease_s / HEARTBEATS_PER_LEASE, SHORTEST_HEARTBEAT_S), LONGEST_HEARTBEAT_S)
    return min(wanted_s, lease_s / LOST_HEARTBEATS)


@dataclass
class _History:
    incarnation: int
    gaps: Gaps
    heard_s: float
    allowed_s: float
    survived_s: float = 0.0


class Silences:
    """The histories of workers, of those too that were given up and may come back.

    Args:
        lease_s: Seconds of silence that are never exceeded, and allowed until a worker's history counts.
    """

    def __init__(self, lease_s: float) -> None:
        self.lease_s = lease_s
        self.heartbeat_s = heartbeat_interval_s(lease_s)
        self.shortest_s = min(max(LOST_HEARTBEATS * self.heartbeat_s, SHORTEST_SILENCE_S), lease_s)
        self._histories: dict[str, _History] = {}

    def allowed_s(self, worker: str) -> float:
        """Seconds of silence after which a worker is given up."""
        history = self._histories.get(worker)
        return self.lease_s if history is None else history.allowed_s

    def begin(self, now: float, worker: str, incarnation: int) -> None:
        """Begin a worker's history, or go on with that of the same incarnation, which was given up and is back."""
        history = self._histories.get(worker)
        if history is None or history.incarnation != incarnation:
            gaps = Gaps(floor_s=self.shortest_s, longest_s=self.lease_s)
            self._histories[worker] = _History(incarnation, gaps, now, self.lease_s)
            return
        # One gap among many would be an outlier, and the worker be given up again and again.
        history.survived_s = max(history.survived_s, _SILENCE_AGAIN * (now - history.heard_s))
        self.heartbeat(now, worker)

    def heartbeat(self, now: float, worker: str) -> None:
        """Note a heartbeat of a worker whose history has begun."""
        history = self._histories[worker]
        history.gaps.observe(max(now - history.heard_s, 0.0))
        history.heard_s = max(now, history.heard_s)
        history.allowed_s = min(self.lease_s, max(history.gaps.allowed_s, history.survived_s))

    def forget(self, worker: str) -> None:
        """Forget a worker's history."""
        self._histories.pop(worker, None)
