"""Calls that an operator makes to every shard of a run, each with an outcome of its own."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, TypeAlias, TypeVar

import grpc.aio

from paceline.calls import CALL_S, called
from paceline.channels import Access
from paceline.discovery import find_run
from paceline_wire.errors import PacelineError, UnavailableError
from paceline_wire.v1 import admin_pb2, admin_pb2_grpc

_Answer = TypeVar("_Answer")
Stub: TypeAlias = "admin_pb2_grpc.AdminServiceAsyncStub"


@dataclass(frozen=True, kw_only=True)
class Outcome(Generic[_Answer]):
    """What one shard made of a call.

    Attributes:
        shard: Its index.
        target: Its "host:port".
        answer: What it answered; None if it refused, or could not be reached.
        error: Why there is no answer; None if there is one.
    """

    shard: int
    target: str
    answer: _Answer | None = None
    error: PacelineError | None = None


async def on_every_shard(
    address: str,
    access: Access,
    call: Callable[[Stub, tuple[tuple[str, str], ...]], Awaitable[_Answer]],
    *,
    reach_s: float,
    only_if_all: bool = False,
) -> list[Outcome[_Answer]]:
    """Make a call to every shard of a run, beside each other.

    Args:
        address: "host:port" of any shard.
        access: TLS and token.
        call: Makes it, with a stub and the call's metadata.
        reach_s: Seconds to go on trying while the shard at the address cannot be reached.
        only_if_all: Whether to make it only if every shard answers now.

    Raises:
        UnavailableError: The shard at the address cannot be reached; or another one, with only_if_all, and nothing was
            called then.
        PacelineError: The shard at the address refuses to say where the others are.
    """
    _, targets = await find_run(address, access, reach_s)
    channels = [access.channel(target) for target in targets]
    try:
        if only_if_all:
            looks = await _outcomes(targets, channels, access, status_of)
            away = [look for look in looks if look.error is not None]
            if away:
                raise UnavailableError(
                    f"nothing was changed, since shard {away[0].shard} does not answer: {away[0].error}"
                )
        return await _outcomes(targets, channels, access, call)
    finally:
        await asyncio.gather(*(channel.close() for channel in channels))


async def status_of(stub: Stub, metadata: tuple[tuple[str, str], ...]) -> admin_pb2.StatusResponse:
    """One look at a shard."""
    return await stub.Status(admin_pb2.StatusRequest(), timeout=CALL_S, metadata=metadata)


async def _outcomes(
    targets: list[str],
    channels: list[grpc.aio.Channel],
    access: Access,
    call: Callable[[Stub, tuple[tuple[str, str], ...]], Awaitable[_Answer]],
) -> list[Outcome[_Answer]]:
    async def outcome(shard: int, target: str, channel: grpc.aio.Channel) -> Outcome[_Answer]:
        stub: Stub = admin_pb2_grpc.AdminServiceStub(channel)
        try:
            answer = await called(call(stub, access.metadata), target)
        except PacelineError as error:
            return Outcome(shard=shard, target=target, error=error)
        return Outcome(shard=shard, target=target, answer=answer)

    calls = (outcome(shard, *pair) for shard, pair in enumerate(zip(targets, channels, strict=True)))
    return list(await asyncio.gather(*calls))
