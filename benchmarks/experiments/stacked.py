"""The base of the simulator's tasks: all workers' models as rows of one tensor, trained a block of rows at a time."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from experiments.optimizers import SGD, AdamW
from paceline_wire.errors import InvalidInputError

# Shapes, here and in the tasks: W workers, P parameters of one model, R rows (the workers of one block).


class Layout:
    """Where each named tensor lies in a flat row of parameters."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.shapes = {name: tensor.shape for name, tensor in tensors.items()}
        self._sizes = [shape.numel() for shape in self.shapes.values()]
        self.num_parameters = sum(self._sizes)

    def views(self, rows: Tensor) -> dict[str, Tensor]:
        """View float32 [..., P] as its named tensors, each [..., *shape]."""
        lead = rows.shape[:-1]
        segments = torch.split(rows, self._sizes, dim=-1)
        named = zip(self.shapes.items(), segments, strict=True)
        return {name: segment.view(*lead, *shape) for (name, shape), segment in named}

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Copy one model's tensors into a row, float32 [P].

        Raises:
            InvalidInputError: The names are not those of the layout.
        """
        if tensors.keys() != self.shapes.keys():
            raise InvalidInputError(f"the task's parameters are {list(self.shapes)}, not {list(tensors)}")
        return torch.cat([tensors[name].detach().reshape(-1).float() for name in self.shapes])


class StackedTask(ABC):
    """Many workers that train copies of one small model; what the simulator calls a task.

    What a worker computes depends on its own row, its own stream of samples and nothing else: not on the workers that
    advance beside it, nor on how its steps are divided among calls.
    """

    averaged: Collection[str] = ()
    """Names of averaged buffers: these models have none."""
    tokens_per_step: int
    """Tokens or samples in one inner step of one worker."""

    def __init__(
        self,
        initial: Mapping[str, Tensor],
        *,
        num_workers: int,
        optimizer: AdamW | SGD,
        seed: int,
        tokens_per_step: int,
        rows_at_once: int,
    ) -> None:
        """Give every worker the same first parameters.

        Args:
            initial: Parameters by name.
            num_workers: Workers, numbered from 0.
            optimizer: The inner optimizer of all of them.
            seed: Decides, with a worker's number, its stream of samples.
            tokens_per_step: Tokens or samples in one inner step of one worker.
            rows_at_once: Workers that are computed together; more of them would not stay in the cache.
        """
        self.tokens_per_step = tokens_per_step
        self.layout = Layout(initial)
        self.num_workers = num_workers
        self._parameters = self.layout.flatten(initial).repeat(num_workers, 1)
        self._optimizer = optimizer.build(num_workers, self.layout.num_parameters)
        self._gradients = torch.zeros(min(rows_at_once, num_workers), self.layout.num_parameters)
        self._tensors = [self.layout.views(row) for row in self._parameters]
        self._generators = [sample_generator(seed, worker) for worker in range(num_workers)]

    @abstractmethod
    def draw(self, worker: int, num_steps: int, generator: torch.Generator) -> Tensor:
        """Choose a worker's next samples.

        Args:
            worker: Whose.
            num_steps: Inner steps to choose for. Drawing for two steps must equal drawing for one twice.
            generator: The worker's own source of chance; the only one.

        Returns:
            int64 [num_steps, samples of one step]: where the samples are.
        """

    @abstractmethod
    def compute_gradients(self, parameters: Mapping[str, Tensor], samples: Tensor, out: Tensor) -> None:
        """Compute each row's gradient of the mean loss of its own samples.

        Args:
            parameters: By name, float32 [R, *shape]; only the dimensions of one row are contiguous.
            samples: int64 [R, samples of one step], as `draw` chose them.
            out: Where to write the gradients, float32 [R, P]; every element is to be overwritten.
        """

    @abstractmethod
    def evaluate(self, tensors: Mapping[str, Tensor]) -> Mapping[str, float]:
        """Return "loss" (mean, nats) and "accuracy" (0 to 1) of one model on the evaluation part."""

    def tensors(self, worker: int) -> Mapping[str, Tensor]:
        """Return the live parameters of a worker by name: views of its row, to be read and written in place."""
        return self._tensors[worker]

    def momentum(self, worker: int) -> Mapping[str, Tensor]:
        """Return a worker's live local momentum by name, times the inner rate: views of its row.

        Raises:
            InvalidInputError: The inner optimizer has no such momentum.
        """
        return self.layout.views(self._momentum_row(worker))

    def reset_momentum(self, worker: int) -> None:
        """Zero a worker's local momentum.

        Raises:
            InvalidInputError: The inner optimizer has no such momentum.
        """
        self._momentum_row(worker).zero_()

    def restart(self, worker: int) -> None:
        """Forget the state of a worker's inner optimizer; its stream of samples and its schedule go on."""
        self._optimizer.restart(worker)

    def advance(self, steps: Mapping[int, int]) -> None:
        """Train some workers, in place.

        Args:
            steps: Inner steps by worker; the counts may differ.
        """
        order = sorted((worker for worker in steps if steps[worker] > 0), key=lambda worker: (-steps[worker], worker))
        num_blocks = -(-len(order) // len(self._gradients))
        for block in range(num_blocks):  # of about the same size: a single row costs nearly twice its share of a block
            workers = order[block * len(order) // num_blocks : (block + 1) * len(order) // num_blocks]
            self._advance_block(workers, [steps[worker] for worker in workers])

    def _advance_block(self, workers: list[int], steps: list[int]) -> None:
        """Train workers that are given in the order of falling steps: those still at work are the first rows."""
        stacks = (self._parameters, *self._optimizer.state)
        rows = _rows(workers)
        blocks = [stack[rows] for stack in stacks]
        drawn = [self.draw(worker, num, self._generators[worker]) for worker, num in zip(workers, steps, strict=True)]
        samples = pad_sequence(drawn, batch_first=True)  # [R, steps, samples of one step]
        done = 0
        for until in sorted(set(steps)):
            active = sum(num >= until for num in steps)
            self._train(workers[:active], [block[:active] for block in blocks], samples[:active, done:until])
            done = until
        if isinstance(rows, Tensor):
            for stack, block in zip(stacks, blocks, strict=True):
                stack[rows] = block

    def _train(self, workers: list[int], blocks: list[Tensor], samples: Tensor) -> None:
        parameters, *state = blocks
        gradients = self._gradients[: len(workers)]
        named = self.layout.views(parameters)
        for samples_of_step in samples.unbind(1):
            self.compute_gradients(named, samples_of_step, gradients)
            self._optimizer.step(workers, parameters, gradients, state)

    def _momentum_row(self, worker: int) -> Tensor:
        if self._optimizer.momentum is None:
            raise InvalidInputError(f"{type(self._optimizer).__name__} keeps no local momentum here")
        return self._optimizer.momentum[worker]


def _rows(workers: Sequence[int]) -> slice | Tensor:
    """Return the index of the workers' rows: a slice, which copies nothing, where they lie one after the other."""
    first, last = workers[0], workers[-1]
    if list(workers) == list(range(first, last + 1)):
        return slice(first, last + 1)
    return torch.tensor(workers)


def sample_generator(seed: int, worker: int) -> torch.Generator:
    """Return a worker's own source of chance; hashed, so that neighbouring seeds share no streams."""
    state = np.random.SeedSequence((seed, worker)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))
