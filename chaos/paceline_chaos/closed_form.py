"""The closed form of ordered momentum, summed in float64 beside the run: where a fragment must be after its pushes.

With c the open bin and b the bin of gradient g, which entered at learning rate eta:

    u = sum eta beta^(c-b) g          w = w_0 - sum eta (1 - beta^(c-b+1)) / (1 - beta) g

The second sum is (a - beta u) / (1 - beta) with a = sum eta g, so two sums are enough, whatever the number of pushes.
"""

from dataclasses import dataclass

import torch

TOLERANCE = 2e-5
"""What float32's rounding may come to, relative to the largest number (at least 1)."""


@dataclass(frozen=True, kw_only=True)
class Coefficients:
    """What the rule is given.

    Attributes:
        lr: Learning rate of a full bin's mean.
        momentum: Momentum coefficient.
        quota: Pushes that share the learning rate.
    """

    lr: float
    momentum: float
    quota: int

    @property
    def of_averaged(self) -> "Coefficients":
        """Those of buffers, which are averaged."""
        return Coefficients(lr=1.0, momentum=0.0, quota=self.quota)


class ClosedForm:
    """One fragment's closed form.

    Args:
        initial: The first parameters (float32 or float64 [n]).
        coefficients: The rule's.
    """

    def __init__(self, initial: torch.Tensor, coefficients: Coefficients) -> None:
        self.open_bin = 0
        self._initial = initial.double()
        self._coefficients = coefficients
        self._plain = torch.zeros_like(self._initial)
        self._decayed = torch.zeros_like(self._initial)

    def open_bins(self, count: int) -> None:
        """Let bins begin."""
        if count:
            self.open_bin += count
            self._decayed *= self._coefficients.momentum**count

    def push(self, gradient: torch.Tensor, bin: int) -> None:  # noqa: A002
        """Let a gradient (float32 [n]) of a bin enter."""
        eta = self._coefficients.lr / self._coefficients.quota
        scaled = gradient.double().mul_(eta)
        self._plain += scaled
        self._decayed += scaled.mul_(self._coefficients.momentum ** (self.open_bin - bin))

    def weight_in_w(self, bin: int) -> float:  # noqa: A002
        """What one element of a gradient of a bin has moved w by, downwards, by now."""
        beta = self._coefficients.momentum
        late = self.open_bin - bin
        return self._coefficients.lr / self._coefficients.quota * (1 - beta ** (late + 1)) / (1 - beta)

    @property
    def u(self) -> torch.Tensor:
        """The momentum (float64 [n])."""
        return self._decayed

    @property
    def w(self) -> torch.Tensor:
        """The parameters (float64 [n])."""
        beta = self._coefficients.momentum
        return self._initial - (self._plain - beta * self._decayed) / (1 - beta)


def distance(expected: torch.Tensor, actual: torch.Tensor) -> float:
    """The largest difference, relative to the largest expected number (at least 1)."""
    if not expected.numel():
        return 0.0
    difference = float((expected - actual.double()).abs().max())
    return difference / max(1.0, float(expected.abs().max()))
