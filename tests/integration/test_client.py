"""The asyncio client at its edges: overlapping, cancelled and abandoned exchanges, odd tensors, two starts at once."""

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest
import torch
from torch import nn

import paceline
import paceline_server
from integration.patience import PATIENCE_S, wait_until_async
from paceline import Base, Client
from paceline_wire.errors import InvalidInputError, SupersededError, UnavailableError

SIZE = 2000
CONFIG = {
    "outer": {"lr": 1.0, "momentum": 0.0, "late_bins": 1000},
    "schedule": {"quota": 1},
    "exchange": {"uplink": "int4", "downlink": "fp32", "fragment_elements": 256},
}
FRAGMENTS = 8


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A run whose parameters go down by what is pushed, no more and no less."""
    with paceline_server.local(CONFIG) as found:
        yield found


@pytest.fixture
async def client(address: str) -> AsyncIterator[Client]:
    """A worker of the run."""
    async with paceline.connect(address, worker_id="worker") as connected:
        await connected.initialize({"x": torch.zeros(SIZE)})
        yield connected


def gradient(seed: int) -> dict[str, torch.Tensor]:
    """An outer gradient that int4 cannot write exactly."""
    return {"x": torch.randn(SIZE, generator=torch.Generator().manual_seed(seed))}


async def pushes_applied(client: Client) -> int:
    """The server's count."""
    (status,) = await client.statuses()
    return int(status.pushes_applied)


async def test_overlapping_exchanges_keep_their_order_and_lose_nothing(client: Client) -> None:
    """What int4 loses of each of many pushes in flight is in a later one: in the end only the last loss is missing."""
    start = await client.fetch()
    applied = await pushes_applied(client)
    pushes = [gradient(7) for _ in range(30)]
    bases = await asyncio.gather(*(client.exchange(push, start) for push in pushes))
    assert await pushes_applied(client) == applied + 30 * FRAGMENTS
    end = await client.fetch()
    assert {base.bins[0] for base in bases} == set(range(start.bins[0] + 1, start.bins[0] + 31))
    lost = start.tensors["x"] - end.tensors["x"] - 30 * pushes[0]["x"]
    # An int4 step is a seventh of the largest value, and rounding errs by half of one; the loss adds as much at most.
    assert lost.abs().max() <= pushes[0]["x"].abs().max() / 7
    assert lost.abs().max() > 0


async def test_a_cancelled_exchange_leaves_the_client_whole(client: Client) -> None:
    """Cancelled at any moment, an exchange counts as a whole or not at all, and the next one works."""
    for yields in (0, 1, 2, 3, 5, 8, 13, 21, 40):
        base = await client.fetch()
        exchange = asyncio.create_task(client.exchange(gradient(yields), base))
        for _ in range(yields):
            await asyncio.sleep(0)
        exchange.cancel()
        assert isinstance((await asyncio.gather(exchange, return_exceptions=True))[0], asyncio.CancelledError)
        before = await client.fetch()
        after = await client.exchange({"x": torch.zeros(SIZE)}, before)
        assert len(set(after.bins.values())) == 1, "every fragment has as many pushes"


async def test_who_stops_waiting_may_push_again_or_leave() -> None:
    """At a barrier an exchange that was given up still counts, and one whose client leaves ends instead of never."""
    config = {**CONFIG, "schedule": {"kind": "barrier"}, "exchange": {"uplink": "fp32", "downlink": "fp32"}}
    ones = {"x": torch.ones(3)}
    with paceline_server.local(config) as barrier:
        async with paceline.connect(barrier, worker_id="b") as other:
            await other.initialize({"x": torch.zeros(3)})

            async def waiting(client: Client, base: Base) -> "asyncio.Task[Base]":
                applied = await pushes_applied(other)
                exchange = asyncio.create_task(client.exchange(ones, base))
                await wait_until_async(lambda: has_applied(other, applied + 1))
                assert not exchange.done()
                return exchange

            async with paceline.connect(barrier, worker_id="a") as client:
                base = await client.fetch()
                (await waiting(client, base)).cancel()
                base, _ = await asyncio.gather(client.exchange(ones, base), other.exchange(ones, base))
                assert torch.equal(base.tensors["x"], torch.full((3,), -1.5)), "three pushes, half of lr each"
                abandoned = await waiting(client, base)
            with pytest.raises(UnavailableError, match="closed before the answer came"):
                await asyncio.wait_for(abandoned, PATIENCE_S)
            with pytest.raises(UnavailableError, match="closed"):
                await client.exchange(ones, base)


