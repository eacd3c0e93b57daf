"""Bounds the bytes that a shard holds for payloads under way: whoever needs memory for one waits here for room.

Of `exchange.buffer_mib` the process's own work and gRPC have a part, which grows with the open streams. The rest is two
budgets, half for pushes being received, half for updates and fetched fragments on their way out. Room is given in the
order in which it was asked for.

Why nobody waits forever:

1. Room for a push is taken when the push is announced and held until it is journaled and applied. The rest of its way
   needs its worker's link, the fragment's lock, the journal and a thread. None of these waits for room: whoever holds a
   fragment's lock may only try (`try_reserve`), and does without if there is none.
2. So that 1 holds, a stream looks whether too many of its updates wait for the link before it asks for a push's room,
   never while it has it. Uploads then never wait for updates with room in their hands.
3. Room for an update is held until the link has taken it, which needs nothing but a worker that reads. Clients read
   whatever becomes of their own pushes. An update that waits for room takes the fragment's lock afterwards, and no
   update has room while one that waits for it goes before it in the same stream.
4. A request that is larger than the whole budget is granted when nothing else is held.
5. A peer that takes or sends no message for STALLED_S while others wait for its room loses its stream.
"""

import asyncio
import logging
import math
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from paceline_server.config import ServerConfig
from paceline_wire import codecs
from paceline_wire.codecs.kernels import LEAST_ELEMENTS

_log = logging.getLogger(__name__)

MIB = 1024 * 1024

STALLED_S = 300.0
"""Seconds without a message after which a transfer gives up the room that others wait for. A message is 1 MiB, so links
down to 28 kbit/s keep theirs, and a stuck worker that still answers pings does not hold up a run for good."""

WORK_BYTES = 32 * MIB
"""What the first pushes make a process take beside them, measured: scratch of threads, stacks, pages of libraries."""

KERNEL_BYTES = 112 * MIB
"""What compiled loops make it take, measured, once a fragment is large enough for them (190 if they are not in
numba's cache yet). Two thirds are pages of libraries, which processes share."""

STREAM_BYTES = 6 * MIB
"""What gRPC holds of a stream whose peer is slow, measured: the message being written, in up to four copies of 1 MiB,
the one being read, and what the peer has sent ahead within HTTP/2's window."""

LEAST_SHARE = 0.25
"""Of the buffer: what remains for payloads however many streams are open, or they would pass one at a time."""


@dataclass(eq=False)
class _Block:
    """Reserved bytes, and how many claims on them are left."""

    num_bytes: int
    claims: int = 0


class Room:
    """A claim on reserved bytes. Made by a BufferBudget; whoever has it must release it."""

    def __init__(self, budget: "BufferBudget", block: _Block) -> None:
        self._budget = budget
        self._block: _Block | None = block
        self._end: Callable[[], None] | None = None
        self._moved_s = 0.0
        block.claims += 1

    def share(self) -> "Room":
        """Another claim on the same bytes, which are free once all claims are released.

        Raises:
            ValueError: This claim is released.
        """
        if self._block is None:
            raise ValueError("room that was given back cannot be shared")
        return Room(self._budget, self._block)

    def release(self) -> None:
        """Give up the claim; doing so twice is not an error."""
        block, self._block = self._block, None
        if block is None:
            return
        self._end = None
        self._budget.under_way.discard(self)
        block.claims -= 1
        if block.claims == 0:
            self._budget.give_back(block.num_bytes)

    def begin_transfer(self, end: Callable[[], None]) -> None:
        """Note that a peer sends or takes the bytes from now on; `end` is called if it stalls while others wait."""
        self._end = end
        self._moved_s = asyncio.get_running_loop().time()
        self._budget.under_way.add(self)

    def moved(self) -> None:
        """Note that a message of the transfer has come or gone."""
        self._moved_s = asyncio.get_running_loop().time()

    def end_transfer(self) -> None:
        """Note that what is left to be done does not depend on the peer."""
        self._end = None
        self._budget.under_way.discard(self)

    def end_if_stalled(self, since_s: float) -> None:
        """End the transfer if no message of it has moved since a time of the loop's clock."""
        if self._end is not None and self._moved_s <= since_s:
            end, self._end = self._end, None
            end()


