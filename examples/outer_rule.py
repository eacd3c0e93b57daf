"""An outer rule of your own: momentum on signs, in the manner of Lion.

Serve a run with it, from the folder that this file is in:

    PYTHONPATH=. paceline serve --outer.rule outer_rule:SignMomentum --outer.lr 0.001 --outer.momentum 0.9
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from paceline_server.rules import Contribution, Numbers, OuterRule


@dataclass(frozen=True, kw_only=True)
class SignMomentum(OuterRule):
    """Steps of equal size in every element: w -= lr share sign(m), where m is a running mean of the pushes."""

    state: ClassVar[tuple[str, ...]] = ("m",)

    def apply(self, numbers: Numbers, g: torch.Tensor, push: Contribution) -> None:
        """M = beta m + (1 - beta) g, w -= lr share sign(m)."""
        beta, m = self.rates.momentum(push.bin), numbers.state["m"]
        m.mul_(beta).add_(g * (1 - beta))
        numbers.w.sub_(m.sign() * (self.rates.lr(push.bin) * push.share))
