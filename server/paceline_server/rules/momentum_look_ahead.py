"""Momentum look-ahead (rule "mla"): Nesterov with a damped momentum, moved by every push.

    m = beta m + (1 - beta) g ;  w -= eta (beta m + g)          eta = lr * share

Source: the baseline that HeLoCo builds on, Al Asif et al. <arXiv 2606.00271>.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from paceline_server.rules.base import Contribution, Numbers, OuterRule


@dataclass(frozen=True, kw_only=True)
class MomentumLookAhead(OuterRule):
    """State: the momentum m, in units of outer gradients."""

    state: ClassVar[tuple[str, ...]] = ("m",)
    momentum_vector: ClassVar[str | None] = "m"

    def apply(self, numbers: Numbers, g: torch.Tensor, push: Contribution) -> None:
        """M = beta m + (1 - beta) g, w -= eta (beta m + g)."""
        beta, m = self.rates.momentum(push.bin), numbers.state["m"]
        m.mul_(beta).add_(g * (1 - beta))
        numbers.w.sub_(g.add_(m * beta).mul_(self.rates.lr(push.bin) * push.share))
