"""The virtual clock: what happens next, in an order that is the same every time."""

import heapq
from collections.abc import Callable
from enum import IntEnum
from itertools import count


class Priority(IntEnum):
    """What comes first of what happens at the same moment."""

    MEMBERSHIP = 0
    """Workers come, go and freeze."""
    PUSH = 1
    """A push arrives at the server, or a grace window passes."""
    UPDATE = 2
    """An answer arrives at a worker."""
    ADOPTION = 3
    """A worker takes a new start, between two inner steps."""
    ROUND_END = 4
    """A worker has done the last inner step of a round."""
    EVALUATION = 5
    """The parameters are looked at."""


class EventQueue:
    """Events in order of (time, priority, order in which they were put)."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._events: list[tuple[float, Priority, int, Callable[[], None]]] = []
        self._numbers = count()

    def put(self, time_s: float, priority: Priority, action: Callable[[], None]) -> None:
        """Let something happen at a time that is not before now."""
        heapq.heappush(self._events, (time_s, priority, next(self._numbers), action))

    @property
    def next_s(self) -> float | None:
        """When the next event happens; None if nothing is left to happen."""
        return self._events[0][0] if self._events else None

    def step(self) -> None:
        """Let the next event happen."""
        self.now_s, _, _, action = heapq.heappop(self._events)
        action()
