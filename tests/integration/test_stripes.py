"""A worker's exchange over several connections: the same bits as over one, whatever becomes of each of them."""

import asyncio
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import paceline
import paceline_server
from integration.patience import PATIENCE_S, wait_until_async
from integration.proxy import Proxy
from integration.raw import RawWorker
from paceline import Client
from paceline.connection import ShardConnection
from paceline_wire.errors import InvalidInputError, PacelineError
from paceline_wire.v1 import parameter_server_pb2 as pb

SIZE, FRAGMENTS, CONNECTIONS = 240 * 1024, 12, 4


def config(downlink: str) -> dict[str, Any]:
    """A run whose parameters go down by what is pushed, in the order of each fragment's pushes."""
    return {
        "outer": {"lr": 1.0, "momentum": 0.9, "late_bins": 1000},
        "schedule": {"quota": 1},
        "exchange": {"uplink": "fp32", "downlink": downlink, "fragment_elements": SIZE // FRAGMENTS},
    }


@pytest.fixture(scope="module", params=["fp32", "int8"])
def servers(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    """Two servers of one configuration, for a run over several connections and its twin over one."""
    settings = config(request.param)
    with paceline_server.local(settings) as striped, paceline_server.local(settings) as twin:
        yield striped, twin


def connection_of(client: Client) -> ShardConnection:
    """A client's connection to the only shard."""
    return client._session.connections[0]


def gradients(count: int) -> list[dict[str, torch.Tensor]]:
    """Outer gradients that differ."""
    generator = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(SIZE, generator=generator)} for _ in range(count)]


async def test_connections_that_break_change_nothing(servers: tuple[str, str]) -> None:
    """Several rounds in flight, connections dropped singly and all at once: the bits are those of one connection."""
    pushes, start = gradients(12), {"x": torch.zeros(SIZE)}
    generator, drops = random.Random(3), 0
    async with paceline.connect(servers[1], worker_id="a", connections=1) as twin:
        await twin.initialize(start)
        base = await twin.fetch("fp32")
        for number in range(0, len(pushes), 3):
            exchanges = [asyncio.create_task(twin.exchange(push, base)) for push in pushes[number : number + 3]]
            base = (await asyncio.gather(*exchanges))[-1]
        expected = (await twin.fetch("fp32")).tensors["x"]
        assert twin.connections == 1
    with Proxy(servers[0]) as proxy:
        async with paceline.connect(proxy.address, worker_id="a", connections=CONNECTIONS) as client:
            await client.initialize(start)
            base = await client.fetch("fp32")
            for number in range(0, len(pushes), 3):
                exchanges = [asyncio.create_task(client.exchange(push, base)) for push in pushes[number : number + 3]]
                if number == 6:
                    proxy.cut_after(500_000, "up")
                while not all(exchange.done() for exchange in exchanges):
                    stripe = generator.choice(connection_of(client)._stripes)
                    drops += stripe.replace_channel()
                    await asyncio.wait(exchanges, timeout=0.05)
                base = (await asyncio.gather(*exchanges))[-1]
            assert client.connections == CONNECTIONS
            assert drops > 3
            assert proxy.cuts == 1
            assert torch.equal(expected, (await client.fetch("fp32")).tensors["x"])
            assert torch.allclose(expected, base.tensors["x"], atol=expected.abs().max().item() / 50)
            (status,) = await client.statuses()
    assert status.pushes_applied == len(pushes) * FRAGMENTS


async def test_fragments_go_over_all_connections_and_fewer_finish_what_they_have(servers: tuple[str, str]) -> None:
    """Differences go on over whichever connection a fragment takes next, without a cut; others are closed."""
    async with paceline.connect(servers[0], worker_id="b", connections=CONNECTIONS) as client:
        await client.initialize({"x": torch.zeros(SIZE)})
        base = await client.fetch("fp32")
        connection = connection_of(client)
        for count in (CONNECTIONS, 2, 3, 1, CONNECTIONS):
            connection._connection_count.count = count
            for push in gradients(3):
                base = await client.exchange(push, base)

            async def has_as_many(wanted: int = count) -> bool:
                return len(connection._stripes) == wanted and not connection._retiring

            await asyncio.wait_for(wait_until_async(has_as_many), PATIENCE_S)
            assert client.connections == count
        newest = (await client.fetch("fp32")).tensors["x"]
        assert torch.allclose(newest, base.tensors["x"], atol=newest.abs().max().item() / 50)
        assert connection.reconnects == 0


async def test_a_dead_connection_beside_others_is_found() -> None:
    """One that carries nothing any more is replaced while it is open, though heartbeats go over another."""
    settings = config("fp32")
    settings["schedule"]["lease_s"] = 4.0  # heartbeats, and what tries the other connections, four times a second
    with paceline_server.local(settings) as address, Proxy(address) as proxy:
        async with paceline.connect(proxy.address, worker_id="a", connections=2) as client:
            await client.initialize({"x": torch.zeros(SIZE)})
            base = await client.exchange(gradients(1)[0], await client.fetch("fp32"))
            second = connection_of(client)._stripes[1]

            async def round_trips_known() -> bool:
                return second.silence.deadline_s < 10

            await wait_until_async(round_trips_known)
            proxy.hold_present("up")
            connection_of(client)._stripes[0].replace_channel()

            async def replaced() -> bool:
                return second.silence.lost_heartbeats >= 2 and connection_of(client).reconnects >= 2

            await wait_until_async(replaced)
            await client.exchange(gradients(1)[0], base)


def test_a_stream_beyond_the_most_is_refused() -> None:
    """What a shard keeps for streams is bounded."""
    opening = pb.ExchangeOpen(downlink=pb.CODEC_FP32, stream=8)
    with paceline_server.local(config("fp32")) as address, RawWorker(address) as worker:
        asyncio.run(initialized(address))
        worker.join()
        opening.worker.CopyFrom(worker.worker)
        with worker.exchange(opened=False) as stream:
            stream.send(pb.ExchangeRequest(open=opening))
            assert stream.end().error == InvalidInputError.__name__


async def initialized(address: str) -> None:
    """Give a run its parameters."""
    async with paceline.connect(address) as client:
        await client.initialize({"x": torch.zeros(SIZE)})


async def test_odd_numbers_of_connections_are_refused(servers: tuple[str, str]) -> None:
    """The text says what is allowed."""
    for wrong in (0, 9, "many"):
        with pytest.raises(PacelineError, match="1 to 8"):
            async with paceline.connect(servers[0], connections=wrong):
                pass
