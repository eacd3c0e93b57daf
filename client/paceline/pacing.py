"""How fast a worker's pushes may leave: at most so fast, and a round spread over the next one's time. Pure."""

SPREAD = 0.5
"""Share of a round's time over which the pushes of the one before are spread: the rest is for their answers."""

BURST_S = 0.1
"""What was not used is kept for so long: a late wake-up then costs nothing."""


class Pace:
    """A token bucket for the payload bytes of a worker's pushes, to all shards together.

    A message leaves once the bucket is not in debt, and takes all that it has, so messages of any size pass.

    Args:
        most_mbit: Mbit/s at most; None: no limit.
    """

    def __init__(self, most_mbit: float | None = None) -> None:
        self._most_bytes_per_s = None if most_mbit is None else most_mbit * 1e6 / 8
        self._spread_bytes_per_s: float | None = None
        self._left_bytes = 0.0
        self._at_s: float | None = None

    @property
    def bytes_per_s(self) -> float | None:
        """The rate; None: no limit."""
        rates = [rate for rate in (self._most_bytes_per_s, self._spread_bytes_per_s) if rate is not None]
        return min(rates, default=None)

    def spread(self, round_bytes: int, round_s: float) -> None:
        """Spread the pushes of each round, round_bytes in all, over the steps of the next, which take round_s."""
        self._spread_bytes_per_s = round_bytes / (SPREAD * round_s) if round_s > 0 else None

    def take(self, now: float, num_bytes: int) -> float:
        """Seconds after which a message may leave; it has its turn, and later ones come after it."""
        rate = self.bytes_per_s
        if rate is None:
            return 0.0
        self._refill(now, rate)
        wait_s = max(0.0, -self._left_bytes / rate)
        self._left_bytes -= num_bytes
        return wait_s

    def _refill(self, now: float, rate: float) -> None:
        passed_s = 0.0 if self._at_s is None else max(0.0, now - self._at_s)
        self._at_s = now
        self._left_bytes = min(self._left_bytes + passed_s * rate, BURST_S * rate)
