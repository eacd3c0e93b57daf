"""One worker's connection to one shard: membership, and pushes that survive lost connections.

A push is handed over once and its update is awaited; in between, the connection joins, opens the exchange stream,
sends, and when the stream breaks waits a little and begins again with everything that was not answered. The shard
applies each push once, whatever is sent twice. A connection that carries nothing any more is replaced by a new one: a
gRPC channel would wait for its old TCP connection.
"""

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import Awaitable
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import grpc

from paceline.calls import CALL_S, called
from paceline.channels import EXCHANGE_PING_S, Access, backoff_s, error_of, error_of_status
from paceline.codec_threads import in_codec_thread
from paceline.held import Held, follow
from paceline.silence import Silence
from paceline.worker import ReceivedUpdate
from paceline.worker_state import Progress
from paceline_wire import PROTOCOL_VERSION, bulk, codecs
from paceline_wire.bulk import Bulk
from paceline_wire.codecs.base import Codec
from paceline_wire.errors import (
    NotAMemberError,
    NotInitializedError,
    PacelineError,
    StorageFullError,
    UnavailableError,
)
from paceline_wire.manifest import Manifest
from paceline_wire.transfer import Assembly, Outgoing, Receiver, pieces
from paceline_wire.v1 import parameter_server_pb2 as pb
from paceline_wire.v1 import parameter_server_pb2_grpc as pb_grpc

_log = logging.getLogger(__name__)
_Answer = TypeVar("_Answer")
_Call: TypeAlias = "grpc.aio.StreamStreamCall[Bulk[pb.ExchangeRequest], Bulk[pb.ExchangeResponse]]"

HEARTBEATS_PER_LEASE = 3
"""A worker stays a member when two heartbeats in a row are lost."""


@dataclass(frozen=True, kw_only=True, eq=False)
class OutgoingPush:
    """An encoded outer gradient on its way.

    Attributes:
        fragment: The fragment's index.
        seq: Counts this incarnation's pushes to the fragment from 1.
        base_bin: The bin of the newest values that the worker held.
        outer_gradient: The encoding; its bytes MUST not change until the update comes.
        tokens: Tokens or samples that it stands for; None if nobody counted them.
    """

    fragment: int
    seq: int
    base_bin: int
    outer_gradient: Outgoing
    tokens: int | None = None


@dataclass(eq=False)
class _Unanswered:
    push: OutgoingPush
    update: "asyncio.Future[ReceivedUpdate]"


class _LostHeartbeatError(Exception):
    """A heartbeat was not answered in time."""


