"""When a connection counts as dead: heartbeats are not answered, and nothing else moves either. Pure.

A heartbeat is lost when its answer takes longer than this connection's round trips make likely. On a link that is
busy with an upload it waits its turn, so a lost heartbeat says nothing while messages come or go; and it says nothing
while a message is under way that may need so long on a slow link.
"""

from paceline_wire.liveness import Gaps

LOST_HEARTBEATS = 2
"""Heartbeats lost in a row, with nothing moving, that make a connection count as dead: one may be an accident."""

SHORTEST_DEADLINE_S = 3.0
"""Seconds that a heartbeat always gets: a garbage collection, a busy machine or a resent packet takes that long."""

SLOWEST_BYTES_PER_S = 16 * 1024
"""The slowest link that is never cut: a message of so many bytes may keep everything else waiting for a second."""


class Silence:
    """What a connection has carried, as far as it says whether it is alive.

    Args:
        longest_deadline_s: Seconds that a heartbeat gets at most, and until the round trips are known.
    """

    def __init__(self, longest_deadline_s: float) -> None:
        self.lost_heartbeats = 0
        self._round_trips = Gaps(floor_s=SHORTEST_DEADLINE_S, longest_s=longest_deadline_s)
        self._lost_in_a_row = 0
        self._moved_s = 0.0
        self._under_way_bytes = 0

    @property
    def deadline_s(self) -> float:
        """Seconds that the next heartbeat gets."""
        return self._round_trips.allowed_s

    def begin_message(self, now: float, num_bytes: int) -> None:
        """Note that a message is being written."""
        self._moved_s, self._under_way_bytes = now, num_bytes

    def moved(self, now: float) -> None:
        """Note that a message was written or received."""
        self._moved_s, self._under_way_bytes = now, 0

    def answered(self, took_s: float) -> None:
        """Note the answer to a heartbeat."""
        self._round_trips.observe(took_s)
        self._lost_in_a_row = 0

    def lost(self, now: float, sent_s: float) -> bool:
        """Note that a heartbeat sent at sent_s was not answered in time; returns whether the connection is dead."""
        self.lost_heartbeats += 1
        if now < self._moved_s + self._under_way_bytes / SLOWEST_BYTES_PER_S or self._moved_s > sent_s:
            self._lost_in_a_row = 0
            return False
        self._lost_in_a_row += 1
        return self._lost_in_a_row >= LOST_HEARTBEATS

    def begin_anew(self) -> None:
        """Note that the connection was replaced; what is known of the way stays."""
        self._lost_in_a_row = 0
        self._under_way_bytes = 0
