"""A TCP relay on loopback that gives a connection the delay and rate of a wide-area link, and can cut it.

The demo puts one in front of every worker, and tests use it to break connections at will. As a process of its own:

    python -m paceline.relay --target 127.0.0.1:7070 --links 4 --delay-ms 50 --rate-mbit 20
"""

import asyncio
import contextlib
import json
import sys
import threading
from collections import deque
from collections.abc import Coroutine
from typing import Any

import click

from paceline.forwarding import End, ForwardedPort

CHUNK_BYTES = 16 * 1024
"""The most that is read at once: small enough that a slow link delivers smoothly (6 ms at 20 Mbit/s)."""
QUEUE_BYTES = 256 * 1024
"""What a direction holds beyond the bytes in flight on the wire: the buffers of a home router, roughly."""
UNLIMITED_QUEUE_BYTES = 8 * 1024 * 1024
"""What a direction without a rate holds: enough to carry 80 MB/s over a delay of 0.1 s."""


class Direction:
    """One direction of a link, shared by all its connections: what it can carry, and what it has carried.

    A leaky bucket: a chunk leaves when the ones before it have left and its own bytes have passed at the link's rate,
    and arrives the link's delay later. Due times are absolute, so late wake-ups don't add up.
    """

    def __init__(self, delay_s: float, bytes_per_s: float | None) -> None:
        self.delay_s = delay_s
        self.bytes_per_s = bytes_per_s
        self.capacity_bytes = UNLIMITED_QUEUE_BYTES if bytes_per_s is None else QUEUE_BYTES + int(bytes_per_s * delay_s)
        self.bytes_delivered = 0
        self._free_at_s = 0.0

    def admit(self, num_bytes: int, now_s: float) -> float:
        """Take the link for `num_bytes` as soon as it is free, and return the time at which they arrive."""
        transmit_s = 0.0 if self.bytes_per_s is None else num_bytes / self.bytes_per_s
        self._free_at_s = max(self._free_at_s, now_s) + transmit_s
        return self._free_at_s + self.delay_s


