"""Inner optimizers whose state is one row for each worker, so that any subset of workers can take a step together."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

WARMUP_SHARE = 0.05
"""Share of a worker's planned steps over which its learning rate rises."""
FINAL_RATE = 0.1
"""What is left of the peak learning rate at the last planned step, and after it."""


def learning_rate(peak: float, taken: int, total: int) -> float:
    """Return the rate of a worker's next step: a short rise, then a straight fall; the demo's schedule, in steps.

    Args:
        peak: The highest rate there would be without the fall.
        taken: Steps that the worker has taken so far.
        total: Steps that it is planned to take.
    """
    rise = (taken + 1) / (WARMUP_SHARE * total)
    fall = (1 - FINAL_RATE) * min(1.0, taken / total)
    return peak * min(1.0, rise) * (1 - fall)


class RowOptimizer(ABC):
    """The inner optimizers of all workers, each with its own row of state.

    The task may gather some workers' rows into a block before it calls `step`; `state` lists what it has to gather.
    """

    state: tuple[Tensor, ...] = ()
    """float32 [W, P] each: what belongs to a parameter, for all workers."""
    momentum: Tensor | None = None
    """float32 [W, P]: the local momentum times the rate, one of `state`; None when there is none."""

    @abstractmethod
    def step(self, workers: Sequence[int], parameters: Tensor, gradients: Tensor, state: Sequence[Tensor]) -> None:
        """Let some workers take one step each, in place.

        Args:
            workers: The worker that each row of the block belongs to.
            parameters: float32 [R, P].
            gradients: float32 [R, P]; may be overwritten.
            state: Those workers' rows of each tensor of `self.state`, float32 [R, P], in the order of `workers`.
        """

    @abstractmethod
    def restart(self, worker: int) -> None:
        """Forget a worker's state, as a process does that ends; its place in the learning-rate schedule stays."""


class AdamWRows(RowOptimizer):
    """`torch.optim.AdamW` with clipped gradients and a falling rate, for each row on its own."""

    def __init__(self, settings: "AdamW", num_workers: int, num_parameters: int) -> None:
        total = settings.total_steps
        self._settings = settings
        self._total_steps = [total] * num_workers if isinstance(total, int) else list(total)
        if len(self._total_steps) != num_workers or min(self._total_steps) < 1:
            raise ValueError(f"total_steps must be positive, one for each of {num_workers} workers: {total}")
        self._taken = [0] * num_workers
        self._adam_steps = torch.zeros(num_workers)  # float, as torch keeps them; a restart begins them anew
        self._step_of = self._adam_steps.unbind()
        self.state = (torch.zeros(num_workers, num_parameters), torch.zeros(num_workers, num_parameters))

    def step(self, workers: Sequence[int], parameters: Tensor, gradients: Tensor, state: Sequence[Tensor]) -> None:
        """Take one step with each of the rows."""
        settings = self._settings
        norms = torch.linalg.vector_norm(gradients, dim=1)
        # What `clip_grad_norm_` multiplies by, inverted: the kernel divides by it, which saves a pass over the rows.
        divisors = ((norms + 1e-6) / settings.gradient_norm).clamp_(min=1.0).unbind()
        rows = zip(workers, parameters, gradients, *state, divisors, strict=True)
        for worker, parameter, gradient, first_moment, second_moment, divisor in rows:
            step = self._step_of[worker].add_(1)
            torch._fused_adamw_(  # the kernel below AdamW(fused=True), without its bookkeeping in Python
                [parameter],
                [gradient],
                [first_moment],
                [second_moment],
                [],
                [step],
                lr=learning_rate(settings.rate, self._taken[worker], self._total_steps[worker]),
                beta1=settings.betas[0],
                beta2=settings.betas[1],
                weight_decay=settings.weight_decay,
                eps=settings.eps,
                amsgrad=False,
                maximize=False,
                grad_scale=divisor,
            )
            self._taken[worker] += 1

    def restart(self, worker: int) -> None:
        """Zero a worker's moments and begin its bias correction anew."""
        for moments in self.state:
            moments[worker].zero_()
        self._adam_steps[worker] = 0


class SGDRows(RowOptimizer):
    """SGD at a constant rate, without clipping: `p = momentum p + rate g ; w -= p` for each row."""

    def __init__(self, settings: "SGD", num_workers: int, num_parameters: int) -> None:
        self._settings = settings
        if settings.momentum:
            self.momentum = torch.zeros(num_workers, num_parameters)
            self.state = (self.momentum,)

    def step(self, workers: Sequence[int], parameters: Tensor, gradients: Tensor, state: Sequence[Tensor]) -> None:
        """Take one step with each of the rows."""
        if not state:
            parameters.sub_(gradients, alpha=self._settings.rate)
            return
        (momentum,) = state
        momentum.mul_(self._settings.momentum).add_(gradients, alpha=self._settings.rate)
        parameters.sub_(momentum)

    def restart(self, worker: int) -> None:
        """Zero a worker's momentum, if there is any."""
        for momentum in self.state:
            momentum[worker].zero_()


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """Settings of AdamW; the defaults are the demo's."""

    rate: float
    """Peak learning rate."""
    total_steps: int | Sequence[int]
    """Steps that each worker is planned to take (one number, or one for each): the schedule's length."""
    weight_decay: float = 0.1
    """Decoupled, of all parameters."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the two moments."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    gradient_norm: float = 1.0
    """A worker's gradient that is longer is cut to it."""

    def build(self, num_workers: int, num_parameters: int) -> AdamWRows:
        """Make the optimizers of all workers."""
        return AdamWRows(self, num_workers, num_parameters)


@dataclass(frozen=True, kw_only=True)
class SGD:
    """Settings of SGD; with rate 1 and without momentum, one step's outer gradient is the stochastic gradient."""

    rate: float = 1.0
    """Learning rate."""
    momentum: float = 0.0
    """Momentum coefficient; 0 keeps no momentum at all."""

    def build(self, num_workers: int, num_parameters: int) -> SGDRows:
        """Make the optimizers of all workers."""
        return SGDRows(self, num_workers, num_parameters)
