"""What workers hold of the fragments, where their updates are differences to it: every bit, within a bound. Pure.

Why a worker and the shard always mean the same values:

1. What is held never changes in place, and each has a version that no other has, not even in another process.
2. Updates of a stream arrive in the order in which they were queued, or the stream ends. What the worker holds moves
   here when its update is queued and there when it has come, by the same operations on the same bytes.
3. When a stream ends, updates may be lost. With its first push to a fragment on the next one, a worker names the
   version that it holds; if that is not the one kept here, nothing is kept, and the next update is whole.
4. Of several streams of a worker one has the fragment: it comes to another by a push that names what the worker holds,
   as in 3. An update that is queued on the one before from then on moves nothing.

An encoding that is not queued, because its stream has ended or what the worker holds has moved since, moves nothing.
"""

import itertools
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from paceline_wire.codecs import whole_codec
from paceline_wire.codecs.base import Codec

MOST_SPARE = 4
"""Blocks of memory of one size that wait to be used again: about as many as are written at once."""

CHECKED_EVERY = 64
"""Differences from one whose outcome travels as a checksum, too, to the next: it costs as much as encoding does."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Held:
    """Values that workers hold.

    Attributes:
        values: float32 [n]; never changed.
        version: Their name.
        num_differences: How many differences led to them since values were sent whole.
    """

    values: torch.Tensor
    version: int
    num_differences: int = 0

    @property
    def is_checked(self) -> bool:
        """Whether the worker is sent a checksum of the values: of the first difference, and then of a few."""
        return self.num_differences % CHECKED_EVERY == 1


@dataclass(frozen=True, kw_only=True)
class Form:
    """How an update is written; those who are due the same form share one encoding.

    Attributes:
        codec: The codec.
        since: What the values are written as a difference to; None: they are written whole.
        kept: Whether whole values are kept as what the worker holds then.
    """

    codec: Codec
    since: Held | None = None
    kept: bool = False


class HeldMemory:
    """Makes what workers hold, in memory of values that nobody holds any more; to be used from any thread.

    Values come and go with every update, among payloads of other sizes: given back each time, their memory would become
    holes in the process's, a fifth more than is used, and fresh pages cost as much as the arithmetic.

    Args:
        first_version: Versions are counted from here. At random, so that what a worker names after the shard was
            restarted is not taken for anything that is held now.
    """

    def __init__(self, first_version: int) -> None:
        self._versions = itertools.count(first_version)
        self._spare: dict[int, deque[torch.Tensor]] = {}

    def take(self, num_elements: int) -> torch.Tensor:
        """Memory for values, float32 [n], of any content."""
        try:
            return self._spare[num_elements].pop()
        except LookupError:
            return torch.empty(num_elements)

    def held(self, values: torch.Tensor, num_differences: int = 0) -> Held:
        """Give values a version. Their memory is used again once nobody has the result, whoever may have the values."""
        held = Held(values=values, version=next(self._versions), num_differences=num_differences)
        weakref.finalize(held, self._give, values).atexit = False
        return held

    def _give(self, values: torch.Tensor) -> None:
        self._spare.setdefault(values.numel(), deque(maxlen=MOST_SPARE)).append(values)


class Kept:
    """What is kept of one worker's incarnation, whichever of its streams brought it."""

    def __init__(self, incarnation: int) -> None:
        self.incarnation = incarnation
        self.by_fragment: dict[int, Held] = {}
        self.named_on: dict[int, Holding] = {}
        self.streams: set[Holding] = set()

    @property
    def is_open(self) -> bool:
        """Whether any of the worker's streams is."""
        return bool(self.streams)

    @property
    def num_bytes(self) -> int:
        """Bytes of all that is kept."""
        return sum(_bytes_of(held) for held in self.by_fragment.values())


