"""A simulated run has the bits of the real one: real processes, sockets and threads on one side, none on the other."""

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import paceline
import paceline_server
from paceline.worker import Overlap
from paceline_server.config import ServerConfig
from paceline_simulator import ModuleTask, Result, Simulation, WorkerSpec, read_arrivals

INNER_STEPS, ROUNDS = 3, 6
JOINED_BY_S = 60.0
"""Longer than any join takes; without it a worker that failed would leave the others waiting for ever."""


def config(kind: str, workers: int, arrivals: Path, *, downlink: str = "fp32", **outer: Any) -> dict[str, Any]:
    """A run of several fragments that writes down in which order pushes arrive."""
    codecs = {"uplink": "fp32" if downlink == "fp32" else "int4", "downlink": downlink}
    return {
        "outer": {"lr": 0.7, "momentum": 0.8, **outer},
        "schedule": {"kind": kind, "quota": workers},
        "exchange": {**codecs, "fragment_elements": 256, "inner_steps": INNER_STEPS, "dynamic_inner_steps": False},
        "storage": {"arrivals": str(arrivals)},
    }


class Network(nn.Module):
    """Two layers and a batch norm, whose statistics are averaged."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.norm, self.second = nn.Linear(12, 24), nn.BatchNorm1d(24), nn.Linear(24, 12)
        for parameter in self.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """X (B, 12) -> (B, 12)."""
        y: torch.Tensor = self.second(torch.tanh(self.norm(self.first(x))))
        return y


def adamw(module: nn.Module) -> torch.optim.Optimizer:
    """The inner optimizer of most tests."""
    return torch.optim.AdamW(module.parameters(), lr=0.01)


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    """The inner optimizer that OrLoMo asks for."""
    return torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.8)


def batches(worker: int) -> Iterator[torch.Tensor]:
    """A worker's own data."""
    generator = torch.Generator().manual_seed(100 + worker)
    while True:
        yield torch.randn(8, 12, generator=generator)


def loss(module: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """The batch is to come out as it went in."""
    return nn.functional.mse_loss(module(batch), batch)


def trained(run_config: dict[str, Any], workers: int, optimizer: Any = adamw) -> dict[str, torch.Tensor]:
    """What a real run ends with: each worker joins on a thread of its own and waits for every answer.

    Nobody trains before all have their bases, as in the simulation: a worker that joins when another's first push is in
    already, on a busy machine, begins from values with that push in them, and no record of arrivals tells.
    """
    all_joined = threading.Barrier(workers)

    def train(address: str, worker: int) -> None:
        module = Network()
        inner, data = optimizer(module), batches(worker)
        with paceline.join(address, module, inner, worker_id=f"worker-{worker}", overlap="blocking") as run:
            all_joined.wait(JOINED_BY_S)
            while run.round < ROUNDS:
                inner.zero_grad()
                loss(module, next(data)).backward()  # type: ignore[no-untyped-call]  # torch leaves it so
                inner.step()

    async def fetched(address: str) -> dict[str, torch.Tensor]:
        async with paceline.connect(address) as observer:
            return (await observer.fetch("fp32")).tensors

    with paceline_server.local(run_config) as address:
        with ThreadPoolExecutor(workers) as threads:
            list(threads.map(lambda worker: train(address, worker), range(workers)))
        return asyncio.run(fetched(address))


def simulated(run_config: dict[str, Any], workers: int, arrivals: Path, optimizer: Any = adamw) -> Result:
    """The same run without delays, in the order that was recorded."""
    task = ModuleTask(workers, build=Network, optimizer=optimizer, batches=batches, loss=loss)
    return Simulation(
        ServerConfig.model_validate(run_config),
        task,
        [WorkerSpec(step_s=1.0)] * workers,
        overlap=Overlap.BLOCKING,
        arrival_order=read_arrivals(arrivals),
    ).run(until_rounds=ROUNDS)


def assert_same_bits(expected: dict[str, torch.Tensor], result: Result) -> None:
    """Every exchanged tensor is equal in every bit."""
    assert result.parameters.keys() == expected.keys()
    for name, tensor in result.parameters.items():
        assert torch.equal(expected[name], tensor), name


@pytest.mark.parametrize("downlink", ["fp32", "bf16", "int8"])
def test_a_barrier_of_two_has_the_same_bits(downlink: str, tmp_path: Path) -> None:
    """Two workers that wait for each other, through every codec's rounding and feedback."""
    run_config = config("barrier", 2, tmp_path / "arrivals", downlink=downlink)
    expected = trained(run_config, 2)
    assert_same_bits(expected, simulated(run_config, 2, tmp_path / "arrivals"))


def test_one_asynchronous_worker_has_the_same_bits_without_a_record(tmp_path: Path) -> None:
    """With one worker there is only one order."""
    run_config = config("async", 1, tmp_path / "arrivals", downlink="bf16")
    expected = trained(run_config, 1)
    (tmp_path / "none").touch()
    assert_same_bits(expected, simulated(run_config, 1, tmp_path / "none"))


def test_a_recorded_asynchronous_run_is_played_again_with_the_same_bits(tmp_path: Path) -> None:
    """Three workers in whatever order the machine let them in; bins and lateness come out as they were, too."""
    path = tmp_path / "arrivals"
    run_config = config("async", 3, path, downlink="int4")
    expected = trained(run_config, 3)
    result, recorded = simulated(run_config, 3, path), read_arrivals(path)
    assert_same_bits(expected, result)

    def identity(arrivals: Any) -> list[tuple[int, str, int, int, str]]:
        return sorted((a.fragment, a.worker, a.seq, a.base_bin, a.outcome) for a in arrivals)

    assert identity(result.arrivals) == identity(recorded)
    assert len(recorded) == 3 * ROUNDS * len({arrival.fragment for arrival in recorded})


def test_ordered_local_momentum_has_the_same_bits(tmp_path: Path) -> None:
    """OrLoMo: the momentum of torch's SGD travels behind the outer gradient, and begins anew every round."""
    run_config = config("barrier", 2, tmp_path / "arrivals", rule="orlomo", lr=1.0)
    expected = trained(run_config, 2, sgd)
    assert_same_bits(expected, simulated(run_config, 2, tmp_path / "arrivals", sgd))
