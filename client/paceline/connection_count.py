"""How many connections to a shard pay: found by trying, and tried again now and then. Pure: time is an argument.

One TCP connection carries at most what its buffers hold in a round trip, and less where packets are lost. More of them
carry more, until the link is full; from there on they only cost.
"""

from dataclasses import dataclass

MAX_CONNECTIONS = 8
"""What a shard accepts."""

SHORTEST_ROUND_TRIP_S = 0.005
"""Below, one connection's buffers hold more than any link carries in a round trip."""

GAIN, LOSS = 1.10, 0.95
"""What twice as many connections must carry more to be kept; what half as many must still carry to do."""

SAMPLE_S, SAMPLE_ROUND_TRIPS, LONGEST_SAMPLE_S = 1.0, 20, 4.0
"""A measurement takes so long, in which bytes move, and then until its last round is whole: rates swing while windows
grow, as at the beginning of each round. But a small call may have waited behind a long queue, and tell a round trip of
seconds."""

TRIAL_SAMPLES = 2
"""Measurements before a trial ends in favour of fewer connections: one may have met a busy moment."""

MOST_GROWING = 5
"""Measurements after a change that may be passed over while each shows more than the one before: the windows of TCP and
of gRPC grow over several rounds."""

RETRY_S, LONGEST_RETRY_S = 120.0, 3600.0
"""Seconds after which others are tried again: links change, but rarely. Doubled while nothing better is found."""


class Meter:
    """Bytes of payloads, and the time in which any were under way in either direction."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self._active_s = 0.0
        self._since_s = 0.0
        self._under_way: set[tuple[int, str]] = set()

    def moved(self, now: float, stream: int, direction: str, num_bytes: int, *, more_follows: bool) -> None:
        """Note bytes that have arrived on a stream, here or there, and whether others are under way behind them."""
        self.num_bytes += num_bytes
        self.under_way(now, stream, direction, is_so=more_follows)

    def under_way(self, now: float, stream: int, direction: str, *, is_so: bool) -> None:
        """Note whether bytes are under way on a stream."""
        was_active = bool(self._under_way)
        if is_so:
            self._under_way.add((stream, direction))
        else:
            self._under_way.discard((stream, direction))
        if self._under_way and not was_active:
            self._since_s = now
        elif was_active and not self._under_way:
            self._active_s += now - self._since_s

    def end_stream(self, now: float, stream: int) -> None:
        """Note that a stream has ended, and what was under way on it is lost."""
        for direction in ("up", "down"):
            self.under_way(now, stream, direction, is_so=False)

    def active_s(self, now: float) -> float:
        """Seconds in which bytes were under way."""
        return self._active_s + (now - self._since_s if self._under_way else 0.0)


@dataclass(frozen=True)
class _Sample:
    num_bytes: int
    active_s: float


class ConnectionCount:
    """Decides how many connections to a shard there are to be.

    Begins with one. Where the round trip is long, twice as many are tried as long as they carry more; when that ends,
    the last that paid stay. Later half as many are tried, and if they do not do, twice as many again.

    Attributes:
        count: How many there are to be now.
        round_trip_s: The shortest round trip that was seen; None: none yet.

    Args:
        fixed: So many, whatever they carry; None: as found.
        most: More than so many never: a fragment is sent on one.
    """

    def __init__(self, fixed: int | None, most: int) -> None:
        self._most = max(1, min(most, MAX_CONNECTIONS))
        self._is_fixed = fixed is not None
        self.count = min(fixed or 1, self._most)
        self._settled = self.count
        self._settled_rate: float | None = None
        self._trials: list[int] = [2 * self.count]
        self._tried: list[float] = []
        self._retry_s = RETRY_S
        self._retry_at_s: float | None = None
        self.round_trip_s: float | None = None
        self._began: _Sample | None = None
        self._growing: list[float] = []
        self._is_warm = False

    def round_trip(self, took_s: float) -> None:
        """Note how long a small call took; the shortest counts, others waited behind pushes."""
        self.round_trip_s = took_s if self.round_trip_s is None else min(took_s, self.round_trip_s)

    def observe(self, now: float, num_bytes: int, active_s: float, *, in_effect: bool, round_ended: bool) -> int:
        """Look at the totals of a `Meter`, and decide.

        A measurement begins and ends with whole rounds. One that began in the midst of a round, where windows are
        large, would show more than any later one, and the search would end too early.

        Args:
            now: The time.
            num_bytes: Bytes moved so far.
            active_s: Seconds in which any were under way.
            in_effect: Whether all that is under way was sent with as many connections as `count` says. Answers come
                over the connection of their push, so after a change those of a whole round may say nothing of it.
            round_ended: Whether the answer that came just now was the last of a round (`WholeRounds`).

        Returns:
            `count`.
        """
        if not in_effect:
            self._began, self._growing, self._is_warm = None, [], False
            return self.count
        if self._is_fixed or not round_ended:
            return self.count
        if self._began is None:
            self._began = _Sample(num_bytes, active_s)
            return self.count
        if self.round_trip_s is None or self.round_trip_s < SHORTEST_ROUND_TRIP_S:
            return self.count
        took_s = active_s - self._began.active_s
        if took_s < min(max(SAMPLE_S, SAMPLE_ROUND_TRIPS * self.round_trip_s), LONGEST_SAMPLE_S):
            return self.count
        rate = (num_bytes - self._began.num_bytes) / took_s
        self._began = _Sample(num_bytes, active_s)
        self._is_warm = self._is_warm or self._has_grown(rate)
        if self._is_warm:
            self._decide(now, rate)
        return self.count

    def _has_grown(self, rate: float) -> bool:
        """Whether the measurements since a change show no more growth; the first may have bytes of the time before."""
        self._growing.append(rate)
        return len(self._growing) > MOST_GROWING or (len(self._growing) > 1 and rate < GAIN * self._growing[-2])

    def _decide(self, now: float, rate: float) -> None:
        if self.count == self._settled:
            self._measured(now, rate)
            return
        self._tried.append(rate)
        tried, before, is_more = self.count, self._settled_rate or 0.0, self.count > self._settled
        # One good measurement is enough for more of them, and all must be good for fewer.
        pays = max(self._tried) >= before * GAIN if is_more else min(self._tried) >= before * LOSS
        if len(self._tried) < TRIAL_SAMPLES and pays is not is_more:
            return
        if pays:
            further = tried * 2 if is_more else tried // 2
            self._settled, self._settled_rate, self._trials = tried, sum(self._tried) / len(self._tried), [further]
            self._retry_s = RETRY_S
        self._next_trial(now)

    def _measured(self, now: float, rate: float) -> None:
        self._settled_rate = rate if self._settled_rate is None else (self._settled_rate + rate) / 2
        if self._retry_at_s is not None and now >= self._retry_at_s:
            self._trials = [self._settled // 2, self._settled * 2]
            self._retry_at_s = None
            self._retry_s = min(2 * self._retry_s, LONGEST_RETRY_S)
        if self._retry_at_s is None:
            self._next_trial(now)

    def _next_trial(self, now: float) -> None:
        """Try the next count that is possible; if there is none, stay with what paid for a while."""
        while self._trials:
            trial = self._trials.pop(0)
            if 1 <= trial <= self._most and trial != self._settled:
                self._change(trial)
                return
        self._retry_at_s = now + self._retry_s
        self._change(self._settled)

    def _change(self, count: int) -> None:
        if count != self.count:
            self._growing, self._is_warm = [], False
        self._tried = []
        self.count = count
