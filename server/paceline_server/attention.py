"""When a shard may judge workers by their silence: not before it has read what they sent. Pure: time is an argument.

A process that gets no processor for a while finds every worker silent once it goes on, though their heartbeats wait in
its sockets. It notices by its own looks at the time, which then come late; and one such pause seldom comes alone.
"""

OVERSLEPT_S = 0.1
"""Lateness from which on the process counts as having been stopped, or too busy to read what workers sent."""

MOST_LATE_LOOKS = 4
"""Late looks in a row that put the judgement off: a machine that is always busy must not keep a worker that is gone."""


class Attention:
    """Tells after each look whether the shard has kept up with what came.

    Args:
        reading_s: Seconds without a late look in which everything that waits is read: workers are heard meanwhile.
    """

    def __init__(self, reading_s: float) -> None:
        self._reading_s = reading_s
        self._late_looks = 0
        self._judges_at_s: float | None = None

    @property
    def judges_at_s(self) -> float | None:
        """When workers may be judged again, unless the look then is late; None: now."""
        return self._judges_at_s

    def look(self, now: float, due_s: float) -> bool:
        """Note a look that was due at due_s; returns whether workers may be judged now."""
        if now > due_s + OVERSLEPT_S and self._late_looks < MOST_LATE_LOOKS:
            self._late_looks += 1
            self._judges_at_s = now + self._reading_s
        if self._judges_at_s is not None and now < self._judges_at_s:
            return False
        self._late_looks, self._judges_at_s = 0, None
        return True
