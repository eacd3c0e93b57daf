"""Guards a fragment against pushes out of all proportion to the recent ones. Pure.

A push is judged by its L2 norm alone, against the norms of the fragment's latest pushes, accepted and refused alike: a
change of scale that most workers share becomes the new measure by itself, and one worker's bad hour does not.
"""

import math
import statistics
from dataclasses import dataclass

import torch

from paceline_wire.codecs import squares
from paceline_wire.codecs.base import Codec

REMEMBERED_NORMS = 64
"""Norms of a fragment that are remembered: some rounds of a run of ordinary size."""

ENOUGH_NORMS = 8
"""Norms that must be known before any push is called an outlier."""

_JUDGED_BY_NORM = frozenset({"fp32", "bf16"})
# Their numbers stand by themselves: any bytes can be decoded, and the norm tells whether all are finite.

SPREAD = 8.0
"""Median absolute deviations of the norms' logarithms that are always allowed: five standard deviations, if normal."""


@dataclass(frozen=True, kw_only=True)
class Guard:
    """What counts as an outlier.

    Attributes:
        outlier_factor: How many times the median of the recent norms a push's norm may be, however alike these are.
    """

    outlier_factor: float

    def problem(self, fragment: int, norm: float, recent: tuple[float, ...]) -> str | None:
        """Why a push of a norm cannot be applied, in a sentence; None if it can.

        Args:
            fragment: The fragment's index.
            norm: The push's L2 norm, finite.
            recent: The fragment's recent norms, as `remember` keeps them.
        """
        if len(recent) < ENOUGH_NORMS or norm <= 0:
            return None
        median = statistics.median(recent)
        middle = math.log(median)
        spread = statistics.median(abs(math.log(known) - middle) for known in recent)
        # Compared as logarithms: the factor itself may be more than a float holds.
        allowed = max(math.log(self.outlier_factor), SPREAD * spread)
        if math.log(norm) - middle <= allowed:
            return None
        limit = f"{math.exp(allowed):.3g} times that" if allowed < math.log(1e300) else "any multiple of that"
        return (
            f"the outer gradient of fragment {fragment} cannot be applied: its norm {norm:.4g} is out of all "
            f"proportion to the median of the last {len(recent)} pushes to the fragment, {median:.4g}, and up to "
            f"{limit} is allowed; go on from the parameters in this answer, and look at the learning rate and the data "
            "if it happens again"
        )


def remember(recent: tuple[float, ...], norm: float | None) -> tuple[float, ...]:
    """The recent norms after a push; None: it was not finite. A push of zeros tells nothing of the scale."""
    if norm is None or norm <= 0:
        return recent
    return (*recent, norm)[-REMEMBERED_NORMS:]


def median_of(recent: tuple[float, ...]) -> float | None:
    """The median of a fragment's recent norms; None if there are none."""
    return statistics.median(recent) if recent else None


def checked_norm(codec: Codec, payload: torch.Tensor, num_elements: int) -> float:
    """The L2 norm of a push (uint8 [m]), finite, to the bit that `paceline_wire.codecs.squares` says.

    Raises:
        CodecError: The payload is not the finite encoding of num_elements elements.
    """
    if codec.name not in _JUDGED_BY_NORM:
        codec.check(payload, num_elements)
        return squares.norm(codec, payload, num_elements)
    norm = squares.norm(codec, payload, num_elements)
    if not math.isfinite(norm):
        codec.check(payload, num_elements)
    return norm
