"""Asynchronous SGD (rule "sgd"): every push moves the parameters by itself, at once; there is no momentum.

    w -= eta g          eta = lr * share

The same as ordered momentum with beta = 0, without the vector that it keeps.
"""

from dataclasses import dataclass

import torch

from paceline_server.rules.base import Contribution, Numbers, OuterRule


@dataclass(frozen=True, kw_only=True)
class AsynchronousSGD(OuterRule):
    """No state."""

    def apply(self, numbers: Numbers, g: torch.Tensor, push: Contribution) -> None:
        """W -= eta g."""
        numbers.w.sub_(g.mul_(self.rates.lr(push.bin) * push.share))
