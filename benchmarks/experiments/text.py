"""The text task: workers train byte-level transformers of 34,976 parameters on the standard library's source."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from experiments.data import Part, Text, divide_by_source, join_bytes
from experiments.optimizers import SGD, AdamW
from experiments.stacked import StackedTask
from experiments.transformer import StackedTransformer
from paceline.demo.model import ModelConfig, build_model

MODEL = ModelConfig(context=64, width=32, num_heads=2, num_layers=2)
ROWS_AT_ONCE = 4
"""Workers computed together: the logits (128 KiB each) and parameters of more would not stay in a core's cache."""
SEQUENCES_AT_ONCE = 16
"""Sequences that an evaluation computes together; more would not stay in the cache."""


class TextTask(StackedTask):
    """Next-byte prediction: loss in nats per byte, accuracy as the share of bytes guessed right.

    Sharding "same" lets every worker draw sequences from all training files, evenly and with replacement. "by-source"
    gives each worker files of its own (`divide_by_source`) to draw from.
    """

    def __init__(
        self,
        text: Text,
        *,
        num_workers: int,
        optimizer: AdamW | SGD,
        seed: int,
        part: Part,
        sharding: Literal["same", "by-source"] = "same",
        model: ModelConfig = MODEL,
        batch_size: int = 2,
        evaluation_sequences: int = 256,
    ) -> None:
        """Build the workers.

        Args:
            text: What there is to learn.
            num_workers: Workers, numbered from 0.
            optimizer: The inner optimizer of all of them.
            seed: Decides the first parameters, and with a worker's number its batches.
            part: What `evaluate` uses.
            sharding: What workers draw from.
            model: Sizes of the model.
            batch_size: Sequences of one inner step.
            evaluation_sequences: Sequences of one evaluation, evenly spread over the part; always the same ones.
        """
        super().__init__(
            {name: parameter.detach() for name, parameter in build_model(model, seed).named_parameters()},
            num_workers=num_workers,
            optimizer=optimizer,
            seed=seed,
            tokens_per_step=batch_size * model.context,
            rows_at_once=ROWS_AT_ONCE,
        )
        self._model = StackedTransformer(model)
        self._batch_size = batch_size
        self._offsets = torch.arange(model.context + 1)
        self._data, self._ranges = _shards(text, num_workers, sharding)
        evaluated = join_bytes(list((text.validation if part == "validation" else text.test).values()))
        for num_bytes in (len(evaluated), *(end - begin for begin, end in self._ranges)):
            if num_bytes <= model.context:
                raise ValueError(f"{num_bytes} bytes are too few for sequences of {model.context} and one more")
        starts = torch.linspace(0, len(evaluated) - model.context - 1, evaluation_sequences).long()
        self._evaluated = self._sequences(evaluated, starts)

    def draw(self, worker: int, num_steps: int, generator: torch.Generator) -> Tensor:
        """Return where a worker's next sequences begin, int64 [num_steps, batch_size]."""
        begin, end = self._ranges[worker]
        last = end - self._model.config.context
        return torch.randint(begin, last, (num_steps, self._batch_size), generator=generator)

    def compute_gradients(self, parameters: Mapping[str, Tensor], samples: Tensor, out: Tensor) -> None:
        """Compute each row's gradient of the mean loss of its sequences, which begin at `samples`."""
        windows = self._sequences(self._data, samples)
        gradients = self._model.gradients(parameters, windows[..., :-1], windows[..., 1:])
        torch.cat([gradients[name].flatten(1) for name in self.layout.shapes], 1, out=out)

    def evaluate(self, tensors: Mapping[str, Tensor]) -> Mapping[str, float]:
        """Return "loss" (nats per byte) and "accuracy" (0 to 1) of one model on the part chosen at the start."""
        row = self.layout.views(self.layout.flatten(tensors)[None])
        loss = right = 0.0
        with torch.inference_mode():
            for windows in torch.split(self._evaluated, SEQUENCES_AT_ONCE):
                logits = self._model.logits(row, windows[None, :, :-1])[0]
                targets = windows[:, 1:].flatten()
                loss += functional.cross_entropy(logits, targets, reduction="sum").item()
                right += (logits.argmax(1) == targets).sum().item()
        num_bytes = self._evaluated[:, 1:].numel()
        return {"loss": loss / num_bytes, "accuracy": right / num_bytes}

    def _sequences(self, data: Tensor, starts: Tensor) -> Tensor:
        """Return the bytes from each of the starts on, int64 [*starts.shape, context + 1]."""
        return data[starts[..., None] + self._offsets].long()


def _shards(text: Text, num_workers: int, sharding: str) -> tuple[Tensor, list[tuple[int, int]]]:
    """Return all training bytes, uint8 [bytes], and where those begin and end that each worker draws from."""
    if sharding == "same":
        data = join_bytes(list(text.train.values()))
        return data, [(0, len(data))] * num_workers
    paths_of_workers = divide_by_source(text.train, num_workers)
    data = join_bytes([text.train[path] for paths in paths_of_workers for path in paths])
    ranges = []
    end = 0
    for paths in paths_of_workers:
        begin, end = end, end + sum(len(text.train[path]) for path in paths)
        ranges.append((begin, end))
    return data, ranges
