"""The training loop that every worker runs, together or alone: ordinary PyTorch, paced to a fixed time per step."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from paceline.demo.data import sample_batch
from paceline.demo.model import next_byte_loss
from paceline.demo.settings import DemoSettings

WARMUP_SHARE = 0.05
"""Share of the training time over which the learning rate rises."""
FINAL_RATE = 0.1
"""What is left of the peak learning rate at the end; falling rates help the lone worker most, so both have them."""
GRADIENT_NORM = 1.0
"""Gradients longer than this are cut to it."""
WEIGHT_DECAY = 0.1
BETAS = (0.9, 0.95)


class Pacer:
    """Makes every step last at least a fixed time, as if each worker sat on a slower host of its own.

    A step that takes longer, because the machine is busy or the network is waited for, isn't made up for: the time is
    lost, as it would be elsewhere. Steps that overran are counted, so a reader can tell whether the machine sufficed.
    """

    def __init__(
        self,
        step_s: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.step_s = step_s
        self.steps = 0
        self.overruns = 0
        self._clock = clock
        self._sleep = sleep
        self._start_s = clock()
        self._stopped_s = 0.0

    @property
    def elapsed_s(self) -> float:
        """Seconds since the pacer was made, without those when its clock was stopped."""
        return self._clock() - self._start_s - self._stopped_s

    @contextmanager
    def step(self) -> Iterator[None]:
        """Run one step in this context; leaving it waits until the step's time is over."""
        begin_s = self.elapsed_s
        yield
        left_s = self.step_s - (self.elapsed_s - begin_s)
        self.steps += 1
        if left_s < 0:
            self.overruns += 1
        else:
            self._sleep(left_s)

    @contextmanager
    def stopped_clock(self) -> Iterator[None]:
        """Stop the clock inside this context, for work that isn't training; not to be used inside a step."""
        begin_s = self._clock()
        yield
        self._stopped_s += self._clock() - begin_s


def learning_rate(settings: DemoSettings, *, begin_s: float, elapsed_s: float) -> float:
    """Return the learning rate at a moment: a short rise from the first step on, then a straight fall to the end.

    Args:
        settings: The peak and the training time.
        begin_s: Training time at the first step: joining a run takes some, and Adam must not begin at the full rate.
        elapsed_s: Training time now.
    """
    rise = (elapsed_s - begin_s + settings.step_s) / (WARMUP_SHARE * settings.seconds)
    fall = (1 - FINAL_RATE) * min(1.0, elapsed_s / settings.seconds)
    return settings.learning_rate * min(1.0, rise) * (1 - fall)


def build_optimizer(model: nn.Module, settings: DemoSettings) -> torch.optim.AdamW:
    """Build the inner optimizer."""
    return torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=BETAS, weight_decay=WEIGHT_DECAY)


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one step came to."""

    elapsed_s: float
    """Training time when the step had ended."""
    loss: float
    """Of the step's own batch before the step, nats per byte."""


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, data: Tensor, settings: DemoSettings, pacer: Pacer, stream: int
) -> Iterator[StepResult]:
    """Train until the time is over, yielding after every step.

    Args:
        model: What is trained.
        optimizer: Its optimizer; `paceline.join` may have hooked it, which is nothing to this loop.
        data: uint8 [bytes] to draw sequences from.
        settings: Batch, rates and time.
        pacer: Keeps the time.
        stream: Number of this worker's own stream of batches; no two are alike.

    Yields:
        The result of each step.
    """
    generator = torch.Generator().manual_seed(1000 * settings.seed + stream)
    begin_s = pacer.elapsed_s
    while pacer.elapsed_s < settings.seconds:
        with pacer.step():
            rate = learning_rate(settings, begin_s=begin_s, elapsed_s=pacer.elapsed_s)
            for group in optimizer.param_groups:
                group["lr"] = rate
            inputs, targets = sample_batch(data, settings.batch_size, settings.model.context, generator)
            loss = next_byte_loss(model, inputs, targets)
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it so
            torch.nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_NORM)
            optimizer.step()
            optimizer.zero_grad()
        yield StepResult(elapsed_s=pacer.elapsed_s, loss=loss.item())
