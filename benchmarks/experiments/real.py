"""Runs through real processes and sockets: workers of one torch module each that join a real server over TCP.

A `Setting` says everything that the simulator needs to play the same run: both begin with the same parameters, and each
worker draws the same samples.
"""

import asyncio
import itertools
import json
import multiprocessing
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

import paceline
import paceline_server
from experiments.data import Images, Text, join_bytes, load_fashion_mnist, load_text
from experiments.images import ImageTask
from experiments.optimizers import SGD, AdamW, learning_rate
from experiments.stacked import StackedTask, sample_generator
from experiments.text import MODEL, TextTask
from paceline.demo.model import build_model, next_byte_loss
from paceline.demo.training import Pacer
from paceline.worker import Overlap
from paceline_server.settings import config_from_mapping
from paceline_simulator import Arrival, ModuleTask, Result, Simulation, Task, WorkerSpec, read_arrivals

Batch = tuple[Tensor, Tensor]
"""Inputs and targets of one inner step."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One run, to be played for real or simulated.

    Attributes:
        kind: What is trained: "text" (a byte transformer of 34,976 parameters) or "images" (a perceptron on
            Fashion-MNIST).
        inner: The inner optimizer, AdamW with clipping and a falling rate, or plain SGD.
        inner_lr: Its rate; AdamW's peak.
        num_workers: Workers, all of the same speed.
        server: The server's configuration, as in its file.
        overlap: What workers do while a push is under way.
        rounds: Rounds of every worker.
        step_s: What an inner step lasts; a real one that takes longer is not made up for.
        delay_s: One-way delay of every worker's link.
        jitter: Sigma of a simulated round's speed; real rounds differ by themselves.
        seed: First parameters and batches.
    """

    kind: Literal["text", "images"]
    inner: Literal["adamw", "sgd"]
    inner_lr: float
    num_workers: int
    server: Mapping[str, Any]
    overlap: Literal["eager", "blocking"] = "blocking"
    rounds: int
    step_s: float
    delay_s: float = 0.0
    jitter: float = 0.0
    seed: int = 0

    @property
    def inner_steps(self) -> int:
        """Inner steps in a round."""
        return int(self.server["exchange"]["inner_steps"])

    @property
    def optimizer(self) -> AdamW | SGD:
        """The inner optimizer's settings."""
        if self.inner == "sgd":
            return SGD(rate=self.inner_lr)
        return AdamW(rate=self.inner_lr, total_steps=self.rounds * self.inner_steps)


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a real worker saw.

    Attributes:
        step_s: Mean seconds of an inner step, what it waited for included.
        overruns: Share of the inner steps that took longer than planned.
        bins_late: Mean lateness of its pushes.
        answered_after: Inner steps from the end of a round to its answer, mean; None if none came between two steps.
    """

    step_s: float
    overruns: float
    bins_late: float
    answered_after: float | None


@dataclass(frozen=True, kw_only=True)
class RealRun:
    """What a real run came to.

    Attributes:
        parameters: The server's at the end, by name.
        arrivals: The pushes, in the order in which the server took them.
        reports: What each worker saw.
    """

    parameters: dict[str, Tensor]
    arrivals: list[Arrival] = field(repr=False)
    reports: list[Report]


class Recipe:
    """A setting as an ordinary torch script has it: a module, an optimizer, batches and a loss."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.task = stacked_task(setting)
        self._first = {name: tensor.clone() for name, tensor in self.task.tensors(0).items()}
        if setting.kind == "text":
            data, offsets = _training_bytes(), torch.arange(MODEL.context + 1)

            def batch(samples: Tensor) -> Batch:
                windows = data[samples[:, None] + offsets].long()
                return windows[:, :-1], windows[:, 1:]
        else:
            images = _images()

            def batch(samples: Tensor) -> Batch:
                return images.train[samples], images.train_labels[samples]

        self._batch = batch

    def module(self) -> nn.Module:
        """Build a worker's module, with the parameters that the simulator's task had at first."""
        if self.setting.kind == "text":
            module: nn.Module = build_model(MODEL, self.setting.seed)
        else:
            module = Perceptron(self.task.layout.shapes["hidden.weight"], self.task.layout.shapes["output.weight"])
        module.load_state_dict(self._first)
        return module

    def optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        """Build the inner optimizer of a module; AdamW's rate follows its schedule."""
        inner = self.setting.optimizer
        if isinstance(inner, SGD):
            return torch.optim.SGD(module.parameters(), lr=inner.rate)
        optimizer = torch.optim.AdamW(
            module.parameters(), lr=inner.rate, betas=inner.betas, eps=inner.eps, weight_decay=inner.weight_decay
        )
        taken, total = itertools.count(), self.setting.rounds * self.setting.inner_steps

        def follow_schedule(optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
            rate = learning_rate(inner.rate, next(taken), total)
            for group in optimizer.param_groups:
                group["lr"] = rate

        optimizer.register_step_pre_hook(follow_schedule)
        return optimizer

    def batches(self, worker: int) -> Iterator[Batch]:
        """Yield a worker's batches without end: those of the simulator's task."""
        generator = sample_generator(self.setting.seed, worker)
        while True:
            yield self._batch(self.task.draw(worker, 1, generator)[0])

    def loss(self, module: nn.Module, batch: Batch) -> Tensor:
        """Return the mean loss of a batch, differentiable."""
        if self.setting.kind == "text":
            return next_byte_loss(module, *batch)
        return functional.cross_entropy(module(batch[0]), batch[1])

    def clip(self, module: nn.Module) -> None:
        """Cut gradients that are too long, if the inner optimizer wants that."""
        inner = self.setting.optimizer
        if isinstance(inner, AdamW):
            torch.nn.utils.clip_grad_norm_(module.parameters(), inner.gradient_norm)

    def module_task(self) -> ModuleTask:
        """Return all of it as a task for the simulator that computes with the very same kernels."""
        return ModuleTask(
            self.setting.num_workers,
            build=self.module,
            optimizer=self.optimizer,
            batches=self.batches,
            loss=self.loss,
            after_backward=self.clip,
            tokens_per_step=self.task.tokens_per_step,
        )


class Perceptron(nn.Module):
    """The image task's model; the shapes are those of its two weights, [out, in]."""

    def __init__(self, hidden: torch.Size, output: torch.Size) -> None:
        super().__init__()
        self.hidden = nn.Linear(hidden[1], hidden[0])
        self.output = nn.Linear(output[1], output[0])

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits [B, classes] of images [B, pixels]."""
        logits: Tensor = self.output(torch.relu(self.hidden(inputs)))
        return logits


def stacked_task(setting: Setting) -> StackedTask:
    """Return the simulator's own task, which also judges, on the test part."""
    workers, inner, seed = setting.num_workers, setting.optimizer, setting.seed
    if setting.kind == "text":
        return TextTask(_text(), num_workers=workers, optimizer=inner, seed=seed, part="test")
    return ImageTask(_images(), num_workers=workers, optimizer=inner, seed=seed, part="test")


def simulate(setting: Setting, task: Task, arrivals: Sequence[Arrival] | None = None) -> Result:
    """Play a setting in virtual time.

    Args:
        setting: The run.
        task: What is trained: `stacked_task`, or `Recipe.module_task`.
        arrivals: The order in which pushes are let in; None: as they come.
    """
    worker = WorkerSpec(step_s=setting.step_s, jitter=setting.jitter, delay_s=setting.delay_s)
    return Simulation(
        config_from_mapping(dict(setting.server)),
        task,
        [worker] * setting.num_workers,
        seed=setting.seed,
        overlap=Overlap(setting.overlap),
        arrival_order=arrivals,
    ).run(until_rounds=setting.rounds)


def train_for_real(setting: Setting, workers: "Workers", arrivals: Path) -> RealRun:
    """Play a setting with a server process, worker processes and, if there is a delay, links between them.

    Args:
        setting: The run.
        workers: The processes; those that are not needed rest.
        arrivals: A new file for the order of the pushes.
    """
    server = {**setting.server, "storage": {"arrivals": str(arrivals)}}
    with paceline_server.local(server) as address:
        with _links(address, setting) as addresses:
            reports = workers.train(setting, addresses)
        parameters = asyncio.run(_fetched(address))
    return RealRun(parameters=parameters, arrivals=read_arrivals(arrivals), reports=reports)


def distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Return the largest difference of two models' parameters, as a share of the first one's largest parameter."""
    largest = max(tensor.abs().max().item() for tensor in one.values())
    return max((tensor - other[name]).abs().max().item() for name, tensor in one.items()) / largest


class Workers:
    """Worker processes, each an interpreter of its own, used for one run after another; a context manager.

    Args:
        count: How many.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._processes: list[BaseProcess] = []
        self._pipes: list[connection.Connection] = []

    def train(self, setting: Setting, addresses: Sequence[str]) -> list[Report]:
        """Let workers join, each at its address; when all have, let them train to the end.

        Raises:
            RuntimeError: A process ended.
        """
        pipes = self._pipes[: setting.num_workers]
        for pipe, address in zip(pipes, addresses, strict=True):
            pipe.send((setting, address))
        self._answers(pipes)
        for pipe in pipes:
            pipe.send(None)
        return self._answers(pipes)

    def __enter__(self) -> Self:
        context = multiprocessing.get_context("spawn")
        for number in range(self._count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, number), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.kill()  # it rests, or what it does is of no use any more
        for process in self._processes:
            process.join()

    def _answers(self, pipes: Sequence[connection.Connection]) -> list[Any]:
        answers: dict[int, Any] = {}
        while len(answers) < len(pipes):
            for ready in connection.wait([pipe for index, pipe in enumerate(pipes) if index not in answers]):
                index = next(index for index, pipe in enumerate(pipes) if pipe is ready)
                try:
                    answers[index] = pipes[index].recv()
                except EOFError:
                    raise RuntimeError(f"worker process {index} ended; see its messages above") from None
        return [answers[index] for index in range(len(pipes))]


def _work(pipe: connection.Connection, number: int) -> None:
    """Be a worker process: train in one run after another, until the other end of the pipe is closed."""
    torch.set_num_threads(1)
    while True:
        try:
            setting, address = pipe.recv()
        except EOFError:
            return
        pipe.send(_train(setting, address, number, pipe))


def _train(setting: Setting, address: str, number: int, pipe: connection.Connection) -> Report:
    """Train as a user's script does, paced; says when it has joined, and waits for the word to start."""
    recipe = Recipe(setting)
    model = recipe.module()
    optimizer = recipe.optimizer(model)
    batches = recipe.batches(number)
    answered_after: list[float] = []
    with paceline.join(address, model, optimizer, worker_id=f"worker-{number}", overlap=setting.overlap) as run:
        pipe.send("joined")
        pipe.recv()
        pacer = Pacer(setting.step_s)
        while run.round < setting.rounds:
            with pacer.step():
                loss = recipe.loss(model, next(batches))
                loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it so
                recipe.clip(model)
                optimizer.step()
                optimizer.zero_grad()
            if run.stats().rounds > len(answered_after):
                ended = (len(answered_after) + 1) * setting.inner_steps
                answered_after.append(max(0.0, pacer.steps - ended - 0.5))  # some time within the last step
        elapsed_s = pacer.elapsed_s
        run.flush()
        stats = run.stats()
    return Report(
        step_s=elapsed_s / pacer.steps,
        overruns=pacer.overruns / pacer.steps,
        bins_late=stats.lateness,
        answered_after=sum(answered_after) / len(answered_after) if answered_after else None,
    )


@contextmanager
def _links(address: str, setting: Setting) -> Iterator[list[str]]:
    """Yield each worker's address: the server's, or that of an emulated link to it."""
    if not setting.delay_s:
        yield [address] * setting.num_workers
        return
    command = [sys.executable, "-m", "paceline.relay", "--target", address]
    command += ["--links", str(setting.num_workers), "--delay-ms", str(setting.delay_s * 1e3)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as relay:
        try:
            listening = relay.stdout.readline() if relay.stdout is not None else ""
            yield [f"127.0.0.1:{port}" for port in json.loads(listening)["ports"]]
        finally:
            relay.communicate()  # it ends with its standard input


async def _fetched(address: str) -> dict[str, Tensor]:
    async with paceline.connect(address) as observer:
        return (await observer.fetch("fp32")).tensors


@lru_cache(maxsize=1)
def _text() -> Text:
    return load_text()


@lru_cache(maxsize=1)
def _training_bytes() -> Tensor:
    return join_bytes(list(_text().train.values()))


@lru_cache(maxsize=1)
def _images() -> Images:
    return load_fashion_mnist()
