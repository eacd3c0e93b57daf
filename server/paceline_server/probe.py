"""Answers probes: pings, bytes that are counted and dropped, and bytes that are sent for the asking.

A probe moves bytes over a connection that is set up and authenticated, so nobody can aim it at somebody else. It must
not crowd out training either: how many there are at once, how long one lasts and how much each caller moves is bounded.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager

from paceline_server.security.limits import Waits
from paceline_wire.bulk import Bulk
from paceline_wire.errors import InvalidInputError, UnavailableError
from paceline_wire.transfer import MESSAGE_BYTES, PieceSize
from paceline_wire.v1 import parameter_server_pb2 as pb

MAX_PROBES = 16
"""Probes that a shard answers at once: twice the connections that one caller tries."""

MAX_PROBE_S = 30.0
"""Seconds that one may last."""

BURST_BYTES = 4 * 1024**3
"""Bytes, both ways together, that a caller may move at once: what a look at a link of 10 Gbit/s takes..."""

REFILL_BYTES_PER_S = 8 * 1024**2
"""...and by which that grows again."""

MAX_CALLERS = 1024
"""Callers whose bytes are remembered; beyond that, those that have moved the least lately are forgotten."""

REPORT_S = 0.02
"""Seconds between reports of what has arrived."""

_ZEROS = bytes(MESSAGE_BYTES)

Write = Callable[[Bulk[pb.ProbeResponse]], Awaitable[None]]


class Probes:
    """The probes under way on a shard, and what its callers have moved.

    Args:
        clock: Seconds that only grow.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._under_way = 0
        self._moved: dict[str, tuple[float, float]] = {}

    @contextmanager
    def begin(self) -> Iterator[None]:
        """Count a probe for as long as the context lasts.

        Raises:
            UnavailableError: There are as many as there may be.
        """
        if self._under_way >= MAX_PROBES:
            raise UnavailableError(f"{MAX_PROBES} probes are under way, as many as this shard answers; try again later")
        self._under_way += 1
        try:
            yield
        finally:
            self._under_way -= 1

    def take(self, caller: str, num_bytes: int) -> None:
        """Count bytes that a caller moves.

        Raises:
            UnavailableError: It has moved as many as it may for now.
        """
        now_s = self._clock()
        moved = self._moved_by(caller, now_s)
        if moved + num_bytes > BURST_BYTES:
            wait_s = (moved + num_bytes - BURST_BYTES) / REFILL_BYTES_PER_S
            raise UnavailableError(
                f"this caller has moved {BURST_BYTES // 1024**2} MiB with probes, as much as it may at once; "
                f"try again in {wait_s:.0f} s"
            )
        self._moved[caller] = (moved + num_bytes, now_s)
        if len(self._moved) > MAX_CALLERS:
            del self._moved[min(self._moved, key=lambda name: self._moved_by(name, now_s))]

    def _moved_by(self, caller: str, now_s: float) -> float:
        moved, at_s = self._moved.get(caller, (0.0, now_s))
        return max(0.0, moved - (now_s - at_s) * REFILL_BYTES_PER_S)


class ProbeStream:
    """One probe.

    Args:
        probes: What bounds it.
        caller: Whose bytes it moves.
        write: Sends one message; returns when gRPC has room for the next.
        waits: How long the caller's limit has held this call back.
    """

    def __init__(self, probes: Probes, caller: str, write: Write, waits: Waits) -> None:
        self._probes = probes
        self._caller = caller
        self._write = write
        self._waits = waits
        self._writing = asyncio.Lock()
        self._received = 0
        self._reported_s = 0.0
        self._download: asyncio.Task[None] | None = None

    async def run(self, messages: AsyncIterator[Bulk[pb.ProbeRequest]]) -> None:
        """Answer until the caller closes its side and has all that it asked for.

        Raises:
            InvalidInputError: It asked for bytes twice.
            UnavailableError: The probe reached a bound.
        """
        try:
            async with asyncio.timeout(MAX_PROBE_S):
                async for head, data in messages:
                    await self._take(head, len(data))
                if self._received:
                    await self._report()
                if self._download is not None:
                    await self._download
        except TimeoutError:
            raise UnavailableError(f"a probe lasts at most {MAX_PROBE_S:g} s; begin another one") from None
        finally:
            if self._download is not None:
                self._download.cancel()
                await asyncio.gather(self._download, return_exceptions=True)

    async def _take(self, head: pb.ProbeRequest, num_bytes: int) -> None:
        if head.HasField("ping"):
            await self._send(pb.ProbeResponse(ping=head.ping, time_us=time.time_ns() // 1000))
        if head.HasField("download_bytes"):
            if self._download is not None:
                raise InvalidInputError("a probe asks for bytes once")
            self._probes.take(self._caller, min(head.download_bytes, BURST_BYTES + 1))
            self._download = asyncio.create_task(self._send_bytes(head.download_bytes))
        if num_bytes:
            self._probes.take(self._caller, num_bytes)
            self._received += num_bytes
            if time.monotonic() >= self._reported_s + REPORT_S:
                self._reported_s = time.monotonic()
                await self._report()

    async def _report(self) -> None:
        limited_us = round(self._waits.received_s * 1e6)
        await self._send(pb.ProbeResponse(received_bytes=self._received, limited_us=limited_us))

    async def _send_bytes(self, num_bytes: int) -> None:
        size = PieceSize()
        while num_bytes > 0:
            began_s = time.monotonic()
            piece = memoryview(_ZEROS)[: min(size.num_bytes, num_bytes)]
            await self._send(pb.ProbeResponse(limited_us=round(self._waits.sent_s * 1e6)), piece)
            size.observe(time.monotonic() - began_s)
            num_bytes -= len(piece)

    async def _send(self, head: pb.ProbeResponse, data: bytes | memoryview = b"") -> None:
        async with self._writing:
            await self._write(Bulk(head, data))
