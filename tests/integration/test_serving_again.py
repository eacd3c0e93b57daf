"""A shard outlives gRPC's server: it listens again at its port, with its state, and workers resume."""

import asyncio

import torch

import paceline
from integration.patience import PATIENCE_S
from paceline_server.server import ShardServer
from paceline_server.settings import config_from_mapping
from paceline_wire.v1 import parameter_server_pb2 as pb


async def test_a_grpc_server_that_ends_by_itself_is_started_again() -> None:
    """The client resumes, every push counts once, and the shard still ends in order when it is asked to."""
    exchange = {"uplink": "fp32", "downlink": "fp32", "fragment_elements": 256}
    outer = {"rule": "sgd", "lr": 0.5}
    config = {"listen": "127.0.0.1:0", "schedule": {"quota": 1}, "exchange": exchange, "outer": outer}
    server = ShardServer(config_from_mapping(config), 0)
    port = server.bind()
    await server.start([pb.Shard(port=port)])
    stopping = asyncio.Event()
    running = asyncio.create_task(server.run_until(stopping))
    async with asyncio.timeout(PATIENCE_S), paceline.connect(f"127.0.0.1:{port}", worker_id="a") as client:
        await client.initialize({"x": torch.zeros(600)})
        base = await client.fetch()
        for number in (1, 2, 3):
            base = await client.exchange({"x": torch.ones(600)}, base)
            assert torch.equal(base.tensors["x"], torch.full((600,), -0.5 * number))
            await server._server.stop(None)
        (status,) = await client.statuses()
        assert (status.pushes_applied, status.pushes_refused) == (9, 0)
    stopping.set()
    assert await asyncio.wait_for(running, PATIENCE_S) == 0
