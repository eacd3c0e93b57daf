"""Links with faults: a TCP relay on loopback between a worker and a shard that can go wrong in every way at will.

What is relayed are the bytes of a connection. So to drop, repeat, reorder or flip some of them breaks what TCP
promises, as a faulty middlebox does: the peers must notice, end the connection, and recover.
"""

import asyncio
import random
from collections.abc import Coroutine
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from paceline.forwarding import End, ForwardedPort
from paceline_chaos.payloads import PayloadFinder

CHUNK_BYTES = 64 * 1024
"""The most that is read at once."""

SMALLEST_CHUNK_BYTES = 512
"""Smaller chunks are not garbled: there must be room for two different parts."""


class LinkFault(Enum):
    """What can go wrong on a link."""

    CUT = "cut"
    BLACKHOLE = "blackhole"
    SLOW = "slow"
    DELAY = "delay"
    DROP = "drop"
    DUPLICATE = "duplicate"
    REORDER = "reorder"
    CORRUPT = "corrupt"

    @property
    def garbles(self) -> bool:
        """Whether bytes outside of payloads may not arrive as they were sent."""
        return self in (LinkFault.DROP, LinkFault.DUPLICATE, LinkFault.REORDER)

    @property
    def lasts(self) -> bool:
        """Whether it goes on until it is ended, rather than happening once."""
        return self in (LinkFault.BLACKHOLE, LinkFault.SLOW, LinkFault.DELAY)


class Way(Enum):
    """A direction of a link; up is from the worker to the shard."""

    UP = "up"
    DOWN = "down"


@dataclass(eq=False, kw_only=True)
class ActiveFault:
    """A fault that was switched on.

    Attributes:
        kind: What goes wrong.
        way: In which direction; a cut ends both.
        bytes_per_s: The rate that is left (slow).
        delay_s: What every chunk takes longer (delay).
        num_bytes: Bytes that it touched: held back, lost, repeated, moved or changed.
        fired: Set once it has touched something.
        over: Set when a lasting fault was ended.
    """

    kind: LinkFault
    way: Way
    bytes_per_s: float = 20_000.0
    delay_s: float = 0.2
    num_bytes: int = 0
    fired: asyncio.Event = field(default_factory=asyncio.Event)
    over: asyncio.Event = field(default_factory=asyncio.Event)

    def touch(self, num_bytes: int) -> None:
        """Count what it did."""
        self.num_bytes += num_bytes
        self.fired.set()


class FaultyLink(ForwardedPort):
    """A listening port on loopback that leads to a shard; a context manager. Belongs to one event loop.

    At most one fault a direction is on at a time.

    Args:
        target: "host:port" of the shard.
        seed: Decides which bytes are hit.
        encrypted: Whether the connections use TLS, so that nothing is known of their content.
    """

    def __init__(self, target: str, *, seed: int, encrypted: bool = False) -> None:
        host, _, port = target.rpartition(":")
        super().__init__(host.strip("[]"), int(port), CHUNK_BYTES)
        self._rng = random.Random(seed)  # noqa: S311  # not for secrets
        self._encrypted = encrypted
        self._faults: dict[Way, ActiveFault] = {}

    @property
    def address(self) -> str:
        """Where the worker connects, while the link is entered."""
        return f"127.0.0.1:{self.port}"

    def begin(self, fault: ActiveFault) -> ActiveFault:
        """Switch a fault on; one that happens once does at the next bytes that it can hit."""
        self._faults[fault.way] = fault
        return fault

    def end(self, fault: ActiveFault) -> None:
        """Switch it off; bytes that were held back go on. Ending one that is off already does nothing."""
        if self._faults.get(fault.way) is fault:
            del self._faults[fault.way]
        fault.over.set()

    def _ways(self, near: End, far: End) -> tuple[Coroutine[Any, Any, None], Coroutine[Any, Any, None]]:
        return self._pump(Way.UP, near.reader, far.writer), self._pump(Way.DOWN, far.reader, near.writer)

    async def _pump(self, way: Way, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        finder = PayloadFinder(from_client=way is Way.UP)
        while chunk := await reader.read(CHUNK_BYTES):
            payloads = [(0, len(chunk))] if self._encrypted else finder.ranges(chunk)
            fault = self._faults.get(way)
            if fault is not None:
                chunk = await self._afflict(fault, chunk, payloads)
            writer.write(chunk)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()

    async def _afflict(self, fault: ActiveFault, chunk: bytes, payloads: list[tuple[int, int]]) -> bytes:
        """Let a fault have a chunk; returns what arrives of it.

        Raises:
            ConnectionResetError: The fault was a cut.
        """
        if fault.kind.lasts:
            fault.touch(len(chunk))
            await self._hold(fault, len(chunk))
            return chunk
        if fault.kind is LinkFault.CUT:
            self._happened(fault, len(chunk))
            self.cut()
            raise ConnectionResetError("the link was cut")
        if fault.kind is LinkFault.CORRUPT:
            return self._corrupted(fault, chunk, payloads)
        return chunk if len(chunk) < SMALLEST_CHUNK_BYTES else self._garbled(fault, chunk)

    async def _hold(self, fault: ActiveFault, num_bytes: int) -> None:
        """Keep a chunk back for as long as a lasting fault wants, or until it is over."""
        if fault.kind is LinkFault.BLACKHOLE:
            await fault.over.wait()
            return
        held_s = fault.delay_s if fault.kind is LinkFault.DELAY else num_bytes / fault.bytes_per_s
        try:
            await asyncio.wait_for(fault.over.wait(), held_s)
        except TimeoutError:
            return

    def _garbled(self, fault: ActiveFault, chunk: bytes) -> bytes:
        first, second, third = sorted(self._rng.sample(range(1, len(chunk)), 3))
        head, one, two, tail = chunk[:first], chunk[first:second], chunk[second:third], chunk[third:]
        if fault.kind is LinkFault.DROP:
            self._happened(fault, len(one))
            return head + two + tail
        if fault.kind is LinkFault.DUPLICATE:
            self._happened(fault, len(one))
            return head + one + one + two + tail
        self._happened(fault, len(one) + len(two))
        return head + two + one + tail

    def _corrupted(self, fault: ActiveFault, chunk: bytes, payloads: list[tuple[int, int]]) -> bytes:
        if not payloads:
            return chunk
        start, end = self._rng.choice(payloads)
        damaged = bytearray(chunk)
        damaged[self._rng.randrange(start, end)] ^= 1 << self._rng.randrange(8)
        self._happened(fault, 1)
        return bytes(damaged)

    def _happened(self, fault: ActiveFault, num_bytes: int) -> None:
        fault.touch(num_bytes)
        self.end(fault)
