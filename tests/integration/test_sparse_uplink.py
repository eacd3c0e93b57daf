"""Pushes in topk, over a real connection: few bytes on the wire, and in the end nothing of a gradient is left out."""

import torch

import paceline
import paceline_server
from integration.proxy import Proxy
from paceline_wire import codecs

SIZE = 1 << 20
ROUNDS = 5
CONFIG = {
    "outer": {"lr": 1.0, "momentum": 0.0, "late_bins": 1000},
    "schedule": {"quota": 1},
    "exchange": {"uplink": "topk", "downlink": "int4"},
}


async def test_topk_pushes_take_few_bytes_and_carry_their_error() -> None:
    """At most 0.03 bytes per parameter and round go up, all counted, and what is left out of one push comes later."""
    gradient, topk = torch.randn(SIZE, generator=torch.Generator().manual_seed(1)), codecs.codec("topk")
    with paceline_server.local(CONFIG) as address, Proxy(address) as proxy:
        async with paceline.connect(proxy.address, worker_id="worker") as client:
            await client.initialize({"x": torch.zeros(SIZE)})
            base = await client.fetch()
            before = proxy.carried["up"]
            for _ in range(ROUNDS):
                base = await client.exchange({"x": gradient}, base)
            bytes_up = proxy.carried["up"] - before
            (status,) = await client.statuses()
            trained = (await client.fetch("fp32")).tensors["x"]
    assert status.bytes_received == ROUNDS * topk.encoded_bytes(SIZE)
    assert bytes_up < 0.03 * SIZE * ROUNDS
    expected, residual = torch.zeros(SIZE), None
    for _ in range(ROUNDS):
        encoded = codecs.compensate(topk, gradient, residual)
        expected, residual = expected - encoded.decode(), encoded.residual
    assert torch.equal(expected, trained)
    assert (
        int(trained.count_nonzero()) > 3 * SIZE // 64
    )  # without feedback they would be the same 64 of 4096 every time
