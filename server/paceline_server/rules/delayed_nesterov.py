"""Delayed Nesterov (rule "delayed-nesterov"): momentum moves only with every N-th push; the others make plain steps.

    S += g ;  every N-th push:  m = beta m + S / N ;  w -= eta (beta m + g / N) ;  S = 0 ;  else:  w -= eta g / N

N is the quota and eta the learning rate; S below has the shares (1 / N) inside.

Source: Liu et al., Asynchronous Local-SGD Training for Language Modeling <arXiv 2401.09135>, Algorithm 3.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from paceline_server.rules.base import Contribution, Numbers, OuterRule


@dataclass(frozen=True, kw_only=True)
class DelayedNesterov(OuterRule):
    """State: the momentum m, and the sum of the pushes since it moved."""

    state: ClassVar[tuple[str, ...]] = ("m", "sum")
    momentum_vector: ClassVar[str | None] = "m"

    def apply(self, numbers: Numbers, g: torch.Tensor, push: Contribution) -> None:
        """A plain step, and the momentum's if the push completes a turn."""
        lr, beta = self.rates.lr(push.bin), self.rates.momentum(push.bin)
        m, total = numbers.state["m"], numbers.state["sum"]
        total.add_(g.mul_(push.share))
        numbers.w.sub_(g.mul_(lr))
        if push.completes_turn:
            m.mul_(beta).add_(total)
            numbers.w.sub_(m * (lr * beta))
            total.zero_()
