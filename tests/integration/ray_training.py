"""Training functions that the tests send to a Ray cluster."""

import time
from typing import Any

import torch
from torch import nn

from integration.restartable_worker import INNER_STEPS, SIZE, Model
from paceline.ray import WorkerContext

ENOUGH = "enough"
"""The file in the data directory that ends the training."""

STEP_S = 0.01
"""Seconds that a step's computation stands for."""

assert SIZE > 2 * 256, "the model has three fragments"


def train_until_enough(worker: WorkerContext) -> dict[str, Any]:
    """Save after every step, and train until the test has seen enough."""
    torch.set_num_threads(1)
    model: nn.Module = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    step, starts, saved = 0, 1, worker.load()
    if saved is not None:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step, starts = saved["step"], saved["starts"] + 1
    with worker.join(model, optimizer, inner_steps=INNER_STEPS) as run:
        if saved is not None:
            run.load_state_dict(saved["run"])
        while not (worker.folder.parent / ENOUGH).exists():
            loss: torch.Tensor = model.loss(step)  # type: ignore[operator]  # the model's own method
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            time.sleep(STEP_S)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "starts": starts}
            worker.save({**state, "run": run.state_dict()})
            told = worker.folder / "told.new"
            told.write_text(f"{starts} {run.round}", encoding="utf-8")
            told.replace(worker.folder / "told")
        run.flush()
        return {"starts": starts, "rounds": run.round, "refused": run.stats().pushes_refused}


def fail(worker: WorkerContext) -> None:
    """Fail for good."""
    raise ZeroDivisionError(f"worker {worker.index} divides")
