"""An uploader that dies between two shards leaves a run that the next worker begins anew, from one model."""

import asyncio
from collections.abc import Iterator

import grpc.aio
import pytest
import torch

import paceline
import paceline_server
from integration.patience import PATIENCE_S, wait_until_async
from integration.raw import RawWorker
from paceline.fragments import gather, manifest_of
from paceline_server.server import ShardServer
from paceline_server.settings import config_from_mapping
from paceline_wire.errors import UnavailableError
from paceline_wire.manifest import Manifest
from paceline_wire.v1 import parameter_server_pb2 as pb
from paceline_wire.v1 import parameter_server_pb2_grpc as pb_grpc

SIZE = 700
THEIRS = {"x": torch.full((SIZE,), -1.0)}
OURS = {"x": torch.linspace(0.0, 1.0, SIZE)}
CONFIG = {"shards": 2, "exchange": {"fragment_elements": 256, "uplink": "fp32", "downlink": "fp32"}}


@pytest.fixture
def address() -> Iterator[str]:
    """Two shards without parameters."""
    with paceline_server.local(CONFIG) as found:
        yield found


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """An upload on which nobody works is given up soon."""
    monkeypatch.setattr("paceline.initialization.PATIENCE_S", 0.5)


def manifest() -> Manifest:
    """What all of them exchange."""
    return manifest_of(OURS, (), 256)


def upload_to(raw: RawWorker, shard: int) -> None:
    """Upload to one shard only."""
    fragments = manifest().fragments_of_shard(shard, 2)
    raw.initialize(manifest().to_wire(), {each.index: gather(each, THEIRS) for each in fragments})


async def test_the_next_worker_replaces_it(address: str) -> None:
    """After its patience a worker gives all shards its own parameters, and the run goes on from those."""
    with RawWorker(address) as raw:
        upload_to(raw, 0)
        async with paceline.connect(address, worker_id="next") as client:
            await client.initialize(OURS)
            base = await client.fetch()
            assert torch.equal(OURS["x"], base.tensors["x"])
            moved = await client.exchange({"x": torch.ones(SIZE)}, base)
            assert not torch.equal(base.tensors["x"], moved.tensors["x"])
        assert raw.describe().initialization_id != 7


async def test_of_several_one_replaces_it(address: str) -> None:
    """Workers that wait together all end with the parameters of one of them."""
    with RawWorker(address) as raw:
        upload_to(raw, 0)
    models = [{"x": torch.full((SIZE,), float(number))} for number in range(3)]

    async def initialized(number: int) -> torch.Tensor:
        async with paceline.connect(address, worker_id=f"w{number}") as client:
            await client.initialize(models[number])
            return (await client.fetch()).tensors["x"]

    found = await asyncio.gather(*(initialized(number) for number in range(3)))
    assert all(torch.equal(found[0], each) for each in found)
    assert any(torch.equal(found[0], model["x"]) for model in models)


async def test_what_was_pushed_to_is_not_replaced(address: str) -> None:
    """Shards with parameters of different uploads, of which one was trained, are told apart and stay as they are."""
    with RawWorker(address) as raw:
        upload_to(raw, 0)
        raw.join()
        with raw.exchange() as stream:
            stream.push(0, 1, 0, torch.ones(256))
            stream.update()
        trained = raw.fetch(0)[1]
        async with paceline.connect(address) as client:
            with pytest.raises(UnavailableError, match="did not finish"):
                await asyncio.wait_for(client.initialize(OURS), 60)
        assert torch.equal(trained, raw.fetch(0)[1])


async def test_an_upload_that_does_not_move_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """An uploader that is there and sends nothing must not keep everybody from beginning the run for good."""
    monkeypatch.setattr("paceline_server.service.STALLED_S", 0.5)
    server = ShardServer(config_from_mapping({"listen": "127.0.0.1:0"}), 0)
    port = server.bind()
    await server.start([pb.Shard(port=port)])
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stuck = pb_grpc.ParameterServerServiceStub(channel).Initialize()
        tensor = pb.Tensor(name="x", shape=[256], dtype=pb.DTYPE_FLOAT32, role=pb.ROLE_PARAMETER)
        manifest = pb.Manifest(tensors=[tensor], fragment_elements=4_194_304)
        start = pb.InitializeStart(protocol_version=1, manifest=manifest, initialization_id=1)
        await stuck.write(pb.InitializeRequest(start=start))

        async def is_under_way() -> bool:
            return server._engine.initializing.locked()

        await wait_until_async(is_under_way)
        async with asyncio.timeout(PATIENCE_S), paceline.connect(f"127.0.0.1:{port}", worker_id="b") as worker:
            await worker.initialize({"x": torch.ones(256)})
            assert (await worker.fetch()).tensors["x"].sum() == 256
        with pytest.raises(grpc.aio.AioRpcError, match="no message of it came") as refused:
            await stuck
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    await server.drain()
