"""The outer learning rate and momentum coefficient of each bin: constant, or changing as the configuration says.

They belong to bins, not to moments: a late push enters at the rate of its own bin, so that the order in which pushes
arrive does not matter under a schedule either.
"""

import math
from dataclasses import dataclass
from enum import Enum


class Decay(Enum):
    """How the learning rate falls after the warm-up."""

    CONSTANT = "constant"
    LINEAR = "linear"
    COSINE = "cosine"
    STEP = "step"


STEP_FALLS = (0.6, 0.85)
"""Parts of the bins after which Decay.STEP divides the rate by ten."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Coefficients by bin.

    Attributes:
        peak_lr: Learning rate of the mean outer gradient of a full bin, after the warm-up.
        full_momentum: Momentum coefficient after its warm-up, in [0, 1).
        decay: How the rate falls from its peak.
        warmup_bins: Bins over which the rate rises linearly to its peak.
        momentum_warmup_bins: Bins over which the coefficient rises linearly from 0.
        total_bins: The bin in which the fall ends; needed unless the rate is constant.
        final_share: What is left of the peak then (linear, cosine).
    """

    peak_lr: float
    full_momentum: float
    decay: Decay = Decay.CONSTANT
    warmup_bins: int = 0
    momentum_warmup_bins: int = 0
    total_bins: int = 1
    final_share: float = 0.0

    def lr(self, bin: int) -> float:  # noqa: A002
        """Learning rate of a bin's mean outer gradient."""
        if bin < self.warmup_bins:
            return self.peak_lr * (bin + 1) / (self.warmup_bins + 1)
        if self.decay is Decay.CONSTANT:
            return self.peak_lr
        part = min(1.0, (bin - self.warmup_bins) / max(1, self.total_bins - self.warmup_bins))
        return self.peak_lr * self._left(part)

    def momentum(self, bin: int) -> float:  # noqa: A002
        """Momentum coefficient with which a bin opens."""
        if bin < self.momentum_warmup_bins:
            return self.full_momentum * bin / self.momentum_warmup_bins
        return self.full_momentum

    def carried(self, bin: int, bins_late: int) -> tuple[float, float]:  # noqa: A002
        """What bins that have opened since made of a gradient of a bin: (its part in u, its part in w).

        With beta_j the coefficient of bin j and d = bins_late, the product of beta_(b+1) ... beta_(b+d), and the sum of
        all such products for 0 ... d; with a constant beta, beta^d and (1 - beta^(d+1)) / (1 - beta).
        """
        if bin + 1 >= self.momentum_warmup_bins:
            decay = self.full_momentum**bins_late
            return decay, (1 - decay * self.full_momentum) / (1 - self.full_momentum)
        product, total = 1.0, 1.0
        warm = min(bins_late, self.momentum_warmup_bins - bin)
        for opened in range(bin + 1, bin + 1 + warm):
            product *= self.momentum(opened)
            total += product
        decay, displacement = self.carried(bin + warm, bins_late - warm) if bins_late > warm else (1.0, 1.0)
        return product * decay, total + product * (displacement - 1)

    def _left(self, part: float) -> float:
        """What is left of the peak when this part of the fall has passed."""
        if self.decay is Decay.STEP:
            return float(0.1 ** sum(part >= fall for fall in STEP_FALLS))
        fallen = part if self.decay is Decay.LINEAR else (1 - math.cos(math.pi * part)) / 2
        return 1 - (1 - self.final_share) * fallen
