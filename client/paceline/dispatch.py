"""Which push goes over which of a shard's streams, and when. Pure.

A push waits until a stream takes it; the stream with the fewest bytes under way takes first, so that slow streams get
less, and among equals the one with the fewest answers to come. Two rules keep a fragment's answers in the order in
which the shard gave them:

1. While a push of a fragment is unanswered, later ones of it go over the same stream, and after a cut over the next
   stream of the same index: the shard answers on the stream that a push came by last, and the one before is superseded.
2. A push that was sent twice may be answered twice, and its second sending may be read late. So a fragment of which a
   push was sent again on a stream stays there until the shard has answered the opening of the next one of that index.
"""

from collections import Counter, deque
from dataclasses import dataclass
from typing import NamedTuple


class PushKey(NamedTuple):
    """Names a push of this worker."""

    fragment: int
    seq: int


@dataclass(eq=False)
class _Open:
    """An open stream: what it has to send again, and how many bytes are under way on it."""

    again: deque[PushKey]
    repeated: set[int]
    handed_bytes: int = 0
    arrived_bytes: int = 0

    @property
    def under_way_bytes(self) -> int:
        return self.handed_bytes - self.arrived_bytes


class Dispatch:
    """The pushes to one shard, from being handed over until they are answered.

    Attributes:
        num_streams: How many streams take new pushes: those with lower indexes. Others finish what they have.
    """

    def __init__(self) -> None:
        self.num_streams = 1
        self._waiting: deque[PushKey] = deque()
        self._num_bytes: dict[PushKey, int] = {}
        self._stream_of: dict[PushKey, int] = {}
        self._unanswered_on: dict[int, tuple[int, int]] = {}
        self._num_unanswered: Counter[int] = Counter()
        self._pinned: dict[int, int] = {}
        self._open: dict[int, _Open] = {}

    @property
    def is_waiting(self) -> bool:
        """Whether a push waits for a stream."""
        return bool(self._waiting)

    def add(self, key: PushKey, num_bytes: int) -> None:
        """Take in a push with so many payload bytes; those of a fragment come in the order of their seq."""
        self._num_bytes[key] = num_bytes
        self._waiting.append(key)

    def answered(self, key: PushKey) -> None:
        """Forget a push that was answered or given up."""
        if self._num_bytes.pop(key, None) is None:
            return
        stream = self._stream_of.pop(key, None)
        if stream is None:
            self._waiting.remove(key)
            return
        self._num_unanswered[stream] -= 1
        _, count = self._unanswered_on.pop(key.fragment)
        if count > 1:
            self._unanswered_on[key.fragment] = stream, count - 1
        if stream in self._open and key in self._open[stream].again:
            self._open[stream].again.remove(key)

    def begin_stream(self, stream: int) -> None:
        """Note that a stream is being opened, anew perhaps: what its index has unanswered is to be sent, again."""
        again = deque(key for key in self._num_bytes if self._stream_of.get(key) == stream)
        self._open[stream] = _Open(again, {key.fragment for key in again})
        self._pinned.update((key.fragment, stream) for key in again)

    def opened(self, stream: int) -> None:
        """Note that the shard has taken a stream, and superseded the one before: nothing that came by that is left."""
        repeated = self._open[stream].repeated
        self._pinned = {
            fragment: index for fragment, index in self._pinned.items() if index != stream or fragment in repeated
        }

    def end_stream(self, stream: int) -> None:
        """Note that a stream has ended; what it left unanswered waits for the next of its index."""
        self._open.pop(stream, None)

    def is_done(self, stream: int) -> bool:
        """Whether a stream is of no use any more: it takes no new pushes, and has nothing that must stay with it."""
        holds = self._num_unanswered[stream] > 0 or stream in self._pinned.values()
        return stream >= self.num_streams and not holds

    def arrived(self, stream: int, total_bytes: int) -> None:
        """Note how many payload bytes the shard has got since the stream began."""
        self._open[stream].arrived_bytes = total_bytes

    def take(self, stream: int) -> PushKey | None:
        """The push that an open stream is to send now; None: none for the time being."""
        if self._open[stream].again:
            return self._handed(stream, self._open[stream].again.popleft())
        is_due = stream < self.num_streams and self._has_least(stream)
        passed: set[int] = set()
        for key in self._waiting:
            # A fragment's later pushes never overtake an earlier one that waits for another stream.
            if key.fragment in passed:
                continue
            bound = self._bound(key.fragment)
            if bound == stream or (bound is None and is_due):
                self._waiting.remove(key)
                self._stream_of[key] = stream
                self._num_unanswered[stream] += 1
                self._unanswered_on[key.fragment] = stream, self._unanswered_on.get(key.fragment, (stream, 0))[1] + 1
                return self._handed(stream, key)
            passed.add(key.fragment)
        return None

    def _handed(self, stream: int, key: PushKey) -> PushKey:
        self._open[stream].handed_bytes += self._num_bytes[key]
        return key

    def _bound(self, fragment: int) -> int | None:
        """The stream that a fragment must go over; None: any."""
        if fragment in self._unanswered_on:
            return self._unanswered_on[fragment][0]
        return self._pinned.get(fragment)

    def _has_least(self, stream: int) -> bool:
        """Whether no other open stream that takes new pushes comes before this one."""
        return self._load(stream) <= min(self._load(each) for each in self._open if each < self.num_streams)

    def _load(self, stream: int) -> tuple[int, int]:
        return self._open[stream].under_way_bytes, self._num_unanswered[stream]
