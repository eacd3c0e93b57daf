"""What the user's training function gets: its place in the run, how to join it, and where its state is kept."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import paceline.run
from paceline.ray.status import RunSpec
from paceline.whereabouts import Locate


class WorkerContext:
    """A worker's place in a run on Ray; the one argument of the training function.

    Attributes:
        index: Which of the workers this is, from 0.
        num_workers: How many there are.
        worker_id: Its name, the same whenever the cluster starts it again: the run's, a dot and its index, so that a
            credential made for the run's name may act as it.
        folder: A folder of its own in the run's data directory, which every node sees.
        token: The run's token, if it has one.
        tls: How it verifies the shards.
        locate: Says where the shards are now, for `paceline.join` and `paceline.connect`.

    Args:
        spec: The run.
        index: Which of its workers this is.
        locate: Says where its shards are now.
    """

    def __init__(self, spec: RunSpec, index: int, locate: Locate) -> None:
        self.index = index
        self.num_workers = spec.num_workers
        self.worker_id = f"{spec.name}.{index}"
        self.folder = spec.data_dir / f"worker-{index}"
        self.token = spec.token
        self.tls = spec.tls
        self.locate = locate
        self.folder.mkdir(parents=True, exist_ok=True)

    @property
    def address(self) -> str:
        """Where the shard of index 0 is now, "host:port"."""
        return self.locate()[0]

    def join(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> "paceline.run.Run":
        """`paceline.join` as this worker: with its name, the run's token and TLS, and after shards that move.

        Args:
            model: As there.
            optimizer: As there.
            **options: Its other arguments.

        Raises:
            PacelineError: As there.
        """
        ours = {"worker_id": self.worker_id, "token": self.token, "tls": self.tls, "locate": self.locate}
        return paceline.run.join(self.address, model, optimizer, **{**ours, **options})

    def save(self, state: dict[str, Any]) -> None:
        """Keep a state for this worker's next start, in place of the one before; there is a whole one at any moment.

        Args:
            state: What torch.save takes and torch.load(weights_only=True) gives back: tensors, numbers, strings, and
                lists and dicts of them, such as the state_dict of the model, of the optimizer and of the run.

        Raises:
            OSError: It cannot be written.
        """
        temporary = self._checkpoint.with_suffix(".new")
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._checkpoint)

    def load(self) -> dict[str, Any] | None:
        """The state that an earlier start of this worker saved last; None at the first start."""
        if not self._checkpoint.exists():
            return None
        state: dict[str, Any] = torch.load(self._checkpoint, weights_only=True)
        return state

    @property
    def _checkpoint(self) -> Path:
        return self.folder / "state.pt"


Train = Callable[[WorkerContext], Any]
"""A training function: what it returns is the worker's result."""
