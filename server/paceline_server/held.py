"""What workers hold of the fragments, where their updates are differences to it: every bit, within a bound. Pure.

Why a worker and the shard always mean the same values:

1. What is held never changes in place, and each has a version that no other has, not even in another process.
2. Updates of a stream arrive in the order in which they were queued, or the stream ends. What the worker holds moves
   here when its update is queued and there when it has come, by the same operations on the same bytes.
3. When a stream ends, updates may be lost. With its first push to a fragment on the next one, a worker names the
   version that it holds; if that is not the one kept here, nothing is kept, and the next update is whole.

An encoding that is not queued, because its stream has ended or what the worker holds has moved since, moves nothing.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from paceline_wire.codecs import whole_codec
from paceline_wire.codecs.base import Codec

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


class Holding:
    """What one worker holds, while its stream is open and for a while afterwards. Made by `Holdings.begin`."""

    def __init__(self, all_of_them: "Holdings", incarnation: int, kept: Mapping[int, Held]) -> None:
        self.incarnation = incarnation
        self.is_open = True
        self._all = all_of_them
        self._kept = dict(kept)
        self._named: set[int] = set()

    @property
    def num_bytes(self) -> int:
        """Bytes of all that is kept."""
        return sum(_bytes_of(held) for held in self._kept.values())

    def name(self, fragment: int, version: int | None) -> None:
        """Learn from a push what the worker holds; the first one to a fragment on a stream counts."""
        if fragment in self._named:
            return
        self._named.add(fragment)
        held = self._kept.get(fragment)
        if held is not None and held.version != version:
            self.keep(fragment, None)

    def held(self, fragment: int) -> Held | None:
        """What the worker holds of a fragment for certain; None if that is not known."""
        return self._kept.get(fragment) if fragment in self._named else None

    def form(self, fragment: int, downlink: Codec, num_elements: int) -> Form:
        """How the next update of a fragment with num_elements is written, where differences are in downlink."""
        since = self.held(fragment)
        if since is not None:
            return Form(codec=downlink, since=since)
        return Form(codec=whole_codec(downlink), kept=self.is_open and self._all.make_room(4 * num_elements))

    def keep(self, fragment: int, held: Held | None) -> None:
        """Note what the worker holds once it has the update that was queued last; None: that is not kept."""
        self._all.replace(self._kept.pop(fragment, None), None)
        if held is not None and self.is_open and self._all.make_room(_bytes_of(held)):
            self._all.replace(None, held)
            self._kept[fragment] = held

    def end(self) -> None:
        """Note that the stream has ended: what is kept may be dropped when others need the room."""
        if self.is_open:
            self.is_open = False
            self._all.note_idle(self)

    def give_up(self) -> dict[int, Held]:
        """Keep nothing any more; returns what was kept."""
        kept, self._kept, self.is_open = self._kept, {}, False
        for held in kept.values():
            self._all.replace(held, None)
        return kept


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
        self._by_worker: dict[str, Holding] = {}

    def begin(self, worker: str, incarnation: int) -> Holding:
        """What a worker holds, for its new stream; an older one of it keeps nothing any more."""
        older = self._by_worker.pop(worker, None)
        kept = {} if older is None else older.give_up()
        if older is not None and older.incarnation != incarnation:
            kept = {}
        for held in kept.values():
            self.replace(None, held)
        holding = self._by_worker[worker] = Holding(self, incarnation, kept)
        return holding

    def of(self, worker: str) -> Holding | None:
        """What is kept of a worker; None if nothing is."""
        return self._by_worker.get(worker)

    def make_room(self, num_bytes: int) -> bool:
        """Whether so much more can be kept, if need be instead of what idle workers hold."""
        for worker, holding in list(self._by_worker.items()):
            if self.num_bytes + num_bytes <= self._capacity_bytes:
                break
            if not holding.is_open:
                self._drop(worker)
        return self.num_bytes + num_bytes <= self._capacity_bytes

    def replace(self, old: Held | None, new: Held | None) -> None:
        """Count what a holding keeps."""
        self.num_bytes += (0 if new is None else _bytes_of(new)) - (0 if old is None else _bytes_of(old))

    def note_idle(self, holding: Holding) -> None:
        """Make a holding whose stream has ended the last to be dropped."""
        for worker, each in list(self._by_worker.items()):
            if each is holding:
                self._by_worker[worker] = self._by_worker.pop(worker)

    def keep_only(self, is_member: Callable[[str, int], bool]) -> None:
        """Drop what idle workers hold that are no longer members, given their names and incarnations."""
        for worker, holding in list(self._by_worker.items()):
            if not holding.is_open and not is_member(worker, holding.incarnation):
                self._drop(worker)

    def _drop(self, worker: str) -> None:
        self._by_worker.pop(worker).give_up()


def _bytes_of(held: Held) -> int:
    return held.values.numel() * held.values.itemsize
