"""One worker's exchange stream: pushes in, updates out, at the same time, with bounded buffers.

Reading, applying and sending overlap, fragment by fragment. The stream stops reading while too many of its pushes are
being processed, too many of its updates wait for the link, or the shard's buffer has no room for the next push
(buffers.py); gRPC's flow control then holds the worker back. When a stream ends, whatever the reason, it gives back all
that it holds, at once.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import NamedTuple

from paceline_server.buffers import STALLED_S, Room
from paceline_server.engine import Engine
from paceline_server.held import Form, Holding
from paceline_server.ledger import Answer, PushRequest
from paceline_server.received import ReceivedPush
from paceline_server.security.limits import Allowance
from paceline_server.updates import Encoded, Written
from paceline_wire.bulk import Bulk
from paceline_wire.codecs import DIFFERENCE_CODECS
from paceline_wire.codecs.base import Codec
from paceline_wire.errors import InvalidInputError, PacelineError, UnavailableError
from paceline_wire.transfer import Assembly, Outgoing, PieceSize, Receiver
from paceline_wire.v1 import parameter_server_pb2 as pb

MAX_PROCESSING = 4
"""Pushes of one stream that may be processed at once: enough to keep every stage busy, and others have their turn."""

MAX_UNSENT = 4
"""Updates that may wait for the link before the stream stops reading."""

REPORT_S = 0.01
"""Seconds between reports of what has arrived: soon enough for whoever judges a link, and on a fast one a report for
each message would cost as much as the messages of the updates."""


class _Incoming(NamedTuple):
    """A push that is being received."""

    fragment: int
    request: PushRequest
    held_version: int | None
    room: Room


class _Queued(NamedTuple):
    """An update that is due to be sent. Not what the worker holds before and after it, which would stay in memory."""

    values: Outgoing
    room: Room
    difference_to: int | None
    version: int | None
    values_crc32: int | None

    @classmethod
    def of(cls, encoded: Encoded) -> "_Queued":
        written = encoded.written
        return cls(
            values=written.values,
            room=encoded.room,
            difference_to=written.form.since.version if written.form.since is not None else None,
            version=written.held.version if written.held is not None else None,
            values_crc32=written.values_crc32,
        )


class Received:
    """Tells the worker how much has arrived, but not for each message, and never holds up the reading."""

    def __init__(self, write: Callable[[Bulk[pb.ExchangeResponse]], Awaitable[None]]) -> None:
        self._write = write
        self._num_bytes = 0
        self._more = asyncio.Event()

    def add(self, num_bytes: int) -> None:
        """Count payload bytes that have arrived."""
        if num_bytes:
            self._num_bytes += num_bytes
            self._more.set()

    async def report(self) -> None:
        """Send the newest count when it has grown; runs until cancelled."""
        while True:
            await self._more.wait()
            self._more.clear()
            await self._write(Bulk(pb.ExchangeResponse(received_bytes=self._num_bytes), b""))
            await asyncio.sleep(REPORT_S)


class ExchangeStream:
    """A worker's open stream.

    Args:
        engine: The shard.
        worker: Who is at the other end.
        downlink: How its updates are to be written.
        write: Sends one message; returns when gRPC has room for the next.
        index: Which of the worker's streams it is.
        report_received: Whether the worker wants to know how much has arrived.
        allowance: What the caller may take of the shard; None: it has no limits.
    """

    def __init__(
        self,
        engine: Engine,
        worker: pb.Worker,
        downlink: Codec,
        write: Callable[[Bulk[pb.ExchangeResponse]], Awaitable[None]],
        *,
        index: int = 0,
        report_received: bool = False,
        allowance: Allowance | None = None,
    ) -> None:
        self.worker = worker
        self.index = index
        self._downlink = downlink
        self._engine = engine
        self._write = write
        self._receiver = Receiver()
        self._incoming: _Incoming | None = None
        self._holding: Holding | None = None
        self._processing = asyncio.Semaphore(MAX_PROCESSING)
        self._allowance = allowance
        self._unsent: asyncio.Queue[tuple[int, Answer, _Queued | None]] = asyncio.Queue()
        self._num_encoded = 0
        self._num_deferred = 0
        self._has_room = asyncio.Event()
        self._has_room.set()
        self._read_no_more = asyncio.Event()
        self._end: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._ended = False
        self._received = Received(self._write_one) if report_received else None
        self._writing = asyncio.Lock()
        self._piece_size = PieceSize()

    async def run(self, messages: AsyncIterator[Bulk[pb.ExchangeRequest]]) -> None:
        """Serve the stream until the worker closes its side.

        Raises:
            PacelineError: The worker sent something that ends the stream, or the server stops; the text says what.
        """
        if self._downlink.name in DIFFERENCE_CODECS:
            self._holding = self._engine.holdings.begin(self.worker.worker_id, self.worker.incarnation)
        reading = asyncio.create_task(self._read(messages))
        sending = asyncio.create_task(self._send())
        parts: set[asyncio.Future[None]] = {reading, sending, self._end}
        if self._received is not None:
            parts.add(asyncio.create_task(self._received.report()))
        try:
            done, _ = await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
            for part in done:
                part.result()
        finally:
            self._engine.forget(self)
            tasks = parts - {self._end}
            for task in tasks:
                task.cancel()
            self._free()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def drain(self) -> None:
        """Read nothing more, answer what has been received whole and can be answered, and end the stream."""
        self._read_no_more.set()
        for _ in range(MAX_PROCESSING):
            await self._processing.acquire()
        await self._unsent.join()
        self.end(UnavailableError("the server is stopping; send again what it has not acknowledged"))

    def end(self, error: PacelineError) -> None:
        """End the stream with an error; does nothing if it has ended."""
        if not self._end.done():
            self._end.set_exception(error)

    def form(self, fragment: int) -> Form:
        """How the next update of a fragment is to be written."""
        if self._holding is None:
            return Form(codec=self._downlink)
        return self._holding.form(fragment, self._downlink, self._engine.shard.plan_of(fragment).num_elements)

    @property
    def has_values_waiting(self) -> bool:
        """Whether an update waits here with its values, or is being sent."""
        return self._num_encoded > 0

    def deliver(self, fragment: int, answer: Answer, update: Encoded | None) -> None:
        """Queue an answer; None: with the values that are the newest when its turn comes and there is room for them."""
        if update is not None and (self._ended or self._num_deferred or not self._follows(fragment, update.written)):
            # Behind an answer that waits for room it would keep what that one, or that of another stream, waits for.
            update.room.release()
            update = None
        if self._ended:
            return
        if update is not None:
            self._hold(fragment, update.written)
        self._num_encoded += update is not None
        self._num_deferred += update is None
        self._unsent.put_nowait((fragment, answer, None if update is None else _Queued.of(update)))
        if self._unsent.qsize() >= MAX_UNSENT:
            self._has_room.clear()

    def _follows(self, fragment: int, written: Written) -> bool:
        """Whether an update can be queued now: what the worker holds may have moved while it was written."""
        return self._holding is None or self._holding.held(fragment) is written.form.since

    def _hold(self, fragment: int, written: Written) -> None:
        if self._holding is not None:
            self._holding.keep(fragment, written.held)

    async def _read(self, messages: AsyncIterator[Bulk[pb.ExchangeRequest]]) -> None:
        async for message in messages:
            head, data = message
            self._engine.shard.membership.require(self._engine.clock(), self.worker.worker_id, self.worker.incarnation)
            if head.HasField("push"):
                self._note_speed(head.push)
                await self._begin(head.push)
            elif head.HasField("open"):
                raise InvalidInputError("a stream is opened once; `open` came again")
            if self._received is not None:
                self._received.add(len(data))
            await self._take(data)
            del message, data  # or it would stay until the next one comes

    async def _begin(self, push: pb.Push) -> None:
        """Get room for a push. Nothing is read meanwhile."""
        num_elements = self._engine.shard.push_elements(push.fragment)
        num_bytes = self._receiver.required_bytes(push.payload, num_elements)
        request = PushRequest(
            worker=self.worker.worker_id,
            incarnation=self.worker.incarnation,
            seq=push.seq,
            base_bin=push.base_bin,
            tokens=push.tokens if push.HasField("tokens") else None,
        )
        if self._allowance is not None:
            shard = self._engine.shard
            open_bin = shard.hosted(push.fragment)[0].ledger.issuing_bin
            key = (request.worker, request.incarnation, request.seq)
            self._allowance.push(push.fragment, open_bin, key, quota=shard.quota)
        await self._has_room.wait()
        room = await self._engine.buffers.incoming.reserve(num_bytes)
        room.begin_transfer(self._end_stalled)
        held_version = push.held_version if push.HasField("held_version") else None
        self._incoming = _Incoming(push.fragment, request, held_version, room)
        self._receiver.begin(push.payload, num_elements)

    async def _take(self, data: bytes | memoryview) -> None:
        """Take a message's payload bytes, and process the push that they complete."""
        assembly = self._receiver.add(data)
        if self._incoming is None:
            return
        self._incoming.room.moved()
        if assembly is None:
            return
        self._incoming.room.end_transfer()
        await self._process(self._incoming, assembly)

    async def _process(self, incoming: "_Incoming", assembly: Assembly) -> None:
        payload = assembly.payload()
        self._engine.shard.counters.bytes_received += payload.numel()
        await self._processing.acquire()
        if self._read_no_more.is_set():
            self._processing.release()
            # Nothing more is read; the drain ends the stream.
            await asyncio.shield(self._end)
        if self._holding is not None:
            self._holding.name(incoming.fragment, incoming.held_version)
        push = ReceivedPush(
            fragment=incoming.fragment,
            request=incoming.request,
            codec=assembly.codec,
            payload=payload,
            room=incoming.room,
        )
        if self._allowance is not None:
            try:
                await self._allowance.processing.acquire()
            except asyncio.CancelledError:
                self._processing.release()  # which the drain waits for
                raise
        try:
            processing = self._engine.submit(push, self)
        except PacelineError:
            self._release_turns()
            raise
        processing.add_done_callback(self._processed)
        self._incoming = None

    def _note_speed(self, push: pb.Push) -> None:
        if push.HasField("inner_step_us"):
            self._engine.shard.membership.report_speed(self.worker.worker_id, push.inner_step_us / 1e6)

    def _release_turns(self) -> None:
        self._processing.release()
        if self._allowance is not None:
            self._allowance.processing.release()

    def _processed(self, event: "asyncio.Task[None]") -> None:
        self._release_turns()
        error = event.exception()
        if error is not None and not self._end.done():
            self._end.set_exception(error)

    async def _send(self) -> None:
        while True:
            queued = await self._unsent.get()
            try:
                await self._send_update(*queued)
            finally:
                del queued
                self._unsent.task_done()

    async def _send_update(self, fragment: int, answer: Answer, queued: _Queued | None) -> None:
        if self._unsent.qsize() < MAX_UNSENT:
            self._has_room.set()
        if queued is None:
            answer, queued = await self._newest(fragment, answer)
        try:
            queued.room.begin_transfer(self._end_stalled)
            update = self._update(fragment, answer, queued)
            for piece in self._piece_size.cut(queued.values.payload):
                began_s = time.monotonic()
                await self._write_one(Bulk(pb.ExchangeResponse(update=update), piece))
                if len(piece) == self._piece_size.num_bytes:
                    self._piece_size.observe(time.monotonic() - began_s)
                queued.room.moved()
                update = None
            self._engine.shard.counters.bytes_sent += queued.values.payload.numel()
        finally:
            queued.room.release()
            self._num_encoded -= 1

    async def _newest(self, fragment: int, answer: Answer) -> tuple[Answer, _Queued]:
        """An answer that waited for room, and its update, whose turn to be sent has come."""
        answer, encoded = await self._engine.newest(fragment, answer, self.form(fragment))
        self._hold(fragment, encoded.written)
        self._num_deferred -= 1
        self._num_encoded += 1
        return answer, _Queued.of(encoded)

    async def _write_one(self, message: Bulk[pb.ExchangeResponse]) -> None:
        """Send a message; gRPC takes one at a time."""
        async with self._writing:
            await self._write(message)

    def _end_stalled(self) -> None:
        sentence = f"no message passed for {STALLED_S:g} s while other workers waited for the room that it held"
        self.end(UnavailableError(f"the exchange was ended: {sentence}; open it again"))

    def _free(self) -> None:
        """Give back everything; the error that ended the stream may keep this object alive for long."""
        self._ended = True
        if self._incoming is not None:
            self._incoming.room.release()
            self._incoming = None
        self._receiver = Receiver()
        if self._holding is not None:
            self._holding.end()
        while not self._unsent.empty():
            update = self._unsent.get_nowait()[2]
            self._unsent.task_done()
            if update is not None:
                update.room.release()
        if not self._end.cancel() and not self._end.cancelled():
            self._end.exception()  # seen, should another part have ended the stream before it

    def _update(self, fragment: int, answer: Answer, queued: _Queued) -> pb.Update | None:
        shard = self._engine.shard
        lr, momentum = shard.coefficients(fragment)
        return pb.Update(
            fragment=fragment,
            seq=answer.seq,
            bin=answer.bin,
            bins_late=answer.bins_late,
            refusal=answer.refusal,
            inner_steps=shard.membership.inner_steps(answer.worker),
            quota=shard.quota,
            payload=queued.values.announced,
            lr=lr,
            momentum=momentum,
            difference_to=queued.difference_to,
            version=queued.version,
            values_crc32=queued.values_crc32,
        )
