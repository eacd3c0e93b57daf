"""Measures the way to a shard through the protocol's own messages: round trips, clocks, and rates by connections."""

import asyncio
import itertools
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio

from paceline.calls import CALL_S, called
from paceline.channels import Access, error_of_status
from paceline_wire import bulk
from paceline_wire.bulk import Bulk
from paceline_wire.errors import PacelineError, UnavailableError
from paceline_wire.transfer import MESSAGE_BYTES, PieceSize
from paceline_wire.v1 import parameter_server_pb2 as pb

PINGS = 20
"""Round trips that are measured: enough for a median, and for a 95th percentile that is one of them."""

PING_PAUSE_S = 0.02
"""Seconds between them, so that each finds the connection quiet."""

FIRST_BYTES = 32 * 1024
"""What the first transfer moves: so little that it passes a link of 20 kbit/s. The next ones grow until they take long
enough."""

MOST_BYTES = 96 * 1024 * 1024
"""What a transfer moves at most, over all connections: what a shard allows a caller is enough for all transfers."""

LONGEST_S = 25.0
"""Seconds after which a transfer is broken off, and what has arrived counts: the shard would end it soon after."""

SLOW_START_SHARE, SLOW_START_ROUND_TRIPS, MOST_SLOW_START_SHARE = 1 / 3, 7, 2 / 3
"""Of a transfer's time, the beginning that is not counted, since windows grow in it: a third, or seven round trips, in
which they grow from 14 kB to 1.8 MB; but never more than two thirds."""

TRANSFER_ROUND_TRIPS = 14
"""A transfer takes at least so many round trips."""

ENOUGH_SHARE = 0.6
"""A transfer that took this part of the time that it should is not made again with more bytes."""

TRICKLE_SEGMENTS, TRICKLE_BYTES, TRICKLE_PAUSE_S, MOST_TRICKLE_S = 300, 1000, 0.004, 5.0
"""Small messages by which the link's own losses show: at 2 Mbit/s they fill no queue. On thinner links they are sent
more slowly, at a fifth of its rate, and fewer of them."""

_ZEROS = bytes(MESSAGE_BYTES)


@dataclass(frozen=True, kw_only=True)
class RoundTrips:
    """How long small messages took there and back, and what they say of the clocks.

    Attributes:
        median_s: The median.
        p95_s: The 95th percentile.
        least_s: The shortest.
        jitter_s: The mean difference between one and the next.
        clock_ahead_s: How far the server's clock is ahead of this host's; negative: behind.
        clock_error_s: That is true within so many seconds: half of the shortest round trip.
    """

    median_s: float
    p95_s: float
    least_s: float
    jitter_s: float
    clock_ahead_s: float
    clock_error_s: float


@dataclass(frozen=True, kw_only=True)
class Rate:
    """What a number of connections carry together.

    Attributes:
        connections: How many.
        up_bytes_per_s: To the shard.
        down_bytes_per_s: From it.
        up_limited: Share of that time in which the shard read nothing, since the caller had sent all that it may.
        down_limited: Likewise for what it received.
    """

    connections: int
    up_bytes_per_s: float
    down_bytes_per_s: float
    up_limited: float = 0.0
    down_limited: float = 0.0


class Arrivals:
    """When how many bytes of a transfer had arrived, for one connection after the other."""

    def __init__(self, connections: int, began_s: float) -> None:
        self._arrived: list[list[tuple[float, int]]] = [[(began_s, 0)] for _ in range(connections)]
        self._limited_s = [0.0] * connections

    def note(self, connection: int, now_s: float, num_bytes: int, limited_s: float = 0.0) -> None:
        """Note that so many bytes in all have arrived on a connection, which was held back for so long in all."""
        self._arrived[connection].append((now_s, num_bytes))
        self._limited_s[connection] = limited_s

    @property
    def took_s(self) -> float:
        """Seconds until the last byte of the last connection."""
        return max(arrived[-1][0] for arrived in self._arrived) - self._arrived[0][0][0]

    @property
    def num_bytes(self) -> int:
        """Bytes that have arrived over all connections."""
        return sum(arrived[-1][1] for arrived in self._arrived)

    @property
    def limited_share(self) -> float:
        """Share of the time in which connections were held back, since the caller had taken all that it may."""
        return min(1.0, statistics.fmean(self._limited_s) / max(self.took_s, 1e-9))

    def rate(self, round_trip_s: float) -> float:
        """Bytes a second while all connections were busy, without the beginning."""
        began_s = self._arrived[0][0][0]
        ended_s = min(arrived[-1][0] for arrived in self._arrived)
        if ended_s <= began_s:  # broken off before something had arrived on each
            return self.num_bytes / max(self.took_s, 1e-9)
        took_s = ended_s - began_s
        growing_s = max(took_s * SLOW_START_SHARE, SLOW_START_ROUND_TRIPS * round_trip_s)
        counted_s = began_s + min(growing_s, took_s * MOST_SLOW_START_SHARE)
        moved = sum(_at(arrived, ended_s) - _at(arrived, counted_s) for arrived in self._arrived)
        return moved / max(ended_s - counted_s, 1e-9)


