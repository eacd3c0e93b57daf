"""A run over two shards is the run over one; a model that differs is refused by name, and the run goes on."""

import re
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from typing import Any

import pytest
import torch
from torch import nn

import paceline
import paceline_server
from integration.raw import RawWorker
from paceline import Client
from paceline_wire.errors import ManifestMismatchError, NotInitializedError

START = {
    "a.weight": torch.linspace(-1.0, 1.0, 1500).reshape(50, 30),
    "b.bias": torch.linspace(0.0, 3.0, 15),
    "c.weight": torch.linspace(0.0, 3.0, 300).to(torch.bfloat16),
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
    """A server of two shards; the first test begins its run."""
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
        with pytest.raises(NotInitializedError, match="no parameters yet"):
            await workers[0].fetch()
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


async def test_any_shard_leads_to_all(two_shards: str) -> None:
    """A client that knows only the second shard reaches the whole run."""
    with RawWorker(two_shards) as raw:
        first, second = raw.describe().shards
    assert f"127.0.0.1:{first.port}" == two_shards
    async with paceline.connect(two_shards) as client, paceline.connect(f"127.0.0.1:{second.port}") as other:
        await client.initialize(START, averaged=["b.bias"])
        base, found = await client.fetch(), await other.fetch()
        assert found.bins == base.bins
        for name, tensor in base.tensors.items():
            assert torch.equal(tensor, found.tensors[name])
        assert [status.shard_index for status in await other.statuses()] == [0, 1]


class Model(nn.Module):
    """A module whose state is START, but for the changes asked for; None leaves a tensor out."""

    def __init__(self, **changes: torch.Tensor | None) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Module(), nn.Module(), nn.Module()
        for name, tensor in {**START, **changes}.items():
            module = self.get_submodule(name.rpartition(".")[0])
            if tensor is None:
                continue
            if name == "b.bias":
                module.register_buffer("bias", tensor)
            else:
                module.register_parameter(name.rpartition(".")[2], nn.Parameter(tensor.clone()))


DIFFERENCES = {
    "an extra tensor": ("c.more", torch.zeros(3)),
    "a missing tensor": ("a.weight", None),
    "another shape": ("a.weight", torch.zeros(50, 31)),
    "another dtype": ("c.weight", torch.zeros(300)),
    "an extra tensor of other shards": ("a.another", torch.zeros(50, 60)),
}


@pytest.mark.parametrize("difference", DIFFERENCES)
async def test_another_model_is_refused_by_name(two_shards: str, difference: str) -> None:
    """Whoever comes with another model is told which tensor differs, by `initialize` and by `join`; others go on."""
    name, tensor = DIFFERENCES[difference]
    async with two_workers(two_shards) as (worker, other):
        await worker.initialize(START, averaged=["b.bias"])
        base = await worker.fetch()
        theirs = {key: value for key, value in {**START, name: tensor}.items() if value is not None}
        with pytest.raises(ManifestMismatchError, match=re.escape(name)):
            await other.initialize(theirs, averaged=["b.bias"])
        model = Model(**{name: tensor})
        with pytest.raises(ManifestMismatchError, match=re.escape(name)):
            paceline.join(two_shards, model, torch.optim.SGD(model.parameters(), lr=0.1))
        for key, value in model.state_dict().items():
            assert torch.equal(value, theirs[key]), "a refused model is left as it was"
        assert (await other.fetch()).bins == base.bins
        nothing = {key: torch.zeros_like(value) for key, value in START.items()}
        await worker.exchange(nothing, base)
        with RawWorker(two_shards) as raw:
            assert {member.worker_id for member in raw.status().members} == {"w0", "w1"}


async def test_another_role_is_refused_by_name(two_shards: str) -> None:
    """A tensor that is averaged in the run cannot be a parameter of a worker's model."""
    async with two_workers(two_shards) as (worker, other):
        await worker.initialize(START, averaged=["b.bias"])
        with pytest.raises(ManifestMismatchError, match=r"b\.bias.*averaged.*parameter"):
            await other.initialize(START)


async def test_a_differing_outer_gradient_is_refused_by_name(two_shards: str) -> None:
    """`exchange` sends nothing of an outer gradient whose names or shapes are not the run's."""
    async with two_workers(two_shards) as (worker, _):
        await worker.initialize(START, averaged=["b.bias"])
        base = await worker.fetch()
        for name, tensor in DIFFERENCES.values():
            if name == "c.weight":
                continue  # an outer gradient may have any dtype
            gradient = {key: value for key, value in {**START, name: tensor}.items() if value is not None}
            with pytest.raises(ManifestMismatchError, match=re.escape(name)):
                await worker.exchange(gradient, base)
        assert (await worker.fetch()).bins == base.bins


async def test_a_large_differing_model_is_refused_by_name(two_shards: str) -> None:
    """The refusal arrives although it comes in the middle of an upload of many messages."""
    async with two_workers(two_shards) as (worker, other):
        await worker.initialize(START, averaged=["b.bias"])
        for _ in range(5):
            with pytest.raises(ManifestMismatchError, match=r"large\.weight"):
                await other.initialize({**START, "large.weight": torch.zeros(3000, 2000)}, averaged=["b.bias"])
