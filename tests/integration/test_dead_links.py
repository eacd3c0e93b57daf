"""Links that carry nothing are replaced while they are still open; slow ones are left alone."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import paceline
import paceline_server
from integration.patience import wait_until_async
from integration.proxy import Proxy
from paceline import Client
from paceline.connection import ShardConnection
from paceline.silence import LOST_HEARTBEATS

SIZE, SMALL = 300_000, 30_000
CONFIG: dict[str, Any] = {
    "outer": {"lr": 1.0, "momentum": 0.0},
    "schedule": {"lease_s": 10.0},
    "exchange": {"uplink": "fp32", "downlink": "bf16"},
}


@pytest.fixture
def proxied() -> Iterator[Proxy]:
    """A server behind a proxy."""
    with paceline_server.local(CONFIG) as address, Proxy(address) as proxy:
        yield proxy


async def applied(proxy: Proxy) -> int:
    """How many pushes the server has applied; asked on a new connection."""
    async with paceline.connect(proxy.address) as observer:
        (status,) = await observer.statuses()
        return status.pushes_applied


def connection_of(client: Client) -> ShardConnection:
    """A client's connection to the only shard."""
    return client._session.connections[0]


async def round_trips_known(client: Client) -> bool:
    """Whether heartbeats are expected to be answered soon."""
    return connection_of(client)._silence.deadline_s < 10


async def test_a_black_hole_is_replaced_while_it_lasts(proxied: Proxy) -> None:
    """A connection whose packets go nowhere is resumed on another, and the push counts once."""
    start = torch.zeros(SMALL)
    async with paceline.connect(proxied.address, worker_id="a") as client:
        await client.initialize({"x": start})
        base = await client.exchange({"x": torch.ones(SMALL)}, await client.fetch())
        await wait_until_async(lambda: round_trips_known(client))
        proxied.hold_present("up")
        proxied.hold_present("down")
        base = await client.exchange({"x": torch.ones(SMALL)}, base)
        assert connection_of(client).reconnects >= 1
        assert await applied(proxied) == 2
        assert torch.equal(start - 2, base.tensors["x"])


async def test_a_quiet_black_hole_is_replaced_too(proxied: Proxy) -> None:
    """Without anything under way it is found by the heartbeats alone, before the next push needs it."""
    async with paceline.connect(proxied.address, worker_id="a") as client:
        await client.initialize({"x": torch.zeros(SIZE)})
        await client.exchange({"x": torch.ones(SIZE)}, await client.fetch())
        await wait_until_async(lambda: round_trips_known(client))
        proxied.hold_present("up")

        async def resumed() -> bool:
            return connection_of(client).reconnects >= 1

        await wait_until_async(resumed)


async def test_a_slow_link_is_not_cut(proxied: Proxy) -> None:
    """While an upload trickles heartbeats are lost behind it, and the connection stays."""
    async with paceline.connect(proxied.address, worker_id="a") as client:
        await client.initialize({"x": torch.zeros(SIZE)})
        base = await client.fetch()
        await wait_until_async(lambda: round_trips_known(client))
        proxied.limit(100_000, "up")
        base = await asyncio.wait_for(client.exchange({"x": torch.ones(SIZE)}, base), 120)
        assert connection_of(client)._silence.lost_heartbeats >= LOST_HEARTBEATS
        assert connection_of(client).reconnects == 0
        assert set(base.bins.values()) == {1}