def _at(arrived: Sequence[tuple[float, int]], time_s: float) -> float:
    """Bytes that had arrived at a time, on a straight line between the moments that are known."""
    for (before_s, before), (after_s, after) in itertools.pairwise(arrived):
        if before_s <= time_s <= after_s:
            return before + (after - before) * ((time_s - before_s) / (after_s - before_s) if after_s > before_s else 1)
    return arrived[-1][1]


class Prober:
    """Probes one shard. Made by `probing`; belongs to one event loop.

    Args:
        target: "host:port".
        access: TLS and token.
        seconds: What a transfer should take about.
    """

    def __init__(self, target: str, access: Access, seconds: float) -> None:
        self._target = target
        self._access = access
        self._seconds = seconds
        self._channels: list[grpc.aio.Channel] = []
        self._bytes = {"up": FIRST_BYTES, "down": FIRST_BYTES}
        self._round_trip_s = 0.0

    async def round_trips(self) -> RoundTrips:
        """Measure them on a quiet connection.

        Raises:
            PacelineError: The shard refuses, cannot be reached, or answers no probes.
        """
        (channel,) = self._opened(1)
        await self._require_probes(channel)
        took_s: list[float] = []
        ahead_s: list[float] = []
        async with self._probe(channel) as call:
            for number in range(PINGS + 1):
                sent_s, sent_at_s = time.perf_counter(), time.time()
                await call.write(Bulk(pb.ProbeRequest(ping=number), b""))
                head, _ = await self._next(call)
                took_s.append(time.perf_counter() - sent_s)
                ahead_s.append(head.time_us / 1e6 - (sent_at_s + took_s[-1] / 2))
                await asyncio.sleep(PING_PAUSE_S)
        # The first one has the connection's beginning in it.
        took_s, ahead_s = took_s[1:], ahead_s[1:]
        least = min(range(len(took_s)), key=took_s.__getitem__)
        self._round_trip_s = took_s[least]
        return RoundTrips(
            median_s=statistics.median(took_s),
            p95_s=sorted(took_s)[round(0.95 * (len(took_s) - 1))],
            least_s=took_s[least],
            jitter_s=statistics.fmean(abs(a - b) for a, b in itertools.pairwise(took_s)),
            clock_ahead_s=ahead_s[least],
            clock_error_s=took_s[least] / 2,
        )

    async def rate(self, connections: int) -> Rate:
        """What so many connections carry, one direction after the other.

        Raises:
            PacelineError: The shard refuses, or cannot be reached.
        """
        up, down = await self._measured("up", connections), await self._measured("down", connections)
        return Rate(
            connections=connections,
            up_bytes_per_s=up.rate(self._round_trip_s),
            down_bytes_per_s=down.rate(self._round_trip_s),
            up_limited=up.limited_share,
            down_limited=down.limited_share,
        )

    async def trickle(self, rate_bytes_per_s: float) -> None:
        """Send many small messages at a low rate, each a segment; what becomes of them the kernel knows.

        Raises:
            PacelineError: The shard refuses, or cannot be reached.
            TimeoutError: They did not arrive in time.
        """
        (channel,) = self._opened(1)
        pause_s = max(TRICKLE_PAUSE_S, 5 * TRICKLE_BYTES / rate_bytes_per_s)
        piece = memoryview(_ZEROS)[:TRICKLE_BYTES]
        async with asyncio.timeout(LONGEST_S), self._probe(channel) as call:
            for _ in range(min(TRICKLE_SEGMENTS, round(MOST_TRICKLE_S / pause_s))):
                await call.write(Bulk(pb.ProbeRequest(), piece))
                await asyncio.sleep(pause_s)
            await call.done_writing()
            while await call.read() is not grpc.aio.EOF:
                continue

    async def close(self) -> None:
        """End the connections."""
        await asyncio.gather(*(channel.close() for channel in self._channels))

    async def _measured(self, direction: str, connections: int) -> Arrivals:
        """Move more and more bytes until that takes long enough; the last transfer."""
        wanted_s = max(self._seconds, TRANSFER_ROUND_TRIPS * self._round_trip_s)
        while True:
            num_bytes = self._bytes[direction]
            arrivals = await self._transfer(direction, connections, num_bytes)
            took_s = max(arrivals.took_s, 1e-6)
            if took_s > 2 * wanted_s:
                self._bytes[direction] = round(arrivals.num_bytes * wanted_s / took_s)
            if took_s >= ENOUGH_SHARE * wanted_s or num_bytes >= MOST_BYTES:
                return arrivals
            grown = num_bytes * min(8.0, 1.2 * wanted_s / took_s)
            self._bytes[direction] = min(MOST_BYTES, round(grown))

    async def _transfer(self, direction: str, connections: int, num_bytes: int) -> Arrivals:
        """Move so many bytes, or as many as the link carries in LONGEST_S.

        Raises:
            PacelineError: The shard refuses, or cannot be reached; or nothing arrived.
        """
        channels = self._opened(connections)
        arrivals = Arrivals(connections, time.perf_counter())
        move = self._upload if direction == "up" else self._download
        share = max(1, num_bytes // connections)
        try:
            async with asyncio.timeout(LONGEST_S):
                await asyncio.gather(*(move(index, each, share, arrivals) for index, each in enumerate(channels)))
        except TimeoutError:
            if not arrivals.num_bytes:
                raise UnavailableError(
                    f"nothing of a transfer {direction} arrived within {LONGEST_S:g} s: the link stands still, or is "
                    "far too thin for a run; look at it with other tools, and try again"
                ) from None
        return arrivals

    async def _upload(self, index: int, channel: grpc.aio.Channel, num_bytes: int, arrivals: Arrivals) -> None:
        async with self._probe(channel) as call:
            sending = asyncio.create_task(self._send(call, num_bytes))
            try:
                while True:
                    head, _ = await self._next(call)
                    arrivals.note(index, time.perf_counter(), head.received_bytes, head.limited_us / 1e6)
                    if head.received_bytes >= num_bytes:
                        break
            finally:
                sending.cancel()
                await asyncio.gather(sending, return_exceptions=True)

    async def _send(self, call: Any, num_bytes: int) -> None:
        size = PieceSize()
        while num_bytes > 0:
            piece = memoryview(_ZEROS)[: min(size.num_bytes, num_bytes)]
            began_s = time.monotonic()
            await call.write(Bulk(pb.ProbeRequest(), piece))
            size.observe(time.monotonic() - began_s)
            num_bytes -= len(piece)
        await call.done_writing()

    async def _download(self, index: int, channel: grpc.aio.Channel, num_bytes: int, arrivals: Arrivals) -> None:
        async with self._probe(channel) as call:
            await call.write(Bulk(pb.ProbeRequest(download_bytes=num_bytes), b""))
            received = 0
            while received < num_bytes:
                head, data = await self._next(call)
                received += len(data)
                arrivals.note(index, time.perf_counter(), received, head.limited_us / 1e6)

    async def _require_probes(self, channel: grpc.aio.Channel) -> None:
        """Send one ping as a call with one answer: a stream that is refused as it begins may lose the reason."""
        method = f"/{pb.DESCRIPTOR.services_by_name['ParameterServerService'].full_name}/Probe"
        serialize, deserialize = pb.ProbeRequest.SerializeToString, pb.ProbeResponse.FromString
        call = channel.unary_unary(method, request_serializer=serialize, response_deserializer=deserialize)
        await called(call(pb.ProbeRequest(ping=0), timeout=CALL_S, metadata=self._access.metadata), self._target)

    def _opened(self, connections: int) -> list[grpc.aio.Channel]:
        while len(self._channels) < connections:
            self._channels.append(self._access.channel(self._target))
        return self._channels[:connections]

    @asynccontextmanager
    async def _probe(self, channel: grpc.aio.Channel) -> AsyncIterator[Any]:
        call = bulk.method(channel, "Probe")(metadata=self._access.metadata)
        try:
            yield call
        except (grpc.RpcError, asyncio.InvalidStateError) as error:
            raise await self._ended(call) from error
        finally:
            call.cancel()

    async def _next(self, call: Any) -> Bulk[pb.ProbeResponse]:
        message = await call.read()
        if message is grpc.aio.EOF:
            raise await self._ended(call)
        answer: Bulk[pb.ProbeResponse] = message
        return answer

    async def _ended(self, call: Any) -> PacelineError:
        """Why a call ended before it should."""
        code, details, metadata = await call.code(), await call.details(), await call.trailing_metadata()
        return error_of_status(code, details, metadata, self._target)


@asynccontextmanager
async def probing(target: str, access: Access, seconds: float) -> AsyncIterator[Prober]:
    """A prober, for as long as the context lasts; see `Prober`."""
    prober = Prober(target, access, seconds)
    try:
        yield prober
    finally:
        await prober.close()
