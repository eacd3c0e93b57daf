"""Connections cut in the middle of an exchange: nothing is lost, nothing counts twice, nobody above notices."""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import nn

import paceline
import paceline_server
from integration.proxy import Proxy, Way

SHAPE = (600, 1000)
"""Two fragments of 300,000 elements: a push of each in fp32 is more than a message."""


def config(uplink: str) -> dict[str, Any]:
    """A run whose result is a function of the pushes alone: one worker, which waits for every answer."""
    return {
        "outer": {"lr": 0.7, "momentum": 0.9},
        "schedule": {"kind": "barrier"},
        "exchange": {"uplink": uplink, "downlink": "fp32", "fragment_elements": 300 * 1024},
    }


def cut_points(bytes_up: int, bytes_down: int) -> list[tuple[Way, int]]:
    """Where to cut an exchange of so many bytes: right at its start, near its end, and in between, both ways."""
    points: list[tuple[Way, int]] = []
    for near_start, share in zip((0, 9, 40, 300, 5_000, 70_001), (7, 44, 50, 60, 95, 99), strict=True):
        points += [("up", near_start), ("down", bytes_down * share // 100)]
        points += [("down", near_start), ("up", bytes_up * share // 100)]
    return points


@pytest.fixture(scope="module")
def servers() -> Iterator[tuple[str, str]]:
    """Two servers of one configuration, for a run with cuts and its twin without."""
    with ExitStack() as stack:
        cut, uncut = (stack.enter_context(paceline_server.local(config("int4"))) for _ in range(2))
        yield cut, uncut


async def test_cuts_in_an_exchange_change_nothing(servers: tuple[str, str]) -> None:
    """Cut anywhere on the way up or back, every exchange gives the uncut run's bits, and each push counts once."""
    generator = torch.Generator().manual_seed(0)
    start = {"x": torch.randn(SHAPE, generator=generator)}
    with Proxy(servers[0]) as proxy:
        async with (
            paceline.connect(proxy.address, worker_id="worker") as worker,
            paceline.connect(servers[1], worker_id="worker") as twin,
        ):
            await worker.initialize(start)
            await twin.initialize(start)
            base, expected = await worker.fetch(), await twin.fetch()
            before = dict(proxy.carried)
            base, expected = await worker.exchange(start, base), await twin.exchange(start, expected)
            points = cut_points(*(proxy.carried[way] - before[way] for way in ("up", "down")))
            for number, (way, num_bytes) in enumerate(points, start=1):
                proxy.cut_after(num_bytes, way)
                gradient = {"x": torch.randn(SHAPE, generator=generator)}
                base, expected = await worker.exchange(gradient, base), await twin.exchange(gradient, expected)
                assert proxy.cuts == number
                assert torch.equal(base.tensors["x"], expected.tensors["x"])
                assert base.bins == expected.bins
            (status,), (uncut_status,) = await worker.statuses(), await twin.statuses()
            assert torch.equal((await worker.fetch()).tensors["x"], (await twin.fetch()).tensors["x"])
    assert status.pushes_applied == uncut_status.pushes_applied == 2 * (1 + len(points))
    assert status.pushes_duplicate > 0
    assert uncut_status.pushes_duplicate == 0


class Quadratic(nn.Module):
    """One parameter with a minimum; its gradient takes no luck to be the same twice."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(SHAPE))
        self.minimum = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))

    def forward(self) -> torch.Tensor:
        """The loss."""
        return 0.5 * (self.x - self.minimum).square().sum()


def test_a_training_loop_does_not_notice_cuts(servers: tuple[str, str]) -> None:
    """Cut in every round, `join` trains to the uncut run's bits; only stats tell."""
    models = [Quadratic(1), Quadratic(1)]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9) for model in models]
    arguments: dict[str, Any] = {"inner_steps": 2, "overlap": "blocking", "uplink": "fp32"}
    with (
        Proxy(servers[0]) as proxy,
        paceline.join(proxy.address, models[0], optimizers[0], **arguments) as run,
        paceline.join(servers[1], models[1], optimizers[1], **arguments) as twin,
    ):
        before = dict(proxy.carried)
        points: list[tuple[Way, int]] = []
        for number in range(13):
            if number == 1:
                points = cut_points(*(proxy.carried[way] - before[way] for way in ("up", "down")))[:12]
            if number > 0:
                way, num_bytes = points[number - 1]
                proxy.cut_after(num_bytes, way)
            for _ in range(2):
                for model, optimizer in zip(models, optimizers, strict=True):
                    model().backward()
                    optimizer.step()
                    optimizer.zero_grad()
            assert proxy.cuts == number
            assert torch.equal(models[0].x, models[1].x)
        assert run.stats().rounds == twin.stats().rounds == 13
        assert run.stats().reconnects >= 12
        assert twin.stats().reconnects == 0
        assert run.stats().pushes_refused == 0


async def test_cuts_on_the_way_into_a_run_change_nothing() -> None:
    """Cut while it connects, uploads, joins and fetches, a client comes in, and what it uploaded is whole."""
    start = {"x": torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))}
    cuts: list[tuple[Way, int]] = [("up", 300), ("up", 2_000), ("up", 1_100_000), ("up", 1_300_000), ("up", 2_398_000)]
    cuts += [("down", 100), ("down", 50), ("down", 1_000), ("down", 200_000), ("down", 1_190_000), ("down", 1_199_000)]
    with paceline_server.local(config("fp32")) as address, Proxy(address) as proxy:
        for way, num_bytes in cuts:
            proxy.cut_after(num_bytes, way)
        async with paceline.connect(proxy.address, worker_id="worker") as worker:
            await worker.initialize(start)
            for _ in range(3):
                base = await worker.fetch()
                assert torch.equal(base.tensors["x"], start["x"])
            assert proxy.cuts == len(cuts)
        for num_bytes in (0, 700, 1_200_000):
            proxy.cut_after(num_bytes, "down")
        model = Quadratic(3)
        paceline.join(proxy.address, model, torch.optim.SGD(model.parameters(), lr=0.1)).close()
        assert torch.equal(model.x.detach(), start["x"])
        assert proxy.cuts == len(cuts) + 3
