"""An uploader that dies between two shards leaves a run that the next worker begins anew, from one model."""

import asyncio
from collections.abc import Iterator

import pytest
import torch

import paceline
import paceline_server
from integration.raw import RawWorker
from paceline.fragments import gather, manifest_of
from paceline_wire.errors import UnavailableError
from paceline_wire.manifest import Manifest

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
