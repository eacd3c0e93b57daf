"""One worker's connection to one shard: membership, and pushes that survive lost connections.

A push is handed over once and its update is awaited; in between, the connection joins, opens exchange streams, sends,
and when a stream breaks waits a little and begins again with everything that was not answered. The shard applies each
push once, whatever is sent twice. There are as many streams, each on a TCP connection of its own, as pay
(connection_count.py); which push goes over which is up to dispatch.py. A TCP connection that carries nothing any more
is replaced by a new one: a gRPC channel would wait for its old one.
"""

import asyncio
import logging
import random
import time
from collections.abc import Awaitable
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import grpc

from paceline.calls import CALL_S, called
from paceline.channels import Access, backoff_s, error_of, error_of_status
from paceline.codec_threads import in_codec_thread
from paceline.connection_count import ConnectionCount, Meter
from paceline.dispatch import Dispatch, PushKey
from paceline.held import Held, follow
from paceline.pacing import Pace
from paceline.silence import Silence
from paceline.stripe import Stripe
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

_log = logging.getLogger(__name__)
_Answer = TypeVar("_Answer")
_Updates: TypeAlias = "asyncio.Queue[tuple[pb.Update, Assembly]]"
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
        pace: How fast pushes may leave; None: as fast as the link takes them.
    """

    def __init__(self, target: str, access: Access, worker: pb.Worker, pace: Pace | None = None) -> None:
        self.target = target
        self.reconnects = 0
        self.worker_index = 0
        self.inner_steps = 0
        self.active_workers = 0
        self.inner_step_s: float | None = None
        self._access = access
        self._worker = worker
        self._pace = pace or Pace()
        self._stripes = [Stripe(target, access, 0)]
        self._retiring: set[asyncio.Task[None]] = set()
        self._dispatch = Dispatch()
        self._connection_count = ConnectionCount(1, 1)
        self._before_change: set[PushKey] = set()
        self._meter = Meter()
        self._unanswered: dict[PushKey, _Unanswered] = {}
        self._held: dict[int, Held] = {}
        # Seeded by the name: two workers never back off in step, and a test can repeat what it saw.
        self._jitter = random.Random(f"{worker.worker_id}/{target}")  # noqa: S311  # not for secrets
        self._downlink: Codec | None = None
        self._manifest: Manifest | None = None
        self._momentum_follows = False
        self._failure: PacelineError | None = None
        self._heartbeat_s = 10.0
        self._storage_problem: str | None = None
        self._closed = False

    async def join(self) -> None:
        """Become a member, and stay one until `close`.

        Raises:
            PacelineError: The shard refuses, or cannot be reached.
        """
        await self._join()
        first = self._stripes[0]
        first.tasks.append(asyncio.create_task(self._heartbeats(first)))

    def begin_exchange(
        self,
        manifest: Manifest,
        downlink: Codec,
        *,
        momentum_follows: bool,
        connection_count: ConnectionCount | None = None,
    ) -> None:
        """Open the exchange streams, and keep as many open as pay until `close`.

        Args:
            manifest: What the run exchanges.
            downlink: How updates are to be written.
            momentum_follows: Whether updates of parameters bring the server's momentum after the values.
            connection_count: How many TCP connections there are to be; None: one.
        """
        self._manifest, self._downlink, self._momentum_follows = manifest, downlink, momentum_follows
        if connection_count is not None:
            if self._connection_count.round_trip_s is not None:
                connection_count.round_trip(self._connection_count.round_trip_s)
            self._connection_count = connection_count
        first = self._stripes[0]
        first.tasks.append(asyncio.create_task(self._exchange(first)))
        self._keep_connections()

    @property
    def exchanging(self) -> bool:
        """Whether begin_exchange was called."""
        return self._manifest is not None

    @property
    def num_connections(self) -> int:
        """TCP connections that pushes go over now."""
        return self._dispatch.num_streams

    @property
    def _silence(self) -> Silence:
        """What the connection with the heartbeats has carried."""
        return self._stripes[0].silence

    async def push(self, push: OutgoingPush) -> ReceivedUpdate:
        """Send a push until it is answered.

        Raises:
            PacelineError: The shard refuses this worker for good; lost connections never show.
        """
        if self._failure is not None:
            raise type(self._failure)(str(self._failure))
        update: asyncio.Future[ReceivedUpdate] = asyncio.get_running_loop().create_future()
        key = PushKey(push.fragment, push.seq)
        self._unanswered[key] = _Unanswered(push, update)
        self._dispatch.add(key, push.outer_gradient.payload.numel())
        self._look_for_work()
        try:
            return await update
        finally:
            self._unanswered.pop(key, None)
            self._dispatch.answered(key)
            self._before_change.discard(key)
            self._keep_connections()

    def move(self, target: str) -> None:
        """Go on with the same shard at another "host:port"; what is unanswered is sent again there."""
        self.target = target
        for stripe in self._stripes:
            stripe.move(target)

    async def close(self) -> None:
        """Leave the run and end the connection. Closing twice is not an error."""
        if self._closed:
            return
        self._closed = True
        tasks = [task for stripe in self._stripes for task in stripe.tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, *self._retiring, return_exceptions=True)
        # Their errors hold this connection, and with it the last tensors: a cycle that lives until a full collection.
        del tasks
        for stripe in self._stripes:
            stripe.tasks.clear()
        if self._failure is None:
            self._fail(UnavailableError(f"the connection to {self.target} was closed before the answer came"))
        with suppress(PacelineError):
            leaving = pb.LeaveRequest(worker=self._worker)
            await self._call(self._stripes[0].stub.Leave(leaving, timeout=2.0, metadata=self._access.metadata))
        await asyncio.gather(*(stripe.close_channels() for stripe in self._stripes))

    async def take_over(self, previous: int) -> dict[int, Progress]:
        """Join once more, to go on with the pushes of an earlier incarnation; how far each fragment got with them.

        Raises:
            PacelineError: The shard refuses, or cannot be reached.
        """
        answer = await self._join(previous=previous)
        return {each.fragment: Progress(seq=each.seq, superseded=each.superseded) for each in answer.progress}

    async def _join(self, stripe: Stripe | None = None, previous: int | None = None) -> pb.JoinResponse:
        stub = (stripe or self._stripes[0]).stub
        request = pb.JoinRequest(protocol_version=PROTOCOL_VERSION, worker=self._worker, previous_incarnation=previous)
        answer = await self._call(stub.Join(request, timeout=CALL_S, metadata=self._access.metadata))
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

    def _keep_connections(self) -> None:
        """Have as many connections as pay; those too many are closed once nothing is left on them."""
        meter, now_s = self._meter, time.monotonic()
        in_effect = not self._before_change
        wanted = self._connection_count.observe(now_s, meter.num_bytes, meter.active_s(now_s), in_effect=in_effect)
        if not self.exchanging or self._failure is not None or self._closed:
            return
        if wanted != self._dispatch.num_streams:
            _log.info("%s: pushes go over %d connections", self.target, wanted)
            self._dispatch.num_streams = wanted
            self._before_change = set(self._unanswered)
            self._look_for_work()
        # One that is still being closed would take the new one of its index for itself.
        while len(self._stripes) < wanted and not self._retiring:
            stripe = Stripe(self.target, self._access, len(self._stripes))
            self._stripes.append(stripe)
            stripe.tasks += [asyncio.create_task(self._exchange(stripe)), asyncio.create_task(self._probes(stripe))]
        while self._dispatch.is_done(len(self._stripes) - 1):
            retiring = asyncio.create_task(self._retire(self._stripes.pop()))
            self._retiring.add(retiring)
            retiring.add_done_callback(self._retiring.discard)

    async def _retire(self, stripe: Stripe) -> None:
        for task in stripe.tasks:
            task.cancel()
        await asyncio.gather(*stripe.tasks, return_exceptions=True)
        stripe.tasks.clear()
        await stripe.close_channels()

    def _look_for_work(self) -> None:
        for stripe in self._stripes:
            stripe.has_work.set()

    async def _probes(self, stripe: Stripe) -> None:
        """Find out when a connection without heartbeats is dead."""
        wait_s = self._heartbeat_s
        while True:
            await asyncio.sleep(wait_s)
            wait_s, sent_s = self._heartbeat_s, time.monotonic()
            try:
                await stripe.probe(stripe.silence.deadline_s)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
                    continue  # what refuses at once is alive, or the stream knows
                wait_s = 0.0
                if stripe.silence.lost(time.monotonic(), sent_s):
                    stripe.replace_channel()
            else:
                stripe.silence.answered(time.monotonic() - sent_s)

    async def _heartbeats(self, stripe: Stripe) -> None:
        wait_s = self._heartbeat_s
        while True:
            await asyncio.sleep(wait_s)
            wait_s, sent_s = self._heartbeat_s, time.monotonic()
            try:
                await self._heartbeat(stripe)
            except _LostHeartbeatError:
                wait_s = 0.0
                if (
                    stripe.silence.lost(time.monotonic(), sent_s)
                    and not stripe.replace_channel()
                    and not self.exchanging
                ):
                    await stripe.close_channels(keep=1)
            except PacelineError as error:
                if not error.retryable:
                    self._fail(error)
                    return
                _log.debug("a heartbeat was refused: %s", error)
            else:
                took_s = time.monotonic() - sent_s
                stripe.silence.answered(took_s)
                self._connection_count.round_trip(took_s)

    async def _heartbeat(self, stripe: Stripe) -> None:
        """Renew the lease, or join again if it ran out."""
        request = pb.HeartbeatRequest(worker=self._worker, inner_step_us=self._inner_step_us())
        try:
            deadline_s, metadata = stripe.silence.deadline_s, self._access.metadata
            answer = await stripe.stub.Heartbeat(request, timeout=deadline_s, metadata=metadata)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise _LostHeartbeatError from error
            known = error_of(error, self.target)
            if not isinstance(known, NotAMemberError):
                raise known from error
            await self._join()
            return
        self.inner_steps, self.active_workers = answer.inner_steps, answer.active_workers

    async def _exchange(self, stripe: Stripe) -> None:
        """Keep exchanging; whatever ends that for good reaches everybody who waits."""
        try:
            await self._exchange_again_and_again(stripe)
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

    async def _exchange_again_and_again(self, stripe: Stripe) -> None:
        """Keep a stream open; what it had that is unanswered is sent again on every new one.

        Raises:
            PacelineError: The shard refuses this worker for good.
        """
        delays_s = backoff_s(self._jitter)
        is_first = True
        while True:
            try:
                await stripe.close_channels(keep=1)
                if not is_first:
                    await self._join(stripe)
                await self._stream(stripe)
                reason = "the server ended the stream"
            except StorageFullError as error:
                reason = str(error)
                self._warn_of_storage(reason)
            except PacelineError as error:
                if not error.retryable:
                    raise
                reason = str(error)
            is_first = False
            if stripe.answered_on_stream:
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

    async def _stream(self, stripe: Stripe) -> None:
        """Serve one stream until it ends.

        Raises:
            PacelineError: Why it ended, if not in order.
        """
        call: _Call = bulk.method(stripe.channel, "Exchange")(metadata=self._access.metadata)
        self._dispatch.begin_stream(stripe.index)
        dropped = stripe.begin_stream()
        updates: _Updates = asyncio.Queue(maxsize=1)
        work = (self._send(call, stripe), self._receive(call, stripe, updates), self._answer_all(stripe, updates))
        parts = {asyncio.create_task(part) for part in work}
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
            stripe.end_stream()
            for part in parts:
                part.cancel()
            await asyncio.gather(*parts, return_exceptions=True)
            self._dispatch.end_stream(stripe.index)
            self._meter.end_stream(time.monotonic(), stripe.index)
            self._look_for_work()
            call.cancel()

    async def _send(self, call: "_Call", stripe: Stripe) -> None:
        if self._downlink is None:
            raise UnavailableError("the exchange has not begun")
        opening = pb.ExchangeOpen(
            worker=self._worker,
            downlink=codecs.wire_value(self._downlink),
            report_received=True,
            stream=stripe.index,
        )
        await call.write(Bulk(pb.ExchangeRequest(open=opening), b""))
        while True:
            while (key := self._dispatch.take(stripe.index)) is not None:
                push = self._unanswered[key].push
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
                for piece in pieces(push.outer_gradient.payload, stripe.silence.piece_size):
                    wait_s = self._pace.take(time.monotonic(), len(piece))
                    if wait_s:
                        await asyncio.sleep(wait_s)
                    now_s = time.monotonic()
                    stripe.silence.wrote(now_s, len(piece))
                    self._meter.under_way(now_s, stripe.index, "up", is_so=True)
                    await call.write(Bulk(pb.ExchangeRequest(push=announced), piece))
                    announced = None
            stripe.has_work.clear()
            await stripe.has_work.wait()

    def _arrived(self, stripe: Stripe, total_bytes: int) -> None:
        """Note that the shard has got so many payload bytes since the stream began."""
        now_s = time.monotonic()
        more_bytes = stripe.silence.arrived(now_s, total_bytes)
        self._meter.moved(now_s, stripe.index, "up", more_bytes, more_follows=stripe.silence.is_sending)
        self._dispatch.arrived(stripe.index, total_bytes)
        if self._dispatch.is_waiting:
            self._look_for_work()

    async def _receive(self, call: "_Call", stripe: Stripe, updates: "_Updates") -> None:
        receiver, announced = Receiver(), None
        try:
            await call.initial_metadata()
            self._dispatch.opened(stripe.index)
            self._look_for_work()
            async for message, data in call:
                now_s = time.monotonic()
                if message.HasField("received_bytes"):
                    self._arrived(stripe, message.received_bytes)
                    continue
                if message.HasField("update"):
                    announced = message.update
                    receiver.begin(announced.payload, sum(self._sizes(announced.fragment)))
                assembly = receiver.add(data)
                stripe.silence.received(now_s, more_follows=assembly is None)
                self._meter.moved(now_s, stripe.index, "down", len(data), more_follows=assembly is None)
                if assembly is not None and announced is not None:
                    await updates.put((announced, assembly))
                del data, assembly
        finally:
            # The error that ends a stream holds this frame until a full collection; the payload must not stay as long.
            del receiver, announced

    async def _answer_all(self, stripe: Stripe, updates: "_Updates") -> None:
        """Take in one update of a stream after the other, while those behind it are received."""
        while True:
            await self._answer(*await updates.get())
            stripe.answered_on_stream = True

    async def _answer(self, announced: pb.Update, assembly: Assembly) -> None:
        """Decode an update beside the loop and hand it to whoever waits.

        A second answer to one push is dropped, unless later ones will be differences to it.
        """
        fragment = announced.fragment
        unanswered = self._unanswered.get(PushKey(fragment, announced.seq))
        if (unanswered is None or unanswered.update.done()) and not announced.HasField("version"):
            self._held.pop(fragment, None)
            return
        payload, sizes = assembly.payload(), self._sizes(fragment)
        # Nothing is held while it is followed: if that fails, the next stream names nothing.
        held = self._held.pop(fragment, None)
        followed = await in_codec_thread(follow, announced, assembly.codec, payload, sizes, held)
        if followed.held is not None:
            self._held[fragment] = followed.held
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
