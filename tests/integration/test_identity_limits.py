"""What one identity takes of a running shard is bounded, and another notices nothing of it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from integration.authority import make_authority, security_of, token_of
from integration.inside import serving
from integration.patience import PATIENCE_S, wait_until_async
from paceline.channels import error_of
from paceline_server.security.limits import MAX_WAITING_CALLS
from paceline_wire.errors import LimitExceededError
from paceline_wire.v1 import parameter_server_pb2 as pb
from paceline_wire.v1 import parameter_server_pb2_grpc as pb_grpc

GREEDY, MODEST = 4 * 1024 * 1024, 96 * 1024
PIECE = 32 * 1024


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority with two workers."""
    made = tmp_path_factory.mktemp("limits") / "certs"
    make_authority(made, "--worker", "a", "--worker", "b")
    return made


def config(folder: Path, **limits: float) -> dict[str, Any]:
    """A server with these limits."""
    return {"security": {"token_key": security_of(folder)["token_key"]}, "limits": limits}


@asynccontextmanager
async def connected(address: str, folder: Path, name: str) -> AsyncIterator[tuple[Any, Any]]:
    """An identity's own connection: a stub, and the metadata of its calls."""
    own = (("grpc.use_local_subchannel_pool", 1),)
    async with grpc.aio.insecure_channel(address, options=own) as channel:
        yield pb_grpc.ParameterServerServiceStub(channel), (("authorization", f"Bearer {token_of(folder, name)}"),)


class Probing:
    """A probe that moves bytes one way, and how many have moved."""

    def __init__(self, stub: Any, metadata: Any, way: str, num_bytes: int) -> None:
        self.moved = 0
        self._way = way
        self._num_bytes = num_bytes
        self._call = stub.Probe(metadata=metadata, timeout=PATIENCE_S)

    async def run(self) -> None:
        """Move them."""
        asking = asyncio.create_task(self._ask())
        async for answer in self._call:
            self.moved = answer.received_bytes if self._way == "upload" else self.moved + len(answer.data)
        await asking

    async def _ask(self) -> None:
        if self._way == "download":
            await self._call.write(pb.ProbeRequest(download_bytes=self._num_bytes))
        else:
            for _ in range(self._num_bytes // PIECE):
                await self._call.write(pb.ProbeRequest(data=bytes(PIECE)))
        await self._call.done_writing()


@pytest.mark.parametrize("way", ["upload", "download"])
async def test_bytes_are_slowed_down_for_one_and_not_for_another(folder: Path, way: str) -> None:
    """At 1 Mbit/s four MiB take half a minute: whoever moves less is done long before, and began later."""
    async with (
        serving(config(folder, mbit=1.0)) as address,
        connected(address, folder, "a") as greedy,
        connected(address, folder, "b") as modest,
    ):
        much, little = Probing(*greedy, way, GREEDY), Probing(*modest, way, MODEST)
        running = asyncio.create_task(much.run())
        await greedy[0].Describe(pb.DescribeRequest(), metadata=greedy[1])
        await little.run()
        assert little.moved == MODEST
        assert not running.done()
        assert much.moved < GREEDY / 2
        running.cancel()
        await asyncio.wait({running})


async def test_calls_wait_for_their_turn_and_too_many_are_refused(folder: Path) -> None:
    """A flood of one identity waits and is refused at last; another's calls, made later, are answered before."""

    async def describe(stub: Any, metadata: Any) -> str:
        try:
            await stub.Describe(pb.DescribeRequest(), metadata=metadata)
        except grpc.aio.AioRpcError as error:
            refused = error_of(error, "the shard")
            assert isinstance(refused, LimitExceededError)
            return str(refused)
        return ""

    async with (
        serving(config(folder, calls_per_s=5)) as address,
        connected(address, folder, "a") as flooding,
        connected(address, folder, "b") as modest,
    ):
        flood = {asyncio.create_task(describe(*flooding)) for _ in range(10 + MAX_WAITING_CALLS + 20)}

        async def any_is_refused() -> bool:
            return any(call.done() and call.result() for call in flood)

        await wait_until_async(any_is_refused)
        sentence = f"'a' has {MAX_WAITING_CALLS} calls waiting for their turn, at limits.calls_per_s = 5"
        assert all(sentence in call.result() for call in flood if call.done() and call.result())
        assert await asyncio.gather(*(describe(*modest) for _ in range(5))) == [""] * 5
        answered = [call for call in flood if call.done() and not call.result()]
        assert 10 <= len(answered) < 10 + MAX_WAITING_CALLS
        for call in flood:
            call.cancel()
        await asyncio.wait(flood)


async def test_streams_are_refused_with_a_sentence(folder: Path) -> None:
    """Of all kinds together; another identity has as many of its own, and a closed one makes room."""

    async def opened(stub: Any, metadata: Any) -> Any:
        call = stub.Probe(metadata=metadata, timeout=PATIENCE_S)
        await call.write(pb.ProbeRequest(ping=1))
        await call.read()
        return call

    async with (
        serving(config(folder, streams=2)) as address,
        connected(address, folder, "a") as greedy,
        connected(address, folder, "b") as modest,
    ):
        held = [await opened(*whose) for whose in (greedy, greedy, modest, modest)]
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await anext(aiter(greedy[0].Fetch(pb.FetchRequest(), metadata=greedy[1])))
        error = error_of(refused.value, "the shard")
        assert isinstance(error, LimitExceededError)
        assert "'a' has limits.streams = 2 streams open on this shard; close some" in str(error)
        await held[0].done_writing()
        assert await held[0].code() is grpc.StatusCode.OK
        held.append(await opened(*greedy))
        for call in held[1:]:
            await call.done_writing()
            await call.code()
