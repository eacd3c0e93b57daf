"""The demo's model and data as a task: a byte-level transformer on the source of Python's standard library."""

from collections.abc import Iterator, Mapping

import torch

from paceline.demo.data import held_out_batch, load_corpus, sample_batch
from paceline.demo.model import build_model, evaluate, next_byte_loss
from paceline.demo.settings import DemoSettings
from paceline.demo.training import BETAS, GRADIENT_NORM, WEIGHT_DECAY
from paceline_simulator.task import ModuleTask

Batch = tuple[torch.Tensor, torch.Tensor]


def demo_task(num_workers: int, *, seed: int, learning_rate: float) -> ModuleTask:
    """The task for so many workers; each draws its own sequences.

    Args:
        num_workers: How many.
        seed: Decides the first parameters and which bytes each worker sees.
        learning_rate: Of the inner AdamW, constant.
    """
    settings, corpus = DemoSettings(), load_corpus()
    held_out = held_out_batch(corpus, settings.evaluation_sequences, settings.model.context)

    def batches(worker: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(1000 * seed + worker)
        while True:
            yield sample_batch(corpus.train, settings.batch_size, settings.model.context, generator)

    def loss(module: torch.nn.Module, batch: Batch) -> torch.Tensor:
        return next_byte_loss(module, *batch)

    def adamw(module: torch.nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(module.parameters(), lr=learning_rate, betas=BETAS, weight_decay=WEIGHT_DECAY)

    def clip(module: torch.nn.Module) -> None:
        torch.nn.utils.clip_grad_norm_(module.parameters(), GRADIENT_NORM)

    def judged(module: torch.nn.Module) -> Mapping[str, float]:
        return {"loss": evaluate(module, *held_out)}

    return ModuleTask(
        num_workers,
        build=lambda: build_model(settings.model, seed),
        optimizer=adamw,
        batches=batches,
        loss=loss,
        evaluate=judged,
        after_backward=clip,
        tokens_per_step=settings.batch_size * settings.model.context,
    )
