"""What benchmarks/real.py compares, small: worker processes and a server process end where the simulator does."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from experiments.real import Recipe, Setting, Workers, distance, simulate, stacked_task, train_for_real

ROUNDING = 1e-5
"""How far apart other kernels may end, as a share of the largest parameter."""

DILOCO = Setting(
    kind="text",
    inner="adamw",
    inner_lr=0.004,
    num_workers=2,
    server={
        "outer": {"lr": 0.7, "momentum": 0.5},
        "schedule": {"kind": "barrier", "quota": 2},
        "exchange": {"uplink": "fp32", "downlink": "fp32", "inner_steps": 3, "dynamic_inner_steps": False},
    },
    rounds=4,
    step_s=0.001,
)
ORMO = replace(
    DILOCO,
    inner="sgd",
    inner_lr=1.0,
    server={
        "outer": {"lr": 0.05, "momentum": 0.9},
        "schedule": {"kind": "async", "quota": 2},
        "exchange": {**DILOCO.server["exchange"], "inner_steps": 1},
    },
    rounds=15,
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Compute as the worker processes do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    """Two processes for all tests here."""
    with Workers(2) as processes:
        yield processes


def test_diloco_ends_where_the_simulator_does(workers: Workers, tmp_path: Path) -> None:
    """Without any record: workers that wait for a barrier of all have only one course."""
    real = train_for_real(DILOCO, workers, tmp_path / "arrivals")
    simulated = simulate(DILOCO, stacked_task(DILOCO))
    assert distance(real.parameters, simulated.parameters) < ROUNDING
    assert distance(real.parameters, dict(stacked_task(DILOCO).tensors(0))) > 100 * ROUNDING


def test_ormo_ends_where_the_simulator_does_in_the_recorded_order(workers: Workers, tmp_path: Path) -> None:
    """Single gradients that come as they come; with the workers' own kernels no bit differs."""
    real = train_for_real(ORMO, workers, tmp_path / "arrivals")
    assert len(real.arrivals) == ORMO.num_workers * ORMO.rounds
    replayed = simulate(ORMO, stacked_task(ORMO), real.arrivals)
    assert distance(real.parameters, replayed.parameters) < ROUNDING
    exact = simulate(ORMO, Recipe(ORMO).module_task(), real.arrivals)
    assert distance(real.parameters, exact.parameters) == 0
    assert distance(real.parameters, dict(stacked_task(ORMO).tensors(0))) > 100 * ROUNDING
