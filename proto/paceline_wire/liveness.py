"""How long a peer may be silent before it counts as gone, going by its own history. Pure: the caller has the clock."""

import math
from collections import deque
from statistics import median

from paceline_wire.errors import InvalidInputError

FIRST_GAPS = 5
"""Gaps that must be known before the history counts; fewer say nothing about their spread."""

REMEMBERED_GAPS = 32
"""Gaps that count: the last minutes, at a heartbeat every few seconds, so that a link that changed is believed soon."""

_MEDIANS = 3.0
"""One lost message makes a gap of two medians; that must never be enough."""

_DEVIATIONS = 8.0
"""Median absolute deviations on top. Of normally distributed gaps, one in 10 million is 5.4 deviations too long."""


class Gaps:
    """The gaps between a peer's signs of life, or the round trips to it, and what they allow the next one to be.

    `allowed_s` is 3 medians and 8 median absolute deviations of the last 32 gaps, within floor_s and longest_s. So up
    to 15 outliers, however large, change little; a link that grew slower for good is allowed more after 16 gaps.

    The gaps of one object MUST be of one kind. Pieces of an upload that come milliseconds apart say nothing about how
    long the peer may compute in between: count those as one sign of life for each heartbeat.

    Args:
        floor_s: Seconds that are always allowed.
        longest_s: Seconds that are never exceeded, and all that is known until there are 5 gaps.

    Raises:
        InvalidInputError: The seconds are not 0 <= floor_s <= longest_s, finite.
    """

    def __init__(self, *, floor_s: float, longest_s: float) -> None:
        if not (0 <= floor_s <= longest_s and math.isfinite(longest_s)):
            raise InvalidInputError(f"silence cannot be allowed for at least {floor_s} s and at most {longest_s} s")
        self._floor_s = floor_s
        self._longest_s = longest_s
        self._gaps_s: deque[float] = deque(maxlen=REMEMBERED_GAPS)

    def observe(self, gap_s: float) -> None:
        """Note a gap that has ended, in seconds.

        Raises:
            InvalidInputError: It is negative or not finite.
        """
        if not (gap_s >= 0 and math.isfinite(gap_s)):
            raise InvalidInputError(f"a gap lasted {gap_s} s; it must be finite and not negative")
        self._gaps_s.append(gap_s)

    @property
    def allowed_s(self) -> float:
        """Seconds after which a gap that has not ended counts as silence."""
        if len(self._gaps_s) < FIRST_GAPS:
            return self._longest_s
        usual_s = median(self._gaps_s)
        deviation_s = median(abs(gap_s - usual_s) for gap_s in self._gaps_s)
        return min(self._longest_s, max(self._floor_s, _MEDIANS * usual_s + _DEVIATIONS * deviation_s))
