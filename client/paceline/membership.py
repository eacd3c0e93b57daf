"""A worker's membership on one shard: joining, what the shard tells of it, and one heartbeat at a time."""

from collections.abc import Awaitable
from typing import TypeVar

import grpc

from paceline.calls import CALL_S, called, channel_may_close
from paceline.channels import Access, error_of
from paceline.stripe import Stripe
from paceline_wire import PROTOCOL_VERSION
from paceline_wire.errors import NotAMemberError
from paceline_wire.v1 import parameter_server_pb2 as pb

_Answer = TypeVar("_Answer")

HEARTBEATS_PER_LEASE = 3
"""A worker stays a member when two heartbeats in a row are lost."""


class LostHeartbeatError(Exception):
    """A heartbeat was not answered in time."""


class Membership:
    """A worker's membership on one shard. Belongs to one event loop.

    Attributes:
        target: "host:port" of the shard.
        worker: Who this is.
        worker_index: Its number among the active workers.
        inner_steps: Inner steps for its next round.
        active_workers: How many are active.
        inner_step_s: The mean seconds of its recent inner steps, which are reported; None: not known.
        heartbeat_s: Seconds between heartbeats.

    Args:
        target: "host:port" of the shard.
        access: TLS and token.
        worker: Who this is.
    """

    def __init__(self, target: str, access: Access, worker: pb.Worker) -> None:
        self.target = target
        self.worker = worker
        self.worker_index = 0
        self.inner_steps = 0
        self.active_workers = 0
        self.inner_step_s: float | None = None
        self.heartbeat_s = 10.0
        self._access = access

    async def join(self, stripe: Stripe, previous: int | None = None) -> pb.JoinResponse:
        """Become a member, or renew that; with previous, to go on with the pushes of an earlier incarnation.

        Raises:
            PacelineError: The shard refuses, or cannot be reached.
        """
        request = pb.JoinRequest(protocol_version=PROTOCOL_VERSION, worker=self.worker, previous_incarnation=previous)
        answer = await self.call(stripe.stub.Join(request, timeout=CALL_S, metadata=self._access.metadata))
        self.worker_index = answer.worker_index
        self.inner_steps = answer.inner_steps
        self.active_workers = answer.active_workers
        self.heartbeat_s = (answer.heartbeat_ms or answer.lease_ms / HEARTBEATS_PER_LEASE) / 1000
        return answer

    async def call(self, call: Awaitable[_Answer]) -> _Answer:
        """Wait for the answer to a call.

        Raises:
            PacelineError: The shard refuses, or cannot be reached.
        """
        with channel_may_close(self.target):
            return await called(call, self.target)

    async def heartbeat(self, stripe: Stripe) -> None:
        """Renew the lease, or join again if it ran out.

        Raises:
            LostHeartbeatError: It was not answered in time.
            PacelineError: The shard refuses, or cannot be reached.
        """
        request = pb.HeartbeatRequest(worker=self.worker, inner_step_us=self.inner_step_us())
        try:
            deadline_s, metadata = stripe.silence.deadline_s, self._access.metadata
            with channel_may_close(self.target):
                answer = await stripe.stub.Heartbeat(request, timeout=deadline_s, metadata=metadata)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise LostHeartbeatError from error
            known = error_of(error, self.target)
            if not isinstance(known, NotAMemberError):
                raise known from error
            await self.join(stripe)
            return
        self.inner_steps, self.active_workers = answer.inner_steps, answer.active_workers

    def inner_step_us(self) -> int | None:
        """The mean microseconds of recent inner steps, as they are reported; None until they are known."""
        return None if self.inner_step_s is None else max(1, round(self.inner_step_s * 1e6))
