"""The emulated link: delay, rate, order, backpressure, half-close, and cutting."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import cast

import pytest

from paceline.relay import CHUNK_BYTES, Direction, Pipe, Relay

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[int]:
    """Serve on a free loopback port."""
    server = await asyncio.start_server(handler, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


@asynccontextmanager
async def connected(port: int) -> AsyncIterator[Streams]:
    """Connect to a loopback port."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def answer_at_the_end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Read until the peer half-closes, then send everything back, reversed."""
    writer.write((await reader.read(-1))[::-1])
    writer.close()


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Send back what comes, until the connection ends one way or another."""
    with contextlib.suppress(ConnectionResetError):
        while data := await reader.read(1024):
            writer.write(data)
    writer.close()


class BlockedWriter:
    """A writer whose receiver takes nothing until it is told to."""

    def __init__(self) -> None:
        self.receiving = asyncio.Event()
        self.written = bytearray()
        self.ended = False
        self.transport = self

    def set_write_buffer_limits(self, high: int) -> None:
        """Accept what a transport accepts."""

    def write(self, data: bytes) -> None:
        """Take bytes, as a transport does whether or not there is room."""
        self.written += data

    async def drain(self) -> None:
        """Wait until there is room."""
        await self.receiving.wait()

    def write_eof(self) -> None:
        """Note the half-close."""
        self.ended = True


def test_bytes_arrive_after_their_transmission_and_the_delay() -> None:
    """On an idle link of 1000 bytes/s and half a second, 250 bytes take a quarter second more than the delay."""
    direction = Direction(delay_s=0.5, bytes_per_s=1000)
    assert direction.admit(250, now_s=10.0) == 10.75


def test_a_busy_link_makes_bytes_wait_their_turn() -> None:
    """Chunks that come together leave one after the other; a pause in between isn't saved up."""
    direction = Direction(delay_s=0.5, bytes_per_s=1000)
    assert [direction.admit(1000, now_s=now_s) for now_s in (0.0, 0.0, 10.0)] == [1.5, 2.5, 11.5]


def test_a_link_without_rate_only_delays() -> None:
    """Without a rate any number of bytes arrives the delay later."""
    direction = Direction(delay_s=0.5, bytes_per_s=None)
    assert [direction.admit(10**9, now_s=1.0) for _ in range(2)] == [1.5, 1.5]


@pytest.mark.parametrize(("delay_s", "bytes_per_s"), [(-1.0, None), (0.0, 0.0), (0.0, -5.0)])
def test_impossible_links_are_refused(delay_s: float, bytes_per_s: float | None) -> None:
    """A negative delay, or a rate that isn't positive, is an error when the relay is made."""
    with pytest.raises(ValueError, match="must"):
        Relay("127.0.0.1", 1, delay_s=delay_s, bytes_per_s=bytes_per_s)


async def test_a_blocked_receiver_stops_the_reading() -> None:
    """However much the sender has, the queue never exceeds its capacity; later everything arrives, in order."""
    direction = Direction(delay_s=0.0, bytes_per_s=1e12)
    sent = bytes(range(256)) * (4 * direction.capacity_bytes // 256)
    reader = asyncio.StreamReader()
    reader.feed_data(sent)
    reader.feed_eof()
    writer = BlockedWriter()
    pipe = Pipe(direction, reader, cast("asyncio.StreamWriter", writer))
    running = asyncio.create_task(pipe.run())
    for _ in range(1000):  # far more turns of the loop than reading everything takes
        await asyncio.sleep(0)
    assert direction.capacity_bytes - CHUNK_BYTES <= pipe.queued_bytes <= direction.capacity_bytes
    assert direction.bytes_delivered == 0
    writer.receiving.set()
    await running
    assert sent == writer.written
    assert writer.ended
    assert len(sent) == direction.bytes_delivered


async def test_bytes_and_half_close_pass_both_ways() -> None:
    """The target sees the end of what is sent while it can still answer, and both ways are counted."""
    request = bytes(range(256)) * 1000
    async with (
        serving(answer_at_the_end) as port,
        Relay("127.0.0.1", port, delay_s=0.001, bytes_per_s=1e9) as relay,
        connected(relay.port) as (reader, writer),
    ):
        writer.write(request)
        writer.write_eof()
        assert request[::-1] == await reader.read(-1)
        assert (len(request), len(request)) == (relay.bytes_up, relay.bytes_down)


async def test_the_delay_lets_a_direct_connection_overtake() -> None:
    """What was sent later but not through the relay arrives first."""
    arrived: list[bytes] = []
    both = asyncio.Event()

    async def note(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        arrived.append(await reader.read(-1))
        writer.close()
        if len(arrived) == 2:
            both.set()

    async with (
        serving(note) as port,
        Relay("127.0.0.1", port, delay_s=0.05) as relay,
        connected(relay.port) as (_, delayed),
        connected(port) as (_, direct),
    ):
        for writer, text in ((delayed, b"sent first"), (direct, b"sent second")):
            writer.write(text)
            writer.write_eof()
        await both.wait()
    assert arrived == [b"sent second", b"sent first"]


async def test_cut_resets_live_connections_only() -> None:
    """Cutting resets what is connected, says how many that was, and leaves the relay open for the next."""
    async with serving(echo) as port, Relay("127.0.0.1", port) as relay:
        async with connected(relay.port) as (reader, writer):
            writer.write(b"hello")
            assert await reader.readexactly(5) == b"hello"
            assert relay.cut() == 1
            with pytest.raises(ConnectionResetError):
                await reader.read(1)
        async with connected(relay.port) as (reader, writer):
            writer.write(b"again")
            assert await reader.readexactly(5) == b"again"
        assert relay.num_accepted == 2


async def test_an_unreachable_target_resets_the_caller() -> None:
    """When nobody listens behind the relay, whoever connects is told by a reset."""
    async with serving(echo) as port:
        pass  # the port is free again
    async with Relay("127.0.0.1", port) as relay, connected(relay.port) as (reader, _):
        with pytest.raises(ConnectionResetError):
            await reader.read(1)
