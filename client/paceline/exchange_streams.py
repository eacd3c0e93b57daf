"""Exchange streams to one shard: kept open, sending pushes and taking updates in, resumed with what is unanswered."""

import asyncio
import logging
import random
import time
from collections.abc import Sequence
from typing import TypeAlias

import grpc

from paceline.channels import Access, backoff_s, error_of, error_of_status
from paceline.codec_threads import in_codec_thread_to_its_end
from paceline.connection_count import Meter
from paceline.dispatch import Dispatch, PushKey
from paceline.held import Held, follow
from paceline.membership import Membership
from paceline.pacing import Pace
from paceline.place import Place
from paceline.pushes import Unanswered
from paceline.stripe import Stripe
from paceline.worker import ReceivedUpdate
from paceline_wire import bulk, codecs
from paceline_wire.bulk import Bulk
from paceline_wire.codecs.base import Codec
from paceline_wire.errors import NotInitializedError, PacelineError, StorageFullError, UnavailableError
from paceline_wire.manifest import Manifest
from paceline_wire.transfer import Assembly, Receiver, pieces
from paceline_wire.v1 import parameter_server_pb2 as pb

_log = logging.getLogger(__name__)
_Updates: TypeAlias = "asyncio.Queue[tuple[pb.Update, Assembly]]"
_Call: TypeAlias = "grpc.aio.StreamStreamCall[Bulk[pb.ExchangeRequest], Bulk[pb.ExchangeResponse]]"


class ExchangeStreams:
    """What the streams of one connection share, and what serves each. Belongs to one event loop.

    Attributes:
        reconnects: How often a stream was resumed.
        dispatch: Which push goes over which stream.
        meter: What they have moved.
        unanswered: The pushes that wait for their updates.
        failure: What has ended the exchange for good; None: nothing.

    Args:
        access: TLS and token.
        membership: The worker's membership there.
        pace: How fast pushes may leave.
        stripes: The connection's stripes, whichever there are.
    """

    def __init__(self, access: Access, membership: Membership, pace: Pace, stripes: Sequence[Stripe]) -> None:
        self.reconnects = 0
        self.dispatch = Dispatch()
        self.meter = Meter()
        self.unanswered: dict[PushKey, Unanswered] = {}
        self.failure: PacelineError | None = None
        self._access = access
        self._membership = membership
        self._pace = pace
        self._stripes = stripes
        self._held: dict[int, Held] = {}
        # Seeded by the name: two workers never back off in step, and a test can repeat what it saw.
        self._jitter = random.Random(f"{membership.worker.worker_id}/{membership.target}")  # noqa: S311  # not for secrets
        self._downlink: Codec | None = None
        self._manifest: Manifest | None = None
        self._places: Sequence[Place] = ()
        self._momentum_follows = False
        self._storage_problem: str | None = None

    @property
    def target(self) -> str:
        """The shard, as "host:port"."""
        return self._membership.target

    @property
    def have_begun(self) -> bool:
        """Whether `begin` was called."""
        return self._manifest is not None

    def begin(self, manifest: Manifest, downlink: Codec, places: Sequence[Place], *, momentum_follows: bool) -> None:
        """Take what streams need to be served, see `ShardConnection.begin_exchange`."""
        self._manifest, self._downlink, self._places = manifest, downlink, places
        self._momentum_follows = momentum_follows

    def look_for_work(self) -> None:
        """Let every stream look for a push to send."""
        for stripe in self._stripes:
            stripe.has_work.set()

    async def serve(self, stripe: Stripe) -> None:
        """Keep exchanging; whatever ends that for good reaches everybody who waits."""
        try:
            await self._exchange_again_and_again(stripe)
        except NotInitializedError:
            self.fail(
                NotInitializedError(
                    f"{self.target} has lost this run: it came back without parameters, since it has no data directory "
                    "or an empty one. Start it with the run's data_dir, or begin anew: the first worker that joins "
                    "gives the run its parameters"
                )
            )
        except PacelineError as error:
            self.fail(error)
        except Exception as error:
            self.fail(PacelineError(f"the exchange with {self.target} failed: {error!r}"))
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
                    await self._membership.join(stripe)
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
        self.dispatch.begin_stream(stripe.index)
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
            self.dispatch.end_stream(stripe.index)
            self.meter.end_stream(time.monotonic(), stripe.index)
            self.look_for_work()
            call.cancel()

    async def _send(self, call: "_Call", stripe: Stripe) -> None:
        if self._downlink is None:
            raise UnavailableError("the exchange has not begun")
        opening = pb.ExchangeOpen(
            worker=self._membership.worker,
            downlink=codecs.wire_value(self._downlink),
            report_received=True,
            stream=stripe.index,
        )
        await call.write(Bulk(pb.ExchangeRequest(open=opening), b""))
        while True:
            while (key := self.dispatch.take(stripe.index)) is not None:
                push = self.unanswered[key].push
                held = self._held.get(push.fragment)
                announced: pb.Push | None = pb.Push(
                    fragment=push.fragment,
                    seq=push.seq,
                    base_bin=push.base_bin,
                    payload=push.outer_gradient.announced,
                    inner_step_us=self._membership.inner_step_us(),
                    tokens=push.tokens,
                    held_version=None if held is None else held.version,
                )
                for piece in pieces(push.outer_gradient.payload, stripe.silence.piece_size):
                    wait_s = self._pace.take(time.monotonic(), len(piece))
                    if wait_s:
                        await asyncio.sleep(wait_s)
                    now_s = time.monotonic()
                    stripe.silence.wrote(now_s, len(piece))
                    self.meter.under_way(now_s, stripe.index, "up", is_so=True)
                    await call.write(Bulk(pb.ExchangeRequest(push=announced), piece))
                    announced = None
            stripe.has_work.clear()
            await stripe.has_work.wait()

    def _arrived(self, stripe: Stripe, total_bytes: int) -> None:
        """Note that the shard has got so many payload bytes since the stream began."""
        now_s = time.monotonic()
        more_bytes = stripe.silence.arrived(now_s, total_bytes)
        self.meter.moved(now_s, stripe.index, "up", more_bytes, more_follows=stripe.silence.is_sending)
        self.dispatch.arrived(stripe.index, total_bytes)
        if self.dispatch.is_waiting:
            self.look_for_work()

    async def _receive(self, call: "_Call", stripe: Stripe, updates: "_Updates") -> None:
        receiver, announced = Receiver(), None
        try:
            await call.initial_metadata()
            self.dispatch.opened(stripe.index)
            self.look_for_work()
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
                self.meter.moved(now_s, stripe.index, "down", len(data), more_follows=assembly is None)
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
        unanswered = self.unanswered.get(PushKey(fragment, announced.seq))
        into = None if unanswered is None or unanswered.update.done() else unanswered.push.into
        if (unanswered is None or unanswered.update.done()) and not announced.HasField("version"):
            self._held.pop(fragment, None)
            return
        payload, sizes = assembly.payload(), self._sizes(fragment)
        # Nothing is held while it is followed: if that fails, the next stream names nothing.
        held = self._held.pop(fragment, None)
        # To its end: the answer on the next stream is written to the same place, and nothing may follow it there.
        followed = await in_codec_thread_to_its_end(
            follow, announced, assembly.codec, payload, sizes, held, self._places[fragment], into
        )
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

    def fail(self, error: PacelineError) -> None:
        """Give up: everything that waits, and every later push, gets this error."""
        self.failure = error
        for unanswered in list(self.unanswered.values()):
            if not unanswered.update.done():
                unanswered.update.set_exception(error)
