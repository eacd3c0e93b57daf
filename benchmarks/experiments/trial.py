"""One trial: everything that determines one simulated run, and what came out of it."""

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any, Literal

import torch

from experiments.data import Images, Part, Text, load_fashion_mnist, load_text
from experiments.images import ImageTask
from experiments.optimizers import SGD, AdamW
from experiments.stacked import StackedTask
from experiments.text import TextTask
from paceline.worker import Overlap
from paceline_server.settings import config_from_mapping
from paceline_simulator import Absence, Result, Simulation, Task, WorkerSpec
from paceline_simulator.workers import Manner
from paceline_wire.memory import keep_large_buffers


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """What workers train.

    Attributes:
        kind: "text" (a byte transformer of 34,976 parameters) or "images" (a perceptron on Fashion-MNIST).
        inner: The inner optimizer.
        inner_lr: Its rate; AdamW's peak, which falls over the steps that a worker will have taken at the end.
        sharding: "same", or how the workers' data differ ("by-source", "by-class").
    """

    kind: Literal["text", "images"]
    inner: Literal["adamw", "sgd"] = "adamw"
    inner_lr: float = 0.004
    sharding: Literal["same", "by-source", "by-class"] = "same"


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """Who works, in units of the fastest worker's inner step.

    Attributes:
        slowness: How many times slower than the fastest each worker is.
        jitter: Sigma of the lognormal factor of each round's duration.
        delay: One-way delay of every link, in inner steps of the fastest worker.
        absences: (worker, from, to, "vanish" | "leave" | "stall").
    """

    slowness: tuple[float, ...]
    jitter: float = 0.0
    delay: float = 0.0
    absences: tuple[tuple[int, float, float, str], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run.

    Attributes:
        task: What is trained.
        fleet: By whom.
        server: The server's settings by dotted name.
        overlap: What workers do while a push is under way.
        downlink_delta: Codec of updates as differences to what the worker holds; None: as server says, in full.
        error_feedback: Whether what the uplink's codec lost is added to the next push.
        until_s: Virtual end; or
        until_rounds: Rounds that every worker makes, whose answers all come; or
        until_gradients: Inner steps, over all workers, at which it ends.
        points: Evaluations on the way, evenly spaced.
        seed: First parameters, batches and jitter.
        part: Which held-out part is evaluated: "validation" to choose, "test" to report.
    """

    task: TaskSpec
    fleet: Fleet
    server: tuple[tuple[str, Any], ...] = ()
    overlap: Literal["eager", "delayed", "blocking"] = "eager"
    downlink_delta: str | None = None
    error_feedback: bool = True
    until_s: float | None = None
    until_rounds: int | None = None
    until_gradients: int | None = None
    points: int = 1
    seed: int = 0
    part: Part = "validation"

    @property
    def key(self) -> str:
        """A name that differs for all trials that differ in anything."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:24]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came out.

    Attributes:
        loss: Of the server's parameters at the end, nats; infinite if the run diverged.
        accuracy: Likewise, 0 to 1.
        end_s: Virtual time at the end.
        gradients: Inner steps done by all workers together.
        bins_late: Mean lateness of the applied pushes.
        waited: Share of the workers' time that they waited.
        bytes_up: Payload bytes of pushes.
        bytes_down: Payload bytes of updates.
        curve: (time, inner steps of all workers, loss, accuracy) at each evaluation.
        cpu_s: Processor seconds that the trial took.
    """

    loss: float
    accuracy: float
    end_s: float
    gradients: int
    bins_late: float
    waited: float
    bytes_up: int
    bytes_down: int
    curve: list[tuple[float, int, float, float]] = field(default_factory=list)
    cpu_s: float = 0.0


def play(trial: Trial) -> Outcome:
    """Play a trial in virtual time; the same trial gives the same outcome on the same machine."""
    began_s = time.process_time()
    keep_large_buffers()
    torch.set_num_threads(1)
    clocked = _clocked(trial)
    task = _task(trial, [max(1, worker.inner_steps) for worker in clocked.workers])
    simulation = _simulation(trial, task, evaluate_every_s=clocked.time_s / trial.points)
    result = simulation.run(until_s=clocked.time_s)
    curve = [
        (
            look.time_s,
            look.inner_steps,
            look.metrics["loss"] if math.isfinite(look.metrics["loss"]) else math.inf,
            look.metrics["accuracy"],
        )
        for look in result.evaluations
    ]
    workers = result.workers
    pushes = sum(worker.pushes for worker in workers)
    return Outcome(
        loss=curve[-1][2],
        accuracy=curve[-1][3],
        end_s=result.time_s,
        gradients=sum(worker.inner_steps for worker in workers),
        bins_late=sum(worker.mean_lateness * worker.pushes for worker in workers) / max(1, pushes),
        waited=1 - result.compute_utilization,
        bytes_up=sum(worker.bytes_up for worker in workers),
        bytes_down=sum(worker.bytes_down for worker in workers),
        curve=curve,
        cpu_s=time.process_time() - began_s,
    )


class _NothingToTrain:
    """A task of one number that never changes: to learn from a simulation only who does what when."""

    averaged = ()
    tokens_per_step = 1

    def __init__(self, num_workers: int) -> None:
        self._numbers = [torch.zeros(1) for _ in range(num_workers)]

    def tensors(self, worker: int) -> Mapping[str, torch.Tensor]:
        return {"x": self._numbers[worker]}

    def momentum(self, worker: int) -> Mapping[str, torch.Tensor]:
        return {"x": torch.zeros(1)}

    def reset_momentum(self, worker: int) -> None:
        return

    def advance(self, steps: Mapping[int, int]) -> None:
        return

    def restart(self, worker: int) -> None:
        return

    def evaluate(self, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, float]:
        return {}


def _clocked(trial: Trial) -> Result:
    """Play a trial without training: its end, and each worker's inner steps, do not depend on the numbers."""
    nothing = _NothingToTrain(len(trial.fleet.slowness))
    if trial.until_gradients is None:
        return _simulation(trial, nothing).run(until_s=trial.until_s, until_rounds=trial.until_rounds)
    looked = _simulation(trial, nothing, evaluate_every_s=0.5)
    pace = sum(1 / slowness for slowness in trial.fleet.slowness)
    until_s = 0.0
    while True:
        until_s += max(1.0, 0.2 * trial.until_gradients / pace)
        looks = looked.run(until_s=until_s).evaluations
        enough = next((look.time_s for look in looks if look.inner_steps >= trial.until_gradients), None)
        if enough is not None:
            return _simulation(trial, nothing).run(until_s=enough)


def _simulation(trial: Trial, task: Task, evaluate_every_s: float | None = None) -> Simulation:
    config = dict(trial.server)
    # Bytes are counted, links only delay: leases are longer than any absence.
    config.setdefault("schedule.lease_s", 1e5)
    if trial.downlink_delta is not None:
        config["exchange.downlink"] = "fp32"
    absences: dict[int, list[Absence]] = {}
    for worker, from_s, to_s, manner in trial.fleet.absences:
        absences.setdefault(worker, []).append(Absence(from_s=from_s, to_s=to_s, manner=Manner(manner)))
    return Simulation(
        config_from_mapping(_nested(config)),
        task,
        [
            WorkerSpec(
                step_s=slowness,
                jitter=trial.fleet.jitter,
                delay_s=trial.fleet.delay,
                absences=tuple(absences.get(worker, ())),
            )
            for worker, slowness in enumerate(trial.fleet.slowness)
        ],
        seed=trial.seed,
        overlap=Overlap(trial.overlap),
        downlink=trial.downlink_delta,
        error_feedback=trial.error_feedback,
        evaluate_every_s=evaluate_every_s,
    )


def _nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    config: dict[str, Any] = {}
    for name, value in settings.items():
        section, _, key = name.rpartition(".")
        (config.setdefault(section, {}) if section else config)[key] = value
    return config


def _task(trial: Trial, inner_steps: Sequence[int]) -> StackedTask:
    spec = trial.task
    optimizer = SGD(rate=spec.inner_lr) if spec.inner == "sgd" else AdamW(rate=spec.inner_lr, total_steps=inner_steps)
    kind: Any = TextTask if spec.kind == "text" else ImageTask
    task: StackedTask = kind(
        _text() if spec.kind == "text" else _images(),
        num_workers=len(trial.fleet.slowness),
        optimizer=optimizer,
        seed=trial.seed,
        part=trial.part,
        sharding=spec.sharding,
    )
    return task


@lru_cache(maxsize=1)
def _text() -> Text:
    return load_text()


@lru_cache(maxsize=1)
def _images() -> Images:
    return load_fashion_mnist()