class Holding:
    """What one worker holds, as one of its streams knows it. Made by `Holdings.begin`.

    A fragment belongs to the stream on which a push named last what the worker holds of it: a client pushes it on
    another one only when nothing of it is under way.
    """

    def __init__(self, all_of_them: "Holdings", kept: Kept) -> None:
        self._all = all_of_them
        self._kept = kept
        kept.streams.add(self)

    @property
    def is_open(self) -> bool:
        """Whether the stream is."""
        return self in self._kept.streams

    @property
    def num_bytes(self) -> int:
        """Bytes of all that is kept of the worker."""
        return self._kept.num_bytes

    def name(self, fragment: int, version: int | None) -> None:
        """Learn from a push what the worker holds; the first one to a fragment counts since it came to this stream."""
        if self._kept.named_on.get(fragment) is self:
            return
        held = self._kept.by_fragment.get(fragment)
        self._kept.named_on[fragment] = self
        if held is not None and held.version != version:
            self.keep(fragment, None)

    def held(self, fragment: int) -> Held | None:
        """What the worker holds of a fragment for certain; None if that is not known."""
        return self._kept.by_fragment.get(fragment) if self._kept.named_on.get(fragment) is self else None

    def form(self, fragment: int, downlink: Codec, num_elements: int) -> Form:
        """How the next update of a fragment with num_elements is written, where differences are in downlink."""
        since = self.held(fragment)
        if since is not None:
            return Form(codec=downlink, since=since)
        kept = self._has(fragment) and self._all.make_room(4 * num_elements)
        return Form(codec=whole_codec(downlink), kept=kept)

    def keep(self, fragment: int, held: Held | None) -> None:
        """Note what the worker holds once it has the update that was queued last; None: that is not kept."""
        if not self._has(fragment):
            return
        self._all.replace(self._kept.by_fragment.pop(fragment, None), None)
        if held is not None and self._all.make_room(_bytes_of(held)):
            self._all.replace(None, held)
            self._kept.by_fragment[fragment] = held

    def _has(self, fragment: int) -> bool:
        """Whether what is kept of a fragment is this stream's to change."""
        return self.is_open and self._kept.named_on.get(fragment, self) is self

    def end(self) -> None:
        """Note that the stream has ended: what is kept may be dropped when others need the room."""
        if not self.is_open:
            return
        self._kept.streams.discard(self)
        # What was queued here may be lost: the next push says anew what the worker holds.
        for fragment in [fragment for fragment, stream in self._kept.named_on.items() if stream is self]:
            del self._kept.named_on[fragment]
        self._all.note_idle(self._kept)


class Holdings:
    """What all workers hold, as far as it is kept.

    Values that several workers hold in common are in memory once, and count for each.

    Args:
        capacity_bytes: How much is kept at most. Beyond that, idle workers' is dropped, those first whose streams ended
            first, and where there are none, a worker's updates stay whole.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self.num_bytes = 0
        self._capacity_bytes = capacity_bytes
        self._by_worker: dict[str, Kept] = {}

    def begin(self, worker: str, incarnation: int) -> Holding:
        """What a worker holds, for a new stream of it; of an earlier incarnation nothing is kept any more."""
        kept = self._by_worker.get(worker)
        if kept is None or kept.incarnation != incarnation:
            if kept is not None:
                self._drop(worker)
            kept = Kept(incarnation)
        # Last again, should it have been idle.
        self._by_worker.pop(worker, None)
        self._by_worker[worker] = kept
        return Holding(self, kept)

    def of(self, worker: str) -> Kept | None:
        """What is kept of a worker; None if nothing is."""
        return self._by_worker.get(worker)

    def make_room(self, num_bytes: int) -> bool:
        """Whether so much more can be kept, if need be instead of what idle workers hold."""
        for worker, kept in list(self._by_worker.items()):
            if self.num_bytes + num_bytes <= self._capacity_bytes:
                break
            if not kept.is_open:
                self._drop(worker)
        return self.num_bytes + num_bytes <= self._capacity_bytes

    def replace(self, old: Held | None, new: Held | None) -> None:
        """Count what a holding keeps."""
        self.num_bytes += (0 if new is None else _bytes_of(new)) - (0 if old is None else _bytes_of(old))

    def note_idle(self, kept: Kept) -> None:
        """Make a worker whose last stream has ended the last to be dropped."""
        for worker, each in list(self._by_worker.items()):
            if each is kept and not kept.is_open:
                self._by_worker[worker] = self._by_worker.pop(worker)

    def keep_only(self, is_member: Callable[[str, int], bool]) -> None:
        """Drop what idle workers hold that are no longer members, given their names and incarnations."""
        for worker, kept in list(self._by_worker.items()):
            if not kept.is_open and not is_member(worker, kept.incarnation):
                self._drop(worker)

    def _drop(self, worker: str) -> None:
        kept = self._by_worker.pop(worker)
        for held in kept.by_fragment.values():
            self.replace(held, None)
        kept.by_fragment.clear()
        kept.named_on.clear()
        kept.streams.clear()


def _bytes_of(held: Held) -> int:
    return held.values.numel() * held.values.itemsize
