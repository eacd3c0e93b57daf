"""What a simulation came to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from paceline_simulator.arrivals import Arrival


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A look at the canonical parameters.

    Attributes:
        time_s: Seconds of virtual time.
        pushes: Pushes applied until then, over all fragments.
        inner_steps: Inner steps that all workers had finished.
        tokens: Tokens or samples in them.
        metrics: What the task said.
    """

    time_s: float
    pushes: int
    inner_steps: int
    tokens: int
    metrics: Mapping[str, float]


@dataclass(kw_only=True)
class WorkerResult:
    """What one worker did.

    Attributes:
        name: Its name.
        rounds: Rounds pushed.
        inner_steps: Inner steps finished.
        computed_s: Virtual seconds in which it made them.
        waited_s: Virtual seconds in which it waited for answers.
        pushes: Pushes answered, over all fragments.
        pushes_refused: Those that were refused.
        lateness: How many of its pushes were how many bins late.
        bytes_up: Payload bytes of pushes that were sent.
        bytes_down: Payload bytes of updates that arrived.
    """

    name: str
    rounds: int = 0
    inner_steps: int = 0
    computed_s: float = 0.0
    waited_s: float = 0.0
    pushes: int = 0
    pushes_refused: int = 0
    lateness: dict[int, int] = field(default_factory=dict)
    bytes_up: int = 0
    bytes_down: int = 0

    @property
    def mean_lateness(self) -> float:
        """Mean number of bins that its pushes were late."""
        return sum(late * count for late, count in self.lateness.items()) / max(1, self.pushes)

    @property
    def compute_utilization(self) -> float:
        """Share of its time in which it did not wait, 0 to 1."""
        return self.computed_s / max(self.computed_s + self.waited_s, 1e-12)


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a simulation came to.

    Attributes:
        time_s: Virtual seconds simulated.
        parameters: What a worker would fetch now, by name, float32; copies.
        momentum: The rule's momentum, likewise; zeros for rules without.
        evaluations: The looks at the parameters, in order.
        workers: What each worker did.
        arrivals: The server's decisions, in order.
    """

    time_s: float
    parameters: dict[str, torch.Tensor]
    momentum: dict[str, torch.Tensor]
    evaluations: Sequence[Evaluation]
    workers: Sequence[WorkerResult]
    arrivals: Sequence[Arrival]

    @property
    def compute_utilization(self) -> float:
        """Share of all workers' time in which they did not wait, 0 to 1."""
        computed_s = sum(worker.computed_s for worker in self.workers)
        return computed_s / max(computed_s + sum(worker.waited_s for worker in self.workers), 1e-12)
