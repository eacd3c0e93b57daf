"""Connections cut in the middle of an exchange: nothing is lost, nothing counts twice, nobody above notices."""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import torch
from integration.proxy import Proxy, Way
from torch import nn

import paceline
import paceline_server

CONFIG = {
    "outer": {"lr": 0.7, "momentum": 0.9},
    "schedule": {"kind": "barrier"},
    "exchange": {"uplink": "fp32", "downlink": "fp32", "fragment_elements": 300 * 1024},
}
ROWS = 600
"""600 rows of 1000: two fragments of more than a MiB, so each push takes two messages."""


def cut_points(total_bytes: int) -> list[int]:
    """Where to cut a transfer: around its start, its messages' ends and its own end, and in between."""
    return [0, 1, 9, 40, 300, 5_000, 70_001, *(total_bytes * share // 100 for share in (20, 44, 50, 60, 95, 99))]


@pytest.fixture(scope="module", params=["fp32", "int4"])
def servers(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    """Two servers of one configuration, for a run with cuts and one without."""
    config = {**CONFIG, "exchange": {**CONFIG["exchange"], "uplink": request.param}}
    with paceline_server.local(config) as cut, paceline_server.local(config) as uncut:
        yield cut, uncut


async def test_cuts_while_exchanging_change_nothing(servers: tuple[str, str]) -> None:
    """Cut anywhere on the way up or back, every exchange ends in the same bits as without, applied exactly once."""
    start = {"x": torch.linspace(-1, 1, ROWS * 1000).reshape(ROWS, 1000)}
    generator = torch.Generator().manual_seed(0)
    fired, exchanges = 0, 0
    with Proxy(servers[0]) as proxy:
        async with (
            paceline.connect(proxy.address, worker_id="worker") as worker,
            paceline.connect(servers[1], worker_id="worker") as twin,
        ):
            await worker.initialize(start)
            await twin.initialize(start)
            base, expected = await worker.fetch(), await twin.fetch()
            before = dict(proxy.carried)
            for way, num_bytes in [(None, 0), *cuts_of(proxy, before)]:
                if way is not None:
                    proxy.cut_after(num_bytes, way)
                    fired += 1
                gradient = {"x": torch.randn(ROWS, 1000, generator=generator)}
                base, expected = await worker.exchange(gradient, base), await twin.exchange(gradient, expected)
                exchanges += 1
                assert proxy.cuts == fired
                assert torch.equal(base.tensors["x"], expected.tensors["x"])
                assert base.bins == expected.bins
            (status,), (uncut_status,) = await worker.statuses(), await twin.statuses()
            assert torch.equal((await worker.fetch()).tensors["x"], (await twin.fetch()).tensors["x"])
    assert status.pushes_applied == uncut_status.pushes_applied == 2 * exchanges
    assert status.pushes_duplicate > 0
    assert uncut_status.pushes_duplicate == 0
