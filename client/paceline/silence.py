"""When a connection counts as dead: heartbeats are not answered, and nothing else moves either. Pure.

A heartbeat is lost when its answer takes longer than this connection's round trips make likely. On a link that is
busy it waits its turn, so a lost heartbeat says nothing while messages arrive, here or there; and it says nothing while
a message may still be on its way on a slow link. That a message was written says little: buffers take megabytes.
"""

from collections import deque

from paceline_wire.liveness import Gaps
from paceline_wire.transfer import MESSAGE_BYTES, PieceSize

LOST_HEARTBEATS = 2
"""Heartbeats lost in a row, with nothing moving, that make a connection count as dead: one may be an accident."""

SHORTEST_DEADLINE_S = 3.0
"""Seconds that a heartbeat always gets: a garbage collection, a busy machine or a resent packet takes that long."""

SLOWEST_BYTES_PER_S = 32 * 1024
"""A message gets the time that it takes at this rate. Slower links are not cut either, once messages are small."""


class Silence:
    """What a connection has carried, as far as it says whether it is alive.

    Attributes:
        lost_heartbeats: How many were lost so far.
        piece_size: How large the messages of pushes are: what the link carries in about a second.

    Args:
        longest_deadline_s: Seconds that a heartbeat gets at most, and until the round trips are known.
    """

    def __init__(self, longest_deadline_s: float) -> None:
        self.lost_heartbeats = 0
        self.piece_size = PieceSize()
        self._round_trips = Gaps(floor_s=SHORTEST_DEADLINE_S, longest_s=longest_deadline_s)
        self._lost_in_a_row = 0
        self._moved_s = 0.0
        self._written: deque[int] = deque()
        self._arrived_bytes = 0
        self._receiving = False

    @property
    def deadline_s(self) -> float:
        """Seconds that the next heartbeat gets."""
        return self._round_trips.allowed_s

    def wrote(self, now: float, num_bytes: int) -> None:
        """Note that a message with so many payload bytes was handed to the link."""
        if not self._written:
            self._moved_s = now
        self._written.append(num_bytes)

    @property
    def is_sending(self) -> bool:
        """Whether messages were written that have not arrived."""
        return bool(self._written)

    def arrived(self, now: float, total_bytes: int) -> int:
        """Note that the peer has got so many payload bytes since the stream began; returns how many are new."""
        count, before_bytes = 0, self._arrived_bytes
        while self._written and self._arrived_bytes + self._written[0] <= total_bytes:
            self._arrived_bytes += self._written.popleft()
            count += 1
        if count:
            self.piece_size.observe((now - self._moved_s) / count)
        self._moved_s = now
        return self._arrived_bytes - before_bytes

    def received(self, now: float, *, more_follows: bool) -> None:
        """Note that a message came, and whether the payload that it is part of goes on."""
        self._moved_s, self._receiving = now, more_follows

    def answered(self, took_s: float) -> None:
        """Note the answer to a heartbeat."""
        self._round_trips.observe(took_s)
        self._lost_in_a_row = 0

    def lost(self, now: float, sent_s: float) -> bool:
        """Note that a heartbeat sent at sent_s was not answered in time; returns whether the connection is dead."""
        self.lost_heartbeats += 1
        under_way = max(self._written[0] if self._written else 0, MESSAGE_BYTES if self._receiving else 0)
        if self._moved_s > sent_s or now < self._moved_s + under_way / SLOWEST_BYTES_PER_S:
            self._lost_in_a_row = 0
            return False
        self._lost_in_a_row += 1
        return self._lost_in_a_row >= LOST_HEARTBEATS

    def begin_stream(self) -> None:
        """Note that another stream begins, on which nothing is under way; what is known of the way stays."""
        self.piece_size = PieceSize()
        self._lost_in_a_row = 0
        self._written.clear()
        self._arrived_bytes = 0
        self._receiving = False
