"""What simulated workers train: the interface, and its plainest implementation, a torch module for each worker."""

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Protocol

import torch

from paceline.fragments import exchanged
from paceline.local_momentum import LocalMomentum


class Task(Protocol):
    """The models of all workers, and their training. Workers are numbered from 0."""

    @property
    def averaged(self) -> Collection[str]:
        """Names of the tensors that are averaged without momentum."""

    @property
    def tokens_per_step(self) -> int:
        """Tokens or samples in one worker's inner step."""

    def tensors(self, worker: int) -> Mapping[str, torch.Tensor]:
        """A worker's live model by name, detached; read and changed in place, so always the same memory."""

    def momentum(self, worker: int) -> Mapping[str, torch.Tensor]:
        """The momentum of a worker's inner steps, learning rate inside; asked for only if the run orders it."""

    def reset_momentum(self, worker: int) -> None:
        """Let a worker's next round begin without momentum."""

    def advance(self, steps: Mapping[int, int]) -> None:
        """Make so many inner steps with each of these workers' models, in place."""

    def restart(self, worker: int) -> None:
        """A worker comes back as a new process: forget its optimizer's state. Its model is set to the run's next."""

    def evaluate(self, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, float]:
        """Judge parameters (float32 on the host, by name)."""


class ModuleTask:
    """A module, an optimizer and a stream of batches for each worker.

    Args:
        num_workers: How many.
        build: Makes a worker's module; all should begin alike.
        optimizer: Makes the optimizer of a module.
        batches: Gives a worker's batches, without end.
        loss: The loss of a module on a batch, a scalar that is differentiable.
        evaluate: Judges a module that holds the run's parameters; None: nothing is judged.
        after_backward: Called with the module between gradient and step, to clip; None: nothing.
        tokens_per_step: Tokens or samples in one inner step.
    """

    def __init__(
        self,
        num_workers: int,
        *,
        build: Callable[[], torch.nn.Module],
        optimizer: Callable[[torch.nn.Module], torch.optim.Optimizer],
        batches: Callable[[int], Iterator[Any]],
        loss: Callable[[torch.nn.Module, Any], torch.Tensor],
        evaluate: Callable[[torch.nn.Module], Mapping[str, float]] | None = None,
        after_backward: Callable[[torch.nn.Module], None] | None = None,
        tokens_per_step: int = 1,
    ) -> None:
        self.tokens_per_step = tokens_per_step
        self.modules = [build() for _ in range(num_workers)]
        self._make_optimizer = optimizer
        self.optimizers = [optimizer(module) for module in self.modules]
        self._batches = [batches(worker) for worker in range(num_workers)]
        self._loss = loss
        self._evaluate = evaluate
        self._after_backward = after_backward
        self._judged = build()
        buffers = {name for name, buffer in self._judged.named_buffers() if buffer.is_floating_point()}
        self.averaged: Collection[str] = buffers & self._judged.state_dict().keys()

    def tensors(self, worker: int) -> Mapping[str, torch.Tensor]:
        """Trainable parameters and floating persistent buffers, as `paceline.join` takes them."""
        return exchanged(self._named(self.modules[worker]))

    def momentum(self, worker: int) -> Mapping[str, torch.Tensor]:
        """The momentum of the worker's SGD."""
        return self._local_momentum(worker).read()

    def reset_momentum(self, worker: int) -> None:
        """Zero it."""
        self._local_momentum(worker).reset()

    def advance(self, steps: Mapping[int, int]) -> None:
        """Train the workers one after the other."""
        with torch.enable_grad():
            for worker, count in steps.items():
                for _ in range(count):
                    self._step(worker)

    def restart(self, worker: int) -> None:
        """Make the worker's optimizer anew; its batches go on."""
        self.optimizers[worker] = self._make_optimizer(self.modules[worker])

    def evaluate(self, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, float]:
        """Load the parameters into a module of its own and judge that."""
        if self._evaluate is None:
            return {}
        with torch.no_grad():
            for name, tensor in exchanged(self._named(self._judged)).items():
                tensor.copy_(tensors[name])
            return self._evaluate(self._judged)

    def _step(self, worker: int) -> None:
        module, optimizer = self.modules[worker], self.optimizers[worker]
        optimizer.zero_grad()
        self._loss(module, next(self._batches[worker])).backward()  # type: ignore[no-untyped-call]  # torch leaves it so
        if self._after_backward is not None:
            self._after_backward(module)
        optimizer.step()

    def _named(self, module: torch.nn.Module) -> dict[str, torch.Tensor]:
        trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
        return {**trained, **{name: buffer for name, buffer in module.named_buffers() if name in self.averaged}}

    def _local_momentum(self, worker: int) -> LocalMomentum:
        module, optimizer = self.modules[worker], self.optimizers[worker]
        exchanged_names = self.tensors(worker).keys()
        parameters = {name: value for name, value in module.named_parameters() if name in exchanged_names}
        return LocalMomentum(optimizer, parameters, optimizer.param_groups[0]["momentum"])
