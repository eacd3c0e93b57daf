"""Calls to one shard that are made again while their failure may pass, and the first of them: what the shard hosts."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import grpc

from paceline.channels import Access, backoff_s, error_of
from paceline_wire import PROTOCOL_VERSION
from paceline_wire.errors import InvalidInputError, PacelineError, ProtocolVersionError, UnavailableError
from paceline_wire.v1 import parameter_server_pb2 as pb
from paceline_wire.v1 import parameter_server_pb2_grpc as pb_grpc

_Answer = TypeVar("_Answer")

CALL_S = 20.0
"""Seconds after which a call with one small answer counts as lost and is made again."""

REACH_S = 30.0
"""Seconds that a run gets to come up: server and workers are usually started together."""


async def called(call: Awaitable[_Answer], target: str) -> _Answer:
    """Wait for a call's answer.

    Raises:
        PacelineError: What the call's status stands for.
    """
    try:
        return await call
    except grpc.RpcError as error:
        raise error_of(error, target) from error


@contextmanager
def channel_may_close(target: str) -> Iterator[None]:
    """Around a call on a channel that may be closed meanwhile, which in grpc.aio cancels whoever waits for the answer.

    Raises:
        UnavailableError: The channel was closed.
    """
    try:
        yield
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise UnavailableError(f"the connection to {target} was replaced during the call") from None


async def persistently(attempt: Callable[[], Awaitable[_Answer]], patience_s: float = REACH_S) -> _Answer:
    """Try again, with back-off, while the failure is one that may pass.

    Raises:
        PacelineError: The last failure, once so many seconds have passed, or one that does not pass.
    """
    deadline_s = time.monotonic() + patience_s
    for delay_s in backoff_s(random.Random()):  # noqa: S311  # not for secrets
        try:
            return await attempt()
        except PacelineError as error:
            if not error.retryable or time.monotonic() + delay_s > deadline_s:
                raise
        await asyncio.sleep(delay_s)
    raise AssertionError("back-off never ends")


async def describe(
    stub: "pb_grpc.ParameterServerServiceAsyncStub", access: Access, target: str, timeout_s: float = CALL_S
) -> pb.DescribeResponse:
    """What a shard hosts, once.

    Raises:
        ProtocolVersionError: The shard speaks another version.
        PacelineError: It refuses, or cannot be reached.
    """
    request = pb.DescribeRequest(protocol_version=PROTOCOL_VERSION)
    description = await called(stub.Describe(request, timeout=timeout_s, metadata=access.metadata), target)
    newest, oldest = description.protocol_version, description.oldest_protocol_version or description.protocol_version
    if not oldest <= PROTOCOL_VERSION <= newest:
        older = "client" if oldest > PROTOCOL_VERSION else "server"
        spoken = f"versions {oldest} to {newest}" if oldest < newest else f"version {newest}"
        raise ProtocolVersionError(
            f"{target} speaks protocol {spoken} and this client version {PROTOCOL_VERSION}: upgrade the {older}"
        )
    if not description.shards:
        raise InvalidInputError(f"{target} does not say where the run's shards are; is it still starting?")
    return description
