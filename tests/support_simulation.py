"""Tasks for simulations that can be followed on paper."""

from collections.abc import Mapping
from typing import Any

import torch

from paceline_server.config import ServerConfig


def server_config(
    kind: str = "async", *, lr: float = 0.5, momentum: float = 0.5, inner_steps: int = 4, **sections: dict[str, Any]
) -> ServerConfig:
    """A run without loss on the wire, with the same inner steps for all unless the exchange section says otherwise."""
    exchange = {"uplink": "fp32", "downlink": "fp32", "inner_steps": inner_steps, "dynamic_inner_steps": False}
    return ServerConfig.model_validate(
        {
            "outer": {"lr": lr, "momentum": momentum, **sections.get("outer", {})},
            "schedule": {"kind": kind, **sections.get("schedule", {})},
            "exchange": {**exchange, **sections.get("exchange", {})},
        }
    )


class QuadraticTask:
    """Gradient descent on a quadratic of each worker's own: x -= rate (x - its optimum), all workers in one tensor.

    With rate 0 and a drift, each worker's steps are its drift wherever it is: then its outer gradients are known.

    Args:
        num_workers: How many.
        size: Elements of x.
        rate: What an inner step takes off the distance.
        drift: What an inner step adds besides, times a worker's own direction.
    """

    averaged = ()
    tokens_per_step = 8

    def __init__(self, num_workers: int, size: int = 5, rate: float = 0.25, drift: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(size, generator=generator).repeat(num_workers, 1)
        self.start = self.x[0].clone()
        self.optima = torch.randn(num_workers, size, generator=generator)
        self.rate, self.drift = rate, drift
        self.calls: list[dict[int, int]] = []
        self.steps_made = [0] * num_workers
        self.restarts: list[int] = []

    def tensors(self, worker: int) -> Mapping[str, torch.Tensor]:
        """One tensor."""
        return {"x": self.x[worker]}

    def momentum(self, worker: int) -> Mapping[str, torch.Tensor]:
        """There is none."""
        raise NotImplementedError

    def reset_momentum(self, worker: int) -> None:
        """There is none."""
        raise NotImplementedError

    def advance(self, steps: Mapping[int, int]) -> None:
        """Step by step, each worker by itself."""
        self.calls.append(dict(steps))
        for worker, count in steps.items():
            self.steps_made[worker] += count
            for _ in range(count):
                self.x[worker] += self.rate * (self.optima[worker] - self.x[worker]) + self.drift * self.optima[worker]

    def restart(self, worker: int) -> None:
        """Nothing is kept beside x."""
        self.restarts.append(worker)

    def evaluate(self, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, float]:
        """The mean loss of all workers."""
        return {"loss": float((tensors["x"] - self.optima).square().mean())}
