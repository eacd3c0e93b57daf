"""One worker's connection to one shard: membership, and pushes that survive lost connections.

A push is handed over once and its update is awaited; in between, the connection joins (membership.py), opens exchange
streams, sends, and when a stream breaks waits a little and begins again with everything that was not answered
(exchange_streams.py). The shard applies each push once, whatever is sent twice. There are as many streams, each on an
own TCP connection, as pay (connection_count.py); which push goes over which is up to dispatch.py. A TCP connection
that carries nothing any more is replaced by a new one: a gRPC channel would wait for its old one.
"""

import asyncio
import logging
import time
from collections.abc import Sequence
from contextlib import suppress

import grpc

from paceline.channels import Access
from paceline.connection_count import ConnectionCount
from paceline.dispatch import PushKey
from paceline.exchange_streams import ExchangeStreams
from paceline.membership import LostHeartbeatError, Membership
from paceline.pacing import Pace
from paceline.place import Place
from paceline.pushes import OutgoingPush, Unanswered
from paceline.silence import Silence
from paceline.stripe import Stripe
from paceline.whole_rounds import WholeRounds
from paceline.worker import ReceivedUpdate
from paceline.worker_state import Progress
from paceline_wire.codecs.base import Codec
from paceline_wire.errors import PacelineError, UnavailableError
from paceline_wire.manifest import Manifest
from paceline_wire.v1 import parameter_server_pb2 as pb

_log = logging.getLogger(__name__)


