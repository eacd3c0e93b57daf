"""Ordered momentum (rule "ormo", the default): every push enters the momentum in the bin that it belongs to.

Closed form at every moment, with c the open bin and b the bin of gradient g, which entered at learning rate eta:

    u = sum eta beta^(c-b) g          w = w_0 - sum eta (1 - beta^(c-b+1)) / (1 - beta) g

so the final state does not depend on the order in which gradients arrive. The learning rate is inside u.

Source: Shi, Yang, Li, Ordered Momentum for Asynchronous SGD <arXiv 2407.19234>, Algorithm 1, in the exact form of
docs/algorithms.md. Its delay-adaptive form (rule "ormo-da") is this rule with smaller shares for late pushes, which the
ledger decides (Schedule.late_bins).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from paceline_server.rules.base import Contribution, Numbers, OuterRule
from paceline_server.rules.rates import Rates


@dataclass(frozen=True, kw_only=True)
class OrderedMomentum(OuterRule):
    """State: the momentum u."""

    state: ClassVar[tuple[str, ...]] = ("u",)
    momentum_vector: ClassVar[str | None] = "u"

    def open_bin(self, numbers: Numbers, bin: int) -> None:  # noqa: A002
        """W -= beta u, u *= beta."""
        u = numbers.state["u"]
        torch.mul(u, self.rates.momentum(bin), out=u)
        numbers.w.sub_(u)

    def apply(self, numbers: Numbers, g: torch.Tensor, push: Contribution) -> None:
        """U += eta beta^d g and w -= eta (1 - beta^(d+1)) / (1 - beta) g, with eta = lr * share."""
        u_rate, w_rate = self.entering(push)
        numbers.state["u"].add_(g * u_rate)
        numbers.w.sub_(g.mul_(w_rate))

    def entering(self, push: Contribution) -> tuple[float, float]:
        """What a push is multiplied by to enter the momentum and to move the parameters, in this order."""
        eta = self.rates.lr(push.bin) * push.share
        decay, displacement = self.rates.carried(push.bin, push.bins_late)
        return eta * decay, eta * displacement


PLAIN_AVERAGE = OrderedMomentum(rates=Rates(peak_lr=1.0, full_momentum=0.0))
"""The rule for averaged buffers: a full bin moves the buffer to the mean of the workers' buffers."""