class ShardConnection:
    """A member's connection to one shard. Belongs to one event loop.

    Args:
        target: "host:port" of the shard.
        access: TLS and token.
        worker: Who this is.
    """

    def __init__(self, target: str, access: Access, worker: pb.Worker) -> None:
        self.target = target
        self.reconnects = 0
        self.worker_index = 0
        self.inner_steps = 0
        self.active_workers = 0
        self.inner_step_s: float | None = None
        self._access = access
        self._worker = worker
        self._silence = Silence(CALL_S)
        self._stream_dropped: asyncio.Future[None] | None = None
        self._channels = [access.channel(target, EXCHANGE_PING_S)]
        self._stub = pb_grpc.ParameterServerServiceStub(self._channels[-1])
        self._unanswered: dict[tuple[int, int], _Unanswered] = {}
        self._held: dict[int, Held] = {}
        self._to_send: deque[_Unanswered] = deque()
        self._has_work = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        # Seeded by the name: two workers never back off in step, and a test can repeat what it saw.
        self._jitter = random.Random(f"{worker.worker_id}/{target}")  # noqa: S311  # not for secrets
        self._downlink: Codec | None = None
        self._manifest: Manifest | None = None
        self._momentum_follows = False
        self._failure: PacelineError | None = None
        self._answered_on_stream = False
        self._heartbeat_s = 10.0
        self._storage_problem: str | None = None
        self._closed = False

    async def join(self) -> None:
        """Become a member, and stay one until `close`.

        Raises:
            PacelineError: The shard refuses, or cannot be reached.
        """
        await self._join()
        self._tasks.append(asyncio.create_task(self._heartbeats()))

    def begin_exchange(self, manifest: Manifest, downlink: Codec, *, momentum_follows: bool) -> None:
        """Open the exchange stream, and keep one open until `close`.

        Args:
            manifest: What the run exchanges.
            downlink: How updates are to be written.
            momentum_follows: Whether updates of parameters bring the server's momentum after the values.
        """
        self._manifest, self._downlink, self._momentum_follows = manifest, downlink, momentum_follows
        self._tasks.append(asyncio.create_task(self._exchange()))

    @property
    def exchanging(self) -> bool:
        """Whether begin_exchange was called."""
        return self._manifest is not None

    async def push(self, push: OutgoingPush) -> ReceivedUpdate:
        """Send a push until it is answered.

        Raises:
            PacelineError: The shard refuses this worker for good; lost connections never show.
        """
        if self._failure is not None:
            raise type(self._failure)(str(self._failure))
        update: asyncio.Future[ReceivedUpdate] = asyncio.get_running_loop().create_future()
        unanswered = _Unanswered(push, update)
        self._unanswered[push.fragment, push.seq] = unanswered
        self._to_send.append(unanswered)
        self._has_work.set()
        try:
            return await update
        finally:
            self._unanswered.pop((push.fragment, push.seq), None)

    async def close(self) -> None:
        """Leave the run and end the connection. Closing twice is not an error."""
        if self._closed:
            return
        self._closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        # Their errors hold this connection, and with it the last tensors: a cycle that lives until a full collection.
        self._tasks.clear()
        if self._failure is None:
            self._fail(UnavailableError(f"the connection to {self.target} was closed before the answer came"))
        with suppress(PacelineError):
            await self._call(
                self._stub.Leave(pb.LeaveRequest(worker=self._worker), timeout=2.0, metadata=self._access.metadata)
            )
        await self._close_channels()

    async def take_over(self, previous: int) -> dict[int, Progress]:
        """Join once more, to go on with the pushes of an earlier incarnation; how far each fragment got with them.

        Raises:
            PacelineError: The shard refuses, or cannot be reached.
        """
        answer = await self._join(previous)
        return {each.fragment: Progress(seq=each.seq, superseded=each.superseded) for each in answer.progress}

    async def _join(self, previous: int | None = None) -> pb.JoinResponse:
        request = pb.JoinRequest(protocol_version=PROTOCOL_VERSION, worker=self._worker, previous_incarnation=previous)
        answer = await self._call(self._stub.Join(request, timeout=CALL_S, metadata=self._access.metadata))
        self.worker_index = answer.worker_index
        self.inner_steps = answer.inner_steps
        self.active_workers = answer.active_workers
        self._heartbeat_s = (answer.heartbeat_ms or answer.lease_ms / HEARTBEATS_PER_LEASE) / 1000
        return answer

    async def _call(self, call: Awaitable[_Answer]) -> _Answer:
        try:
            return await called(call, self.target)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            # The call was cancelled and not the caller: its channel was replaced.
            raise UnavailableError(f"the connection to {self.target} was replaced during the call") from None

    async def _heartbeats(self) -> None:
        wait_s = self._heartbeat_s
        while True:
            await asyncio.sleep(wait_s)
            wait_s, sent_s = self._heartbeat_s, time.monotonic()
            try:
                await self._heartbeat(self._silence.deadline_s)
            except _LostHeartbeatError:
                wait_s = 0.0
                if self._silence.lost(time.monotonic(), sent_s):
                    await self._replace_channel()
            except PacelineError as error:
                if not error.retryable:
                    self._fail(error)
                    return
                _log.debug("a heartbeat was refused: %s", error)
            else:
                self._silence.answered(time.monotonic() - sent_s)

    async def _heartbeat(self, deadline_s: float) -> None:
        """Renew the lease, or join again if it ran out."""
        request = pb.HeartbeatRequest(worker=self._worker, inner_step_us=self._inner_step_us())
        try:
            answer = await self._stub.Heartbeat(request, timeout=deadline_s, metadata=self._access.metadata)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise _LostHeartbeatError from error
            known = error_of(error, self.target)
            if not isinstance(known, NotAMemberError):
                raise known from error
            await self._join()
            return
        self.inner_steps, self.active_workers = answer.inner_steps, answer.active_workers

    async def _replace_channel(self) -> None:
        """Go on over a new TCP connection; the stream, if there is one, is dropped and resumed there."""
        self._channels.append(self._access.channel(self.target, EXCHANGE_PING_S))
        self._stub = pb_grpc.ParameterServerServiceStub(self._channels[-1])
        reason = "heartbeats were not answered, and nothing came or went: the connection is replaced"
        if self._stream_dropped is not None and not self._stream_dropped.done():
            self._stream_dropped.set_exception(UnavailableError(reason))
            return
        _log.info("%s: %s", self.target, reason)
        if not self.exchanging:
            await self._close_channels(keep=1)

    async def _close_channels(self, keep: int = 0) -> None:
        """Close all but so many of the newest; nothing may be using the others."""
        closing, self._channels = self._channels[: len(self._channels) - keep], self._channels[-keep:] if keep else []
        await asyncio.gather(*(channel.close() for channel in closing))

    async def _exchange(self) -> None:
        """Keep exchanging; whatever ends that for good reaches everybody who waits."""
        try:
            await self._exchange_again_and_again()
        except NotInitializedError:
            self._fail(
                NotInitializedError(
                    f"{self.target} has lost this run: it came back without parameters, since it has no data directory "
                    "or an empty one. Start it with the run's data_dir, or begin anew: the first worker that joins "
                    "gives the run its parameters"
                )
            )
        except PacelineError as error:
            self._fail(error)
        except Exception as error:
            self._fail(PacelineError(f"the exchange with {self.target} failed: {error!r}"))
            raise

    async def _exchange_again_and_again(self) -> None:
        """Keep a stream open; everything unanswered is sent again on every new one.

        Raises:
            PacelineError: The shard refuses this worker for good.
        """
        delays_s = backoff_s(self._jitter)
        while True:
            self._answered_on_stream = False
            try:
                await self._close_channels(keep=1)
                if self.reconnects:
                    await self._join()
                await self._stream()
                reason = "the server ended the stream"
            except StorageFullError as error:
                reason = str(error)
                self._warn_of_storage(reason)
            except PacelineError as error:
                if not error.retryable:
                    raise
                reason = str(error)
            if self._answered_on_stream:
                self._storage_problem = None
                delays_s = backoff_s(self._jitter)
            delay_s = next(delays_s)
            _log.info("the exchange with %s broke off (%s); resuming in %.1f s", self.target, reason, delay_s)
            await asyncio.sleep(delay_s)
            self.reconnects += 1

    def _warn_of_storage(self, problem: str) -> None:
        if problem != self._storage_problem:
            self._storage_problem = problem
            _log.warning("%s takes no pushes until there is room on its disk; waiting: %s", self.target, problem)

    async def _stream(self) -> None:
        """Serve one stream until it ends.

        Raises:
            PacelineError: Why it ended, if not in order.
        """
        call: _Call = bulk.method(self._channels[-1], "Exchange")(metadata=self._access.metadata)
        self._to_send = deque(self._unanswered.values())
        self._silence.begin_stream()
        parts = {asyncio.create_task(self._send(call)), asyncio.create_task(self._receive(call))}
        dropped = self._stream_dropped = asyncio.get_running_loop().create_future()
        try:
            done, _ = await asyncio.wait({*parts, dropped}, return_when=asyncio.FIRST_COMPLETED)
            for part in done:
                part.result()
        except grpc.RpcError as error:
            raise error_of(error, self.target) from error
        except asyncio.InvalidStateError as error:
            # grpc.aio's writes say so when the stream has ended meanwhile; the status tells why.
            metadata = await call.trailing_metadata()
            raise error_of_status(await call.code(), await call.details(), metadata, self.target) from error
        finally:
            self._stream_dropped = None
            if not dropped.cancel() and not dropped.cancelled():
                dropped.exception()  # seen, should another part have ended the stream before it
            for part in parts:
                part.cancel()
            await asyncio.gather(*parts, return_exceptions=True)
            call.cancel()

    async def _send(self, call: "_Call") -> None:
        if self._downlink is None:
            raise UnavailableError("the exchange has not begun")
        opening = pb.ExchangeOpen(worker=self._worker, downlink=codecs.wire_value(self._downlink), report_received=True)
        await call.write(Bulk(pb.ExchangeRequest(open=opening), b""))
        while True:
            while self._to_send:
                push = self._to_send.popleft().push
                held = self._held.get(push.fragment)
                announced: pb.Push | None = pb.Push(
                    fragment=push.fragment,
                    seq=push.seq,
                    base_bin=push.base_bin,
                    payload=push.outer_gradient.announced,
                    inner_step_us=self._inner_step_us(),
                    tokens=push.tokens,
                    held_version=None if held is None else held.version,
                )
                for piece in pieces(push.outer_gradient.payload, self._silence.piece_size):
                    self._silence.wrote(time.monotonic(), len(piece))
                    await call.write(Bulk(pb.ExchangeRequest(push=announced), piece))
                    announced = None
            self._has_work.clear()
            await self._has_work.wait()

    async def _receive(self, call: "_Call") -> None:
        receiver, announced = Receiver(), None
        try:
            async for message, data in call:
                now_s = time.monotonic()
                if message.HasField("received_bytes"):
                    self._silence.arrived(now_s, message.received_bytes)
                    continue
                if message.HasField("update"):
                    announced = message.update
                    receiver.begin(announced.payload, sum(self._sizes(announced.fragment)))
                assembly = receiver.add(data)
                self._silence.received(now_s, more_follows=assembly is None)
                if assembly is not None and announced is not None:
                    await self._answer(announced, assembly)
                del data, assembly
        finally:
            # The error that ends a stream holds this frame until a full collection; the payload must not stay as long.
            del receiver, announced

    async def _answer(self, announced: pb.Update, assembly: Assembly) -> None:
        """Decode an update beside the loop and hand it to whoever waits.

        A second answer to one push is dropped, unless later ones will be differences to it.
        """
        fragment = announced.fragment
        unanswered = self._unanswered.get((fragment, announced.seq))
        if (unanswered is None or unanswered.update.done()) and not announced.HasField("version"):
            self._held.pop(fragment, None)
            return
        payload, sizes = assembly.payload(), self._sizes(fragment)
        # Nothing is held while it is followed: if that fails, the next stream names nothing.
        held = self._held.pop(fragment, None)
        followed = await in_codec_thread(follow, announced, assembly.codec, payload, sizes, held)
        if followed.held is not None:
            self._held[fragment] = followed.held
        self._answered_on_stream = True
        if unanswered is None or unanswered.update.done():
            return
        unanswered.update.set_result(
            ReceivedUpdate(
                values=followed.values,
                server_momentum=followed.behind if sizes[1] else None,
                bin=announced.bin,
                bins_late=announced.bins_late,
                refusal=announced.refusal if announced.HasField("refusal") else None,
                inner_steps=announced.inner_steps,
                quota=announced.quota,
                lr=announced.lr,
                momentum=announced.momentum,
                num_bytes=payload.numel(),
            )
        )

    def _sizes(self, fragment: int) -> tuple[int, int]:
        """Values, and elements of momentum after them, in an update of a fragment."""
        fragments = self._manifest.fragments if self._manifest is not None else ()
        if fragment >= len(fragments):
            raise PacelineError(f"{self.target} sent an update for fragment {fragment}, which the run does not have")
        plan = fragments[fragment]
        return plan.num_elements, plan.num_elements if self._momentum_follows and plan.role == "parameter" else 0

    def _inner_step_us(self) -> int | None:
        return None if self.inner_step_s is None else max(1, round(self.inner_step_s * 1e6))

    def _fail(self, error: PacelineError) -> None:
        """Give up: everything that waits, and every later push, gets this error."""
        self._failure = error
        for unanswered in list(self._unanswered.values()):
            if not unanswered.update.done():
                unanswered.update.set_exception(error)