class ShardConnection:
    """A member's connection to one shard. Belongs to one event loop.

    Attributes:
        membership: What the shard tells of this worker's membership.

    Args:
        target: "host:port" of the shard.
        access: TLS and token.
        worker: Who this is.
        pace: How fast pushes may leave; None: as fast as the link takes them.
    """

    def __init__(self, target: str, access: Access, worker: pb.Worker, pace: Pace | None = None) -> None:
        self.membership = Membership(target, access, worker)
        self._access = access
        self._stripes = [Stripe(target, access, 0)]
        self._streams = ExchangeStreams(access, self.membership, pace or Pace(), self._stripes)
        self._retiring: set[asyncio.Task[None]] = set()
        self._connection_count = ConnectionCount(1, 1)
        self._before_change: set[PushKey] = set()
        self._rounds = WholeRounds(1)
        self._closed = False

    async def join(self) -> None:
        """Become a member, and stay one until `close`.

        Raises:
            PacelineError: The shard refuses, or cannot be reached.
        """
        first = self._stripes[0]
        await self.membership.join(first)
        first.tasks.append(asyncio.create_task(self._heartbeats(first)))

    def begin_exchange(
        self,
        manifest: Manifest,
        downlink: Codec,
        places: Sequence[Place],
        *,
        momentum_follows: bool,
        num_fragments: int,
        connection_count: ConnectionCount | None = None,
    ) -> None:
        """Open the exchange streams, and keep as many open as pay until `close`.

        Args:
            manifest: What the run exchanges.
            downlink: How updates are to be written.
            places: Where each fragment's updates are decoded, in the order of the plan.
            momentum_follows: Whether updates of parameters bring the server's momentum after the values.
            num_fragments: Fragments of the shard.
            connection_count: How many TCP connections there are to be; None: one.
        """
        self._streams.begin(manifest, downlink, places, momentum_follows=momentum_follows)
        self._rounds = WholeRounds(num_fragments)
        if connection_count is not None:
            if self._connection_count.round_trip_s is not None:
                connection_count.round_trip(self._connection_count.round_trip_s)
            self._connection_count = connection_count
        first = self._stripes[0]
        first.tasks.append(asyncio.create_task(self._streams.serve(first)))
        self._keep_connections(round_ended=True)

    @property
    def target(self) -> str:
        """The shard, as "host:port"."""
        return self.membership.target

    @property
    def reconnects(self) -> int:
        """How often a stream was resumed."""
        return self._streams.reconnects

    @property
    def exchanging(self) -> bool:
        """Whether begin_exchange was called."""
        return self._streams.have_begun

    @property
    def num_connections(self) -> int:
        """TCP connections that pushes go over now."""
        return self._streams.dispatch.num_streams

    @property
    def _silence(self) -> Silence:
        """What the connection with the heartbeats has carried."""
        return self._stripes[0].silence

    async def push(self, push: OutgoingPush) -> ReceivedUpdate:
        """Send a push until it is answered.

        Raises:
            PacelineError: The shard refuses this worker for good; lost connections never show.
        """
        if self._streams.failure is not None:
            raise type(self._streams.failure)(str(self._streams.failure))
        update: asyncio.Future[ReceivedUpdate] = asyncio.get_running_loop().create_future()
        key = PushKey(push.fragment, push.seq)
        self._streams.unanswered[key] = Unanswered(push, update)
        self._streams.dispatch.add(key, push.outer_gradient.payload.numel())
        self._streams.look_for_work()
        try:
            return await update
        finally:
            self._streams.unanswered.pop(key, None)
            self._streams.dispatch.answered(key)
            self._before_change.discard(key)
            more_follow = bool(self._streams.unanswered)
            self._keep_connections(round_ended=self._rounds.answered(push.fragment, more_follow=more_follow))

    def move(self, target: str) -> None:
        """Go on with the same shard at another "host:port"; what is unanswered is sent again there."""
        self.membership.target = target
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
        if self._streams.failure is None:
            self._streams.fail(UnavailableError(f"the connection to {self.target} was closed before the answer came"))
        with suppress(PacelineError):
            leaving = pb.LeaveRequest(worker=self.membership.worker)
            await self.membership.call(
                self._stripes[0].stub.Leave(leaving, timeout=2.0, metadata=self._access.metadata)
            )
        await asyncio.gather(*(stripe.close_channels() for stripe in self._stripes))

    async def take_over(self, previous: int) -> dict[int, Progress]:
        """Join once more, to go on with the pushes of an earlier incarnation; how far each fragment got with them.

        Raises:
            PacelineError: The shard refuses, or cannot be reached.
        """
        answer = await self.membership.join(self._stripes[0], previous)
        return {each.fragment: Progress(seq=each.seq, superseded=each.superseded) for each in answer.progress}

    def _keep_connections(self, *, round_ended: bool) -> None:
        """Have as many connections as pay; those too many are closed once nothing is left on them."""
        meter, now_s = self._streams.meter, time.monotonic()
        in_effect = not self._before_change
        wanted = self._connection_count.observe(
            now_s, meter.num_bytes, meter.active_s(now_s), in_effect=in_effect, round_ended=round_ended
        )
        if not self.exchanging or self._streams.failure is not None or self._closed:
            return
        if wanted != self._streams.dispatch.num_streams:
            _log.info("%s: pushes go over %d connections", self.target, wanted)
            self._streams.dispatch.num_streams = wanted
            self._before_change = set(self._streams.unanswered)
            self._streams.look_for_work()
        # One that is still being closed would take the new one of its index for itself.
        while len(self._stripes) < wanted and not self._retiring:
            stripe = Stripe(self.target, self._access, len(self._stripes))
            self._stripes.append(stripe)
            stripe.tasks += [
                asyncio.create_task(self._streams.serve(stripe)),
                asyncio.create_task(self._probes(stripe)),
            ]
        while self._streams.dispatch.is_done(len(self._stripes) - 1):
            retiring = asyncio.create_task(self._retire(self._stripes.pop()))
            self._retiring.add(retiring)
            retiring.add_done_callback(self._retiring.discard)

    async def _retire(self, stripe: Stripe) -> None:
        for task in stripe.tasks:
            task.cancel()
        await asyncio.gather(*stripe.tasks, return_exceptions=True)
        stripe.tasks.clear()
        await stripe.close_channels()

    async def _probes(self, stripe: Stripe) -> None:
        """Find out when a connection without heartbeats is dead."""
        wait_s = self.membership.heartbeat_s
        while True:
            await asyncio.sleep(wait_s)
            wait_s, sent_s = self.membership.heartbeat_s, time.monotonic()
            try:
                await stripe.probe(stripe.silence.deadline_s)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
                    continue  # what refuses at once is alive, or the stream knows
                wait_s = 0.0
                if stripe.silence.lost(time.monotonic(), sent_s):
                    stripe.replace_channel()
            except UnavailableError as error:
                _log.debug("a probe was not answered: %s", error)
            else:
                stripe.silence.answered(time.monotonic() - sent_s)

    async def _heartbeats(self, stripe: Stripe) -> None:
        wait_s = self.membership.heartbeat_s
        while True:
            await asyncio.sleep(wait_s)
            wait_s, sent_s = self.membership.heartbeat_s, time.monotonic()
            try:
                await self.membership.heartbeat(stripe)
            except LostHeartbeatError:
                wait_s = 0.0
                if (
                    stripe.silence.lost(time.monotonic(), sent_s)
                    and not stripe.replace_channel()
                    and not self.exchanging
                ):
                    await stripe.close_channels(keep=1)
            except PacelineError as error:
                if not error.retryable:
                    self._streams.fail(error)
                    return
                _log.debug("a heartbeat was refused: %s", error)
            else:
                took_s = time.monotonic() - sent_s
                stripe.silence.answered(took_s)
                self._connection_count.round_trip(took_s)