async def has_applied(client: Client, pushes: int) -> bool:
    """Whether so many pushes are applied."""
    return await pushes_applied(client) == pushes


async def test_an_observer_cannot_push(address: str, client: Client) -> None:
    """Without a worker_id a client looks on."""
    async with paceline.connect(address) as observer:
        base = await observer.fetch()
        with pytest.raises(InvalidInputError, match="only observes"):
            await observer.exchange(gradient(0), base)
        (status,) = await client.statuses()
        assert [member.worker_id for member in status.members] == ["worker"]


async def test_a_newer_start_of_a_worker_ends_the_older(address: str, client: Client) -> None:
    """The older start's exchanges end with the reason; the newer one's work."""
    base = await client.exchange(gradient(1), await client.fetch())
    async with paceline.connect(address, worker_id="worker") as newer:
        base = await newer.exchange(gradient(2), base)
        with pytest.raises(SupersededError, match="newer incarnation"):
            await asyncio.wait_for(client.exchange(gradient(3), base), PATIENCE_S)
        with pytest.raises(SupersededError):
            await client.exchange(gradient(3), base)
        await newer.exchange(gradient(4), base)


async def test_a_start_after_the_clock_was_set_back_is_the_newer_one(
    address: str, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker whose clock is behind its last start joins all the same, and the earlier start is superseded."""
    base = await client.exchange(gradient(1), await client.fetch())
    monkeypatch.setattr("paceline.session.time.time_ns", lambda: 1)
    async with paceline.connect(address, worker_id="worker") as newer:
        base = await newer.exchange(gradient(2), base)
        with pytest.raises(SupersededError, match="newer incarnation"):
            await asyncio.wait_for(client.exchange(gradient(3), base), PATIENCE_S)
        await newer.exchange(gradient(4), base)


async def test_outer_gradients_of_any_layout_and_dtype(client: Client) -> None:
    """Strided, expanded, negatively wide or narrow floats: what counts are the values."""
    whole = torch.arange(2.0 * SIZE) % 7 - 3
    layouts = {
        "strided": whole[::2],
        "expanded": torch.ones(1).expand(SIZE),
        "double": torch.ones(SIZE, dtype=torch.float64),
        "bfloat16": torch.ones(SIZE, dtype=torch.bfloat16),
        "requires grad": torch.ones(SIZE, requires_grad=True),
    }
    for name, values in layouts.items():
        base = await client.fetch()
        after = await client.exchange({"x": values}, base)
        moved = base.tensors["x"] - after.tensors["x"]
        torch.testing.assert_close(moved, values.detach().float(), rtol=0, atol=0.5, msg=name)


async def test_tensors_of_any_layout_can_begin_a_run() -> None:
    """What a run starts from may be strided, transposed, 0-d or empty."""
    start = {
        "strided": torch.arange(40.0)[::2],
        "expanded": torch.ones(1).expand(300),
        "transposed": torch.arange(600.0).reshape(20, 30).t(),
        "scalar": torch.tensor(0.25),
        "empty": torch.empty(3, 0),
        "integers": torch.arange(3),
    }
    with paceline_server.local(CONFIG) as address:
        async with paceline.connect(address) as client:
            await client.initialize(start)
            base = await client.fetch("fp32")
    assert base.tensors.keys() == start.keys() - {"integers"}
    for name, tensor in base.tensors.items():
        assert torch.equal(tensor, start[name])


async def test_clients_and_joined_loops_live_in_one_process(address: str, client: Client) -> None:
    """A joined training loop on a thread of its own and clients on this event loop do not disturb each other."""
    model = nn.ParameterDict({"x": nn.Parameter(torch.zeros(SIZE))})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def train() -> int:
        with paceline.join(address, model, optimizer, inner_steps=1, overlap="blocking") as run:
            for _ in range(40):
                model["x"].grad = torch.ones(SIZE)
                optimizer.step()
            return run.round

    training = asyncio.create_task(asyncio.to_thread(train))
    base: Base = await client.fetch()
    exchanged = 0
    while not training.done():
        base = await client.exchange({"x": torch.zeros(SIZE)}, base)
        exchanged += 1
    assert await training == 40
    assert exchanged > 0
