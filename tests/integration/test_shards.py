"""A run over two shards is the run over one; a model that differs is refused by name, and the run goes on."""

from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from typing import Any

import pytest
import torch
from torch import nn

import paceline
import paceline_server
from paceline import Client
from paceline_wire.errors import ManifestMismatchError, NotInitializedError

START = {
    "a.weight": torch.linspace(-1.0, 1.0, 1500).reshape(50, 30),
    "b.bias": torch.linspace(0.0, 3.0, 15),
    "c.half": torch.linspace(0.0, 3.0, 300).to(torch.bfloat16),
    "scale": torch.tensor(0.5),
}


def config(shards: int) -> dict[str, Any]:
    """A lossy run of many fragments, so that error feedback and encodings take part."""
    return {
        "shards": shards,
        "outer": {"lr": 0.7, "momentum": 0.9},
        "schedule": {"quota": 2},
        "exchange": {"uplink": "int4", "downlink": "bf16", "fragment_elements": 256},
    }


@pytest.fixture(scope="module")
def two_shards() -> Iterator[str]:
    """A server of two shards."""
    with paceline_server.local(config(2)) as address:
        yield address


@asynccontextmanager
async def two_workers(address: str) -> AsyncIterator[list[Client]]:
    """Two workers, both active."""
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(paceline.connect(address, worker_id=f"w{i}")) for i in range(2)]


async def trained(address: str) -> dict[str, torch.Tensor]:
    """What a fixed sequence of pushes of two workers, one after the other, makes of START."""
    generator = torch.Generator().manual_seed(0)
    async with two_workers(address) as workers:
        await workers[0].initialize(START, averaged=["b.bias"])
        bases = [await worker.fetch() for worker in workers]
        for turn in (0, 1, 1, 0, 0, 0, 1, 0):
            gradient = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in START.items()}
            bases[turn] = await workers[turn].exchange(gradient, bases[turn])
        base = await workers[0].fetch()
        statuses = await workers[0].statuses()
        assert sum(status.pushes_applied for status in statuses) == 8 * len(base.bins)
        assert all(status.pushes_applied > 0 for status in statuses)
        return base.tensors


async def test_two_shards_give_the_parameters_of_one(two_shards: str) -> None:
    """The same pushes end in the same bits, however the fragments are divided."""
    with ExitStack() as stack:
        one = await trained(stack.enter_context(paceline_server.local(config(1))))
    two = await trained(two_shards)
    assert one.keys() == two.keys() == START.keys()
    for name in START:
        assert torch.equal(one[name], two[name])
