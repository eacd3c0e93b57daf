"""One worker's exchange stream: pushes in, updates out, at the same time, with bounded buffers.

Reading, applying and sending overlap, fragment by fragment. The stream stops reading while too many of its pushes are
being processed or too many of its updates wait for the link; gRPC's flow control then holds the worker back.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

from paceline_server.engine import Engine, ReceivedPush
from paceline_server.ledger import Answer, PushRequest
from paceline_wire.codecs.base import Codec
from paceline_wire.errors import InvalidInputError, UnavailableError
from paceline_wire.transfer import Outgoing, Receiver, pieces
from paceline_wire.v1 import parameter_server_pb2 as pb

MAX_PROCESSING = 4
"""Pushes of one stream that may be processed at once: enough to keep every stage busy, few enough to bound memory."""

MAX_UNSENT = 4
"""Updates that may wait for the link before the stream stops reading."""


class ExchangeStream:
    """A worker's open stream.

    Args:
        engine: The shard.
        worker: Who is at the other end.
        downlink: How its updates are to be written.
        write: Sends one message; returns when gRPC has room for the next.
    """

    def __init__(
        self,
        engine: Engine,
        worker: pb.Worker,
        downlink: Codec,
        write: Callable[[pb.ExchangeResponse], Awaitable[None]],
    ) -> None:
        self.downlink = downlink
        self._engine = engine
        self._worker = worker
        self._write = write
        self._receiver = Receiver()
        self._announced: pb.Push | None = None
        self._processing = asyncio.Semaphore(MAX_PROCESSING)
        self._unsent: asyncio.Queue[tuple[int, Answer, Outgoing]] = asyncio.Queue()
        self._has_room = asyncio.Event()
        self._has_room.set()
        self._read_no_more = asyncio.Event()
        self._end: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def run(self, messages: AsyncIterator[pb.ExchangeRequest]) -> None:
        """Serve the stream until the worker closes its side.

        Raises:
            PacelineError: The worker sent something that ends the stream, or the server stops; the text says what.
        """
        reading = asyncio.create_task(self._read(messages))
        sending = asyncio.create_task(self._send())
        parts: set[asyncio.Future[None]] = {reading, sending, self._end}
        try:
            done, _ = await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
            for part in done:
                part.result()
        finally:
            self._engine.forget(self)
            reading.cancel()
            sending.cancel()
            self._end.cancel()

    async def drain(self) -> None:
        """Read nothing more, answer what has been received whole and can be answered, and end the stream."""
        self._read_no_more.set()
        for _ in range(MAX_PROCESSING):
            await self._processing.acquire()
        await self._unsent.join()
        if not self._end.done():
            sentence = "the server is stopping; send again what it has not acknowledged"
            self._end.set_exception(UnavailableError(sentence))

    def deliver(self, fragment: int, answer: Answer, values: Outgoing) -> None:
        """Queue an answer with the fragment's values in the stream's downlink codec."""
        self._unsent.put_nowait((fragment, answer, values))
        if self._unsent.qsize() >= MAX_UNSENT:
            self._has_room.clear()

    async def _read(self, messages: AsyncIterator[pb.ExchangeRequest]) -> None:
        async for message in messages:
            self._engine.shard.membership.require(
                self._engine.clock(), self._worker.worker_id, self._worker.incarnation
            )
            if message.HasField("push"):
                self._announced = message.push
                self._note_speed(message.push)
                num_elements = self._engine.shard.push_elements(message.push.fragment)
                self._receiver.begin(message.push.payload, num_elements)
            elif message.HasField("open"):
                raise InvalidInputError("a stream is opened once; `open` came again")
            await self._take(message.data)

    async def _take(self, data: bytes) -> None:
        """Take a message's payload bytes, and process the push that they complete."""
        assembly = self._receiver.add(data)
        if assembly is None or self._announced is None:
            return
        announced = self._announced
        request = PushRequest(
            worker=self._worker.worker_id,
            incarnation=self._worker.incarnation,
            seq=announced.seq,
            base_bin=announced.base_bin,
            tokens=announced.tokens if announced.HasField("tokens") else None,
        )
        payload = assembly.payload()
        self._engine.shard.counters.bytes_received += payload.numel()
        await self._has_room.wait()
        await self._processing.acquire()
        if self._read_no_more.is_set():
            self._processing.release()
            return
        push = ReceivedPush(fragment=announced.fragment, request=request, codec=assembly.codec, payload=payload)
        self._engine.submit(push, self).add_done_callback(self._processed)

    def _note_speed(self, push: pb.Push) -> None:
        if push.HasField("inner_step_us"):
            self._engine.shard.membership.report_speed(self._worker.worker_id, push.inner_step_us / 1e6)

    def _processed(self, event: "asyncio.Task[None]") -> None:
        self._processing.release()
        error = event.exception()
        if error is not None and not self._end.done():
            self._end.set_exception(error)

    async def _send(self) -> None:
        while True:
            fragment, answer, values = await self._unsent.get()
            if self._unsent.qsize() < MAX_UNSENT:
                self._has_room.set()
            update = self._update(fragment, answer, values.announced)
            for piece in pieces(values.payload):
                await self._write(pb.ExchangeResponse(update=update, data=piece))
                update = None
            self._unsent.task_done()
            self._engine.shard.counters.bytes_sent += values.payload.numel()

    def _update(self, fragment: int, answer: Answer, announced: pb.Payload) -> pb.Update | None:
        shard = self._engine.shard
        lr, momentum = shard.coefficients(fragment)
        return pb.Update(
            fragment=fragment,
            seq=answer.seq,
            bin=answer.bin,
            bins_late=answer.bins_late,
            refusal=answer.refusal,
            inner_steps=shard.membership.inner_steps(answer.worker),
            quota=shard.schedule.quota or max(1, len(shard.membership.active)),
            payload=announced,
            lr=lr,
            momentum=momentum,
        )
