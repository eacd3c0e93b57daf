"""Ordered momentum: how a push changes a fragment's parameters w and momentum u, whichever bin it belongs to.

Closed form at every moment, with c the open bin and b the bin of gradient g, which entered at learning rate eta:

    u = sum eta beta^(c-b) g          w = w_0 - sum eta (1 - beta^(c-b+1)) / (1 - beta) g

so the final state does not depend on the order in which gradients arrive. The learning rate is inside u.

Source: Shi, Yang, Li, Ordered Momentum for Asynchronous SGD <arXiv 2407.19234>, Algorithm 1, in the exact form of
docs/algorithms.md.

Every operation rounds once, to float32, without fused multiply-add, so that a compiled kernel can give the same bits.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Contribution:
    """What the schedule decided about one push.

    Attributes:
        bins_late: Bins opened since the one that the push belongs to (d).
        share: The push's part of the learning rate: 1 / quota, so that a full bin makes one step of the mean.
    """

    bins_late: int
    share: float


@dataclass(frozen=True, kw_only=True)
class OrderedMomentum:
    """The rule for one role of tensors.

    Attributes:
        lr: Learning rate of the mean outer gradient of a full bin.
        momentum: Momentum coefficient beta, in [0, 1); 0 makes this asynchronous SGD.
    """

    lr: float
    momentum: float

    def open_bin(self, w: torch.Tensor, u: torch.Tensor) -> None:
        """Open the next bin: w -= beta u, u *= beta, in place (float32 [n] each)."""
        torch.mul(u, self.momentum, out=u)
        w.sub_(u)

    def apply(self, w: torch.Tensor, u: torch.Tensor, g: torch.Tensor, contribution: Contribution) -> None:
        """Let a gradient enter in its own bin, in place; w, u, g are float32 [n], g is overwritten.

        u += eta beta^d g and w -= eta (1 - beta^(d+1)) / (1 - beta) g, with eta = lr * share.
        """
        eta = self.lr * contribution.share
        decay = self.momentum**contribution.bins_late
        displacement = (1 - decay * self.momentum) / (1 - self.momentum)
        u.add_(g * (eta * decay))
        w.sub_(g.mul_(eta * displacement))


PLAIN_AVERAGE = OrderedMomentum(lr=1.0, momentum=0.0)
"""The rule for averaged buffers: a full bin moves the buffer to the mean of the workers' buffers."""
