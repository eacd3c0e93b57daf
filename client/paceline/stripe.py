"""One of a worker's connections to a shard: its channel, and what its stream has carried."""

import asyncio
import logging
from typing import cast

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from paceline.calls import CALL_S, channel_may_close
from paceline.channels import EXCHANGE_PING_S, Access
from paceline.silence import Silence
from paceline_wire.errors import UnavailableError
from paceline_wire.v1 import parameter_server_pb2_grpc as pb_grpc

_log = logging.getLogger(__name__)


class Stripe:
    """A connection and its exchange stream. Belongs to one event loop.

    Attributes:
        index: Which of the worker's streams to the shard it has.
        stub: Calls over the newest channel.
        silence: What it has carried.
        has_work: Set when its sender is to look for a push.
        answered_on_stream: Whether the stream has brought an answer.
        tasks: What serves it.

    Args:
        target: "host:port" of the shard.
        access: TLS and token.
        index: Which of the worker's streams to the shard it has.
    """

    def __init__(self, target: str, access: Access, index: int) -> None:
        self.index = index
        self.silence = Silence(CALL_S)
        self.has_work = asyncio.Event()
        self.answered_on_stream = False
        self.tasks: list[asyncio.Task[None]] = []
        self._target = target
        self._access = access
        self._dropped: asyncio.Future[None] | None = None
        self._channels: list[grpc.aio.Channel] = []
        self._open_channel()

    def _open_channel(self) -> None:
        self._channels.append(self._access.channel(self._target, EXCHANGE_PING_S))
        self.stub = pb_grpc.ParameterServerServiceStub(self.channel)

    @property
    def channel(self) -> grpc.aio.Channel:
        """The newest channel."""
        return self._channels[-1]

    def begin_stream(self) -> "asyncio.Future[None]":
        """Note that a stream begins; the future fails when it is to be given up."""
        self.silence.begin_stream()
        self.answered_on_stream = False
        self._dropped = asyncio.get_running_loop().create_future()
        return self._dropped

    def end_stream(self) -> None:
        """Note that the stream has ended."""
        dropped, self._dropped = self._dropped, None
        if dropped is not None and not dropped.cancel() and not dropped.cancelled():
            dropped.exception()  # seen, should another part have ended the stream before it

    def move(self, target: str) -> None:
        """Go on over a connection to another address of the same shard."""
        self._target = target
        self.replace_channel("the shard has moved")

    def replace_channel(
        self, reason: str = "heartbeats were not answered, and nothing came or went: the connection is replaced"
    ) -> bool:
        """Go on over a new TCP connection; returns whether there was a stream, which is dropped and resumed there."""
        self._open_channel()
        if self._dropped is not None and not self._dropped.done():
            self._dropped.set_exception(UnavailableError(reason))
            return True
        _log.info("%s: %s", self._target, reason)
        return False

    async def close_channels(self, keep: int = 0) -> None:
        """Close all but so many of the newest; nothing may be using the others."""
        closing, self._channels = self._channels[: len(self._channels) - keep], self._channels[-keep:] if keep else []
        await asyncio.gather(*(channel.close() for channel in closing))

    async def probe(self, deadline_s: float) -> None:
        """Ask for a small answer, which says that the connection is alive; heartbeats are the membership's.

        Raises:
            grpc.aio.AioRpcError: There was none.
            UnavailableError: The connection was replaced meanwhile.
        """
        health = health_pb2_grpc.HealthStub(self.channel)
        call = health.Check(health_pb2.HealthCheckRequest(), timeout=deadline_s)
        with channel_may_close(self._target):
            await cast("grpc.aio.UnaryUnaryCall[health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse]", call)
