"""Naive momentum (rules "momentum" and "nesterov"): the classical optimizers, fed with pushes as they arrive.

    u = beta u + eta g          Polyak: w -= u          Nesterov: w -= eta g + beta u          eta = lr * share

Momentum decays with every arrival instead of every bin, whichever parameters a gradient was taken at: implicit momentum
from asynchrony comes on top. Baselines; ordered momentum is meant to replace them.

Source: the "naive" method of Shi, Yang, Li <arXiv 2407.19234>; Nesterov as in torch.optim.SGD.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from paceline_server.rules.base import Contribution, Numbers, OuterRule


@dataclass(frozen=True, kw_only=True)
class NaiveMomentum(OuterRule):
    """State: the momentum u, learning rate inside."""

    state: ClassVar[tuple[str, ...]] = ("u",)
    momentum_vector: ClassVar[str | None] = "u"

    def apply(self, numbers: Numbers, g: torch.Tensor, push: Contribution) -> None:
        """U = beta u + eta g, w -= u."""
        u = numbers.state["u"]
        u.mul_(self.rates.momentum(push.bin)).add_(g.mul_(self.rates.lr(push.bin) * push.share))
        numbers.w.sub_(u)


@dataclass(frozen=True, kw_only=True)
class NaiveNesterov(OuterRule):
    """State: the momentum u, learning rate inside."""

    state: ClassVar[tuple[str, ...]] = ("u",)
    momentum_vector: ClassVar[str | None] = "u"

    def apply(self, numbers: Numbers, g: torch.Tensor, push: Contribution) -> None:
        """U = beta u + eta g, w -= eta g + beta u."""
        beta, u = self.rates.momentum(push.bin), numbers.state["u"]
        step = g.mul_(self.rates.lr(push.bin) * push.share)
        u.mul_(beta).add_(step)
        numbers.w.sub_(step.add_(u * beta))
