"""SMEGA2 (rule "smega2"): momentum from batches of K pushes, and workers sent where the batch will have led.

    s = (s + 1) mod K ;  G += g ;  w -= eta (g + beta m) ;  at s = 0:  m = beta m + G / K ,  G = 0
    sent:  w - eta beta ((s / K) G + (K + s (beta - 1)) m)

with eta = lr / K. A baseline of the ordered-momentum paper.

Source: Cohen, Hakimi, Schuster, SMEGA2: Distributed Asynchronous Deep Neural Network Training With a Single Momentum
Buffer, ICPP 2022, in the form of docs/algorithms.md.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from paceline_server.rules.base import Contribution, Numbers, OuterRule


@dataclass(frozen=True, kw_only=True)
class Smega2(OuterRule):
    """State: the momentum m, and the sum G of the turn's pushes, each weighted with its share times K."""

    state: ClassVar[tuple[str, ...]] = ("m", "sum")
    momentum_vector: ClassVar[str | None] = "m"

    def apply(self, numbers: Numbers, g: torch.Tensor, push: Contribution) -> None:
        """W -= eta (g + beta m), and the momentum takes the sum if the push completes a turn."""
        eta, beta = self.rates.lr(push.bin) / push.quota, self.rates.momentum(push.bin)
        m, total = numbers.state["m"], numbers.state["sum"]
        total.add_(g.mul_(push.share * push.quota))
        numbers.w.sub_(g.add_(m * beta).mul_(eta))
        if push.completes_turn:
            m.mul_(beta).add_(total.mul_(1 / push.quota))
            total.zero_()

    def published(self, numbers: Numbers, newest: Contribution | None) -> torch.Tensor:
        """The parameters as the turn's momentum is expected to leave them."""
        if newest is None:
            return numbers.w
        eta, beta = self.rates.lr(newest.bin) / newest.quota, self.rates.momentum(newest.bin)
        turn = 0 if newest.completes_turn else newest.place + 1
        ahead = numbers.state["m"] * (newest.quota + turn * (beta - 1))
        ahead.add_(numbers.state["sum"] * (turn / newest.quota))
        return numbers.w - ahead.mul_(eta * beta)
