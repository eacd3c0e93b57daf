"""Independent references: the outer rules as algorithms.md writes them, in float64, without any product code."""

import math
from collections.abc import Mapping

import torch

Tensors = Mapping[str, torch.Tensor]


def flat(tensors: Tensors) -> torch.Tensor:
    """All values in order of name, float64 [n]."""
    return torch.cat([tensors[name].detach().double().reshape(-1) for name in sorted(tensors)])


def unflat(values: torch.Tensor, like: Tensors) -> dict[str, torch.Tensor]:
    """Float32 tensors of the names and shapes of like, from values (float64 [n])."""
    parts = {}
    for name in sorted(like):
        size = like[name].numel()
        parts[name], values = values[:size].float().reshape(like[name].shape), values[size:]
    return parts


class OrderedMomentumLoop:
    """Section 1's loop, line by line: one `arrive` is one pass through its body."""

    def __init__(self, w: torch.Tensor, *, num_workers: int, lr: float, beta: float) -> None:
        self.w = w.double().clone()
        self.u = torch.zeros_like(self.w)
        self.num_workers = num_workers
        self.eta = lr / num_workers
        self.beta = beta
        self.t = 0
        self.c = 0

    def arrive(self, g: torch.Tensor, label: int) -> int:
        """Let the gradient computed at the parameters of a label arrive; returns the reply's label."""
        beta, eta = self.beta, self.eta
        if math.ceil(self.t / self.num_workers) > self.c:
            self.w = self.w - beta * self.u
            self.u = beta * self.u
            self.c += 1
        late = self.c - math.ceil(label / self.num_workers)
        assert late >= 0
        self.u = self.u + eta * beta**late * g
        self.w = self.w - eta * (1 - beta ** (late + 1)) / (1 - beta) * g
        self.t += 1
        return self.t


def closed_form(
    w: torch.Tensor, gradients: list[tuple[int, torch.Tensor]], *, open_bin: int, eta: float, beta: float
) -> torch.Tensor:
    """Section 1's closed form of the parameters, from (bin, gradient) pairs in whatever order they came."""
    for b, g in gradients:
        w = w - eta * (1 - beta ** (open_bin - b + 1)) / (1 - beta) * g
    return w


class MomentumSGD:
    """Polyak's and Nesterov's momentum as textbooks (and torch.optim.SGD) write them."""

    def __init__(self, w: torch.Tensor, *, lr: float, beta: float, nesterov: bool) -> None:
        self.w = w.double().clone()
        self.v = torch.zeros_like(self.w)
        self.lr, self.beta, self.nesterov = lr, beta, nesterov

    def step(self, g: torch.Tensor) -> torch.Tensor:
        """One step along the gradient g; returns the parameters after it."""
        self.v = self.beta * self.v + g
        self.w = self.w - self.lr * (g + self.beta * self.v if self.nesterov else self.v)
        return self.w


class Quadratic:
    """A loss of one worker, 0.5 sum a (x - m)^2, whose gradient is exact: a worker's data in one line."""

    def __init__(self, num_elements: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.curvature = torch.rand(num_elements, generator=generator, dtype=torch.float64) * 0.5 + 0.1
        self.minimum = torch.randn(num_elements, generator=generator, dtype=torch.float64)

    def gradient(self, x: torch.Tensor) -> torch.Tensor:
        """The gradient at x, float64 [n]."""
        return self.curvature * (x.double() - self.minimum)