class BufferBudget:
    """A number of bytes that many share, first come, first served. Belongs to one event loop.

    Args:
        capacity_bytes: How many may be reserved at once.
        stalled_s: Seconds after which a transfer that does not move is ended if others wait.
    """

    def __init__(self, capacity_bytes: int, *, stalled_s: float = STALLED_S) -> None:
        self.capacity_bytes = capacity_bytes
        self.held_bytes = 0
        self.under_way: set[Room] = set()
        self._stalled_s = stalled_s
        self._waiting: deque[tuple[int, asyncio.Future[Room]]] = deque()

    @property
    def num_waiting(self) -> int:
        """How many requests wait for room."""
        return len(self._waiting)

    def try_reserve(self, num_bytes: int, *, leave_free_bytes: int = 0) -> Room | None:
        """Room for num_bytes if there is some now and nobody else waits for it, else None.

        Args:
            num_bytes: How many bytes.
            leave_free_bytes: How many must be free beside them.
        """
        if self._waiting or not self._fits(num_bytes + leave_free_bytes):
            return None
        return self._granted(num_bytes)

    async def reserve(self, num_bytes: int) -> Room:
        """Room for num_bytes, once those who asked before have theirs. Cancelled, it takes none."""
        room = self.try_reserve(num_bytes)
        if room is not None:
            return room
        turn: asyncio.Future[Room] = asyncio.get_running_loop().create_future()
        request = (num_bytes, turn)
        self._waiting.append(request)
        try:
            while not turn.done():
                await asyncio.wait({turn}, timeout=self._stalled_s)
                if not turn.done():
                    self._end_stalled()
            return turn.result()
        except asyncio.CancelledError:
            if turn.done():
                turn.result().release()
            else:
                self._waiting.remove(request)
                self._grant()
            raise

    def resize(self, capacity_bytes: int) -> None:
        """Change how many bytes may be reserved; what is held beyond that stays until it is given back."""
        self.capacity_bytes = capacity_bytes
        self._grant()

    def give_back(self, num_bytes: int) -> None:
        """Free bytes; called by the last claim on them."""
        self.held_bytes -= num_bytes
        self._grant()

    def _grant(self) -> None:
        while self._waiting and self._fits(self._waiting[0][0]):
            num_bytes, turn = self._waiting.popleft()
            turn.set_result(self._granted(num_bytes))

    def _granted(self, num_bytes: int) -> Room:
        self.held_bytes += num_bytes
        return Room(self, _Block(num_bytes))

    def _fits(self, num_bytes: int) -> bool:
        return self.held_bytes == 0 or self.held_bytes + num_bytes <= self.capacity_bytes

    def _end_stalled(self) -> None:
        since_s = asyncio.get_running_loop().time() - self._stalled_s
        for room in list(self.under_way):
            room.end_if_stalled(since_s)


class Buffers:
    """A shard's buffer: what gRPC takes of it with the streams that are open, and two budgets for the rest.

    Args:
        num_bytes: Its size.
        work_bytes: What the process takes of it whatever it holds.

    Attributes:
        incoming: For payloads of pushes and first parameters, from their announcement until they are applied.
        outgoing: For encoded updates and fetched fragments, until the link has taken them.
    """

    def __init__(self, num_bytes: int, *, work_bytes: int = WORK_BYTES) -> None:
        self.incoming = BufferBudget(0)
        self.outgoing = BufferBudget(0)
        self._num_bytes = num_bytes
        self._work_bytes = work_bytes
        self._num_streams = 0
        self._most_streams = 0
        self._divide(0)

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Leave gRPC its part while a stream is open."""
        self._divide(self._num_streams + 1)
        try:
            yield
        finally:
            self._divide(self._num_streams - 1)

    def _divide(self, num_streams: int) -> None:
        self._num_streams = num_streams
        wanted_bytes, least_bytes = self._work_bytes + num_streams * STREAM_BYTES, int(self._num_bytes * LEAST_SHARE)
        left_bytes = max(self._num_bytes - wanted_bytes, least_bytes)
        self.incoming.resize(left_bytes // 2)
        self.outgoing.resize(left_bytes // 2)
        if self._num_bytes - wanted_bytes < least_bytes and num_streams > self._most_streams:
            # Told again only when it has doubled, so that many workers make a few lines.
            self._most_streams = 2 * num_streams
            _log.warning(
                "%d open streams may take more than exchange.buffer_mib = %d in all; set it to at least %d",
                num_streams,
                self._num_bytes // MIB,
                math.ceil(wanted_bytes / (1 - LEAST_SHARE) / MIB),
            )


def largest_payload_bytes(config: ServerConfig) -> int:
    """The largest payload that a configuration lets come or go: first parameters and exact fetches are fp32."""
    exchange, elements = config.exchange, config.exchange.fragment_elements
    pushed = elements * (2 if config.outer.rule == "orlomo" else 1)
    updated = elements * (2 if exchange.own_weight == "predicted" else 1)
    return max(
        codecs.codec("fp32").encoded_bytes(elements),
        codecs.codec(exchange.uplink).encoded_bytes(pushed),
        codecs.whole_codec(codecs.codec(exchange.downlink)).encoded_bytes(updated),
    )


def work_bytes(config: ServerConfig) -> int:
    """What a shard's process takes of its buffer whatever it holds."""
    return WORK_BYTES + (KERNEL_BYTES if config.exchange.fragment_elements >= LEAST_ELEMENTS else 0)


def shortage(config: ServerConfig) -> str | None:
    """What to tell whoever starts a shard whose buffer is too small for more than one payload at a time; else None."""
    needed_mib = -(-2 * largest_payload_bytes(config) // MIB)
    if config.exchange.buffer_mib >= needed_mib:
        return None
    return (
        f"exchange.buffer_mib = {config.exchange.buffer_mib} is less than twice the largest payload of "
        f"exchange.fragment_elements = {config.exchange.fragment_elements}: such payloads pass one at a time, and each "
        f"exceeds the buffer; set exchange.buffer_mib to at least {needed_mib}, or exchange.fragment_elements lower"
    )