class Pipe:
    """Carries one connection's bytes one way, in order, through a queue that never exceeds the link's capacity."""

    def __init__(self, direction: Direction, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.queued_bytes = 0
        self._direction = direction
        self._reader = reader
        self._writer = writer
        self._queue: deque[tuple[float, bytes]] = deque()
        self._changed = asyncio.Condition()
        writer.transport.set_write_buffer_limits(high=0)  # drained means handed to the kernel: no queue beside ours

    async def run(self) -> None:
        """Carry bytes until the sender half-closes, then half-close towards the receiver.

        Raises:
            ExceptionGroup: One of the two sides was lost; holds the `OSError`.
        """
        async with asyncio.TaskGroup() as group:
            group.create_task(self._receive())
            group.create_task(self._deliver())

    async def _receive(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            async with self._changed:
                # Not reading is the backpressure: TCP passes it on to the sender.
                await self._changed.wait_for(lambda: self.queued_bytes + CHUNK_BYTES <= self._direction.capacity_bytes)
            chunk = await self._reader.read(CHUNK_BYTES)
            async with self._changed:
                self._queue.append((self._direction.admit(len(chunk), loop.time()), chunk))
                self.queued_bytes += len(chunk)
                self._changed.notify_all()
            if not chunk:  # the end of the stream travels the link like everything else
                return

    async def _deliver(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            async with self._changed:
                await self._changed.wait_for(lambda: bool(self._queue))
                due_s, chunk = self._queue.popleft()
            await asyncio.sleep(max(0.0, due_s - loop.time()))
            if not chunk:
                self._writer.write_eof()
                return
            self._writer.write(chunk)
            await self._writer.drain()
            self._direction.bytes_delivered += len(chunk)
            async with self._changed:
                self.queued_bytes -= len(chunk)
                self._changed.notify_all()


class Relay(ForwardedPort):
    """A listening port on loopback whose connections reach the target over an emulated link.

    Up is from whoever connects to the target, down is back; each direction has the whole rate to itself, and all
    connections share it. The queue of each direction is bounded, so a sender faster than the link is held back; a
    half-close is passed on when the bytes before it have arrived.

    What it doesn't show: TCP ends at the relay, so there is no loss, no retransmission, no slow start over the
    emulated delay and no extra round trip for connecting, and the kernel's own buffers on loopback hold a little more
    than the queue's bound. A real link of the same delay and rate is worse, mostly at the start of a transfer.

    Example:
        async with Relay("127.0.0.1", port, delay_s=0.05, bytes_per_s=2.5e6) as relay:
            ...  # connect to 127.0.0.1:{relay.port}
            relay.cut()
    """

    def __init__(
        self, target_host: str, target_port: int, *, delay_s: float = 0.0, bytes_per_s: float | None = None
    ) -> None:
        """Describe the link; nothing happens before the relay is entered.

        Args:
            target_host: Where the connections lead.
            target_port: Likewise.
            delay_s: The time every byte takes one way.
            bytes_per_s: The rate of each direction; left out, no limit.

        Raises:
            ValueError: The delay is negative, or the rate isn't positive.
        """
        if delay_s < 0:
            raise ValueError(f"delay_s must not be negative: {delay_s}")
        if bytes_per_s is not None and bytes_per_s <= 0:
            raise ValueError(f"bytes_per_s must be positive: {bytes_per_s}")
        super().__init__(target_host, target_port, CHUNK_BYTES)
        self.up = Direction(delay_s, bytes_per_s)
        self.down = Direction(delay_s, bytes_per_s)

    @property
    def bytes_up(self) -> int:
        """Bytes delivered to the target so far."""
        return self.up.bytes_delivered

    @property
    def bytes_down(self) -> int:
        """Bytes delivered back from the target so far."""
        return self.down.bytes_delivered

    def _ways(self, near: End, far: End) -> tuple[Coroutine[Any, Any, None], Coroutine[Any, Any, None]]:
        return Pipe(self.up, near.reader, far.writer).run(), Pipe(self.down, far.reader, near.writer).run()


@click.command(help="Put emulated links in front of TARGET and print their ports as JSON; ends when stdin does.")
@click.option("--target", required=True, help="HOST:PORT that the links lead to.")
@click.option("--links", default=1, show_default=True, help="Number of links, each on a port of its own.")
@click.option("--delay-ms", default=0.0, show_default=True, help="One-way delay.")
@click.option("--rate-mbit", default=None, type=float, help="Rate of each direction in Mbit/s; left out, no limit.")
def main(target: str, links: int, delay_ms: float, rate_mbit: float | None) -> None:
    """Run relays until standard input ends, so that none outlives whoever started it."""
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_run_links(target, links, delay_ms / 1e3, None if rate_mbit is None else rate_mbit * 1e6 / 8))


async def _run_links(target: str, num_links: int, delay_s: float, bytes_per_s: float | None) -> None:
    host, _, port = target.rpartition(":")
    async with contextlib.AsyncExitStack() as stack:
        relays = [
            await stack.enter_async_context(Relay(host, int(port), delay_s=delay_s, bytes_per_s=bytes_per_s))
            for _ in range(num_links)
        ]
        click.echo(json.dumps({"event": "listening", "ports": [relay.port for relay in relays]}))
        await _stdin_end()
        totals = {
            "bytes_up": [relay.bytes_up for relay in relays],
            "bytes_down": [relay.bytes_down for relay in relays],
        }
        click.echo(json.dumps({"event": "closed", **totals}))


async def _stdin_end() -> None:
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()

    def read_to_end() -> None:
        sys.stdin.read()
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(ended.set)

    # A daemon thread, because one of the loop's own would keep an interrupted process waiting for its input.
    threading.Thread(target=read_to_end, daemon=True).start()
    await ended.wait()


if __name__ == "__main__":
    main()
