"""What is known about a demo while it runs; the processes' reports go in, views and the final report read it."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from paceline.demo.settings import DemoSettings


class Point(NamedTuple):
    """One evaluation."""

    elapsed_s: float
    """Training time at which the parameters were taken."""
    loss: float
    """On the held-out files, nats per byte."""


@dataclass(kw_only=True)
class WorkerState:
    """The last that a worker has reported."""

    slowness: float = 1.0
    """How many times slower than the fastest it is paced."""
    elapsed_s: float = 0.0
    """Time since the word to start; for the lone worker without its evaluations."""
    steps: int = 0
    """Inner steps so far."""
    overruns: int = 0
    """How many of them took longer than their pace."""
    train_loss: float | None = None
    """Mean loss of its own batches over the last second."""
    rounds: int = 0
    """Rounds it has pushed."""
    bytes_up: int = 0
    """Bytes it has sent."""
    bytes_down: int = 0
    """Bytes it has received."""
    stalled_s: float = 0.0
    """Seconds its training thread waited for the network while it trained."""
    flush_s: float = 0.0
    """Seconds it waited at the end for its last pushes to be answered."""
    lateness: float = 0.0
    """Mean number of bins its pushes were late."""
    reconnects: int = 0
    """Times its connection was lost and resumed."""
    pushes_refused: int = 0
    """Pushes that the server refused."""

    def update(self, event: dict[str, Any]) -> None:
        """Take over what a line of the worker says."""
        self.elapsed_s, self.steps, self.overruns = event["elapsed_s"], event["steps"], event["overruns"]
        self.train_loss = event.get("train_loss", self.train_loss)
        if stats := event.get("stats"):
            self.rounds = stats["rounds"]
            self.bytes_up, self.bytes_down = stats["bytes_up"], stats["bytes_down"]
            self.lateness = stats["lateness"]
            self.reconnects, self.pushes_refused = stats["reconnects"], stats["pushes_refused"]
            if event["event"] != "done":  # the last statistics count the flush as a wait, too
                self.stalled_s = stats["stalled_s"]
        self.flush_s = event.get("flush_s", self.flush_s)


@dataclass(kw_only=True)
class DemoState:
    """Everything so far."""

    settings: DemoSettings
    """What was asked for."""
    phase: str = "starting"
    """What is going on, in a few words."""
    num_parameters: int = 0
    """Of the model."""
    workers: list[WorkerState] = field(default_factory=list)
    """Those that train together."""
    single: WorkerState = field(default_factory=WorkerState)
    """The lone one."""
    curve: list[Point] = field(default_factory=list)
    """The run's evaluations, oldest first; the first is of the untrained model."""
    single_curve: list[Point] = field(default_factory=list)
    """The lone worker's, likewise; empty without the comparison."""
    training_s: float = 0.0
    """From the word to start until the last worker had flushed."""
    link_bytes_up: int = 0
    """What crossed the emulated links to the server, framing included."""
    link_bytes_down: int = 0
    """What crossed them from the server."""
