"""OrLoMo (rule "orlomo"): orders local momentum, for workers whose inner optimizer is SGD with momentum.

Worker, from p = q = 0 in each round: p = beta p + inner_lr g ; q += p in each of its H steps; it pushes q and p.
    open a bin:    w -= beta (1 - beta^H) / (1 - beta) u ;  u *= beta^H
    a push:        u += eta beta^(H d) p ;  w -= eta (q + beta (1 - beta^(H d)) / (1 - beta) p)

with eta = lr * share.
With lr = 1 a full bin, in any order, is the average of the workers' parameters and momentum. H = 1 is ordered momentum.

Source: ordered local momentum <arXiv 2601.12322>; this form is derived in docs/algorithms.md.
"""

from dataclasses import dataclass
from typing import ClassVar, Self

import torch

from paceline_server.rules.base import Contribution, Numbers, OuterRule, RuleSettings


@dataclass(frozen=True, kw_only=True)
class OrderedLocalMomentum(OuterRule):
    """State: the momentum u.

    Attributes:
        inner_steps: Inner steps in every worker's round (H).
    """

    state: ClassVar[tuple[str, ...]] = ("u",)
    momentum_vector: ClassVar[str | None] = "u"
    local_momentum: ClassVar[bool] = True

    inner_steps: int

    @classmethod
    def of(cls, settings: RuleSettings) -> Self:
        """The rule as configured."""
        return cls(rates=settings.rates, inner_steps=settings.inner_steps)

    def open_bin(self, numbers: Numbers, bin: int) -> None:  # noqa: A002
        """W -= beta (1 - beta^H) / (1 - beta) u, u *= beta^H."""
        u = numbers.state["u"]
        decay, ahead = self._over(self.inner_steps)
        numbers.w.sub_(u * ahead)
        u.mul_(decay)

    def apply(self, numbers: Numbers, g: torch.Tensor, push: Contribution) -> None:
        """G is float32 [2, n]: the outer gradient q and the local momentum p."""
        q, p = g
        eta = self.rates.lr(push.bin) * push.share
        decay, ahead = self._over(self.inner_steps * push.bins_late)
        numbers.state["u"].add_(p * (eta * decay))
        numbers.w.sub_(q.add_(p * ahead).mul_(eta))

    def _over(self, steps: int) -> tuple[float, float]:
        """What that many inner steps leave of a momentum, and how far it carries the parameters meanwhile."""
        beta = self.rates.full_momentum
        decay = beta**steps
        return decay, beta * (1 - decay) / (1 - beta)
