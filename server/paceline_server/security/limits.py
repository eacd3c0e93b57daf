"""What one identity may take of a shard at once, so that the others keep theirs. The time is an argument.

Calls and bytes are slowed down, not refused: a call waits for its turn, and a stream is not read or written faster.
What cannot be slowed down is refused with a sentence: too many streams, too many waiting calls, too many pushes in one
bin.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from paceline_server.config_limits import LimitsConfig
from paceline_wire.errors import LimitExceededError

MAX_WAITING_CALLS = 64
"""Calls of one identity that may wait for their turn: more are refused."""

MAX_PROCESSING = 4
"""Pushes of one identity that are processed at once, over all of its streams: others' pushes wait behind no more."""

BURST_S = 0.25
"""Seconds' worth of bytes that may pass at once after a pause."""

CALL_BURST_S = 2.0
"""Seconds' worth of calls that may come at once after a pause: a worker that starts makes a dozen."""


class Bucket:
    """A rate that may be exceeded for a moment: a token bucket that lends, so that one large message passes whole.

    Args:
        rate: How much a second; 0: any.
        burst: How much at once after a pause.
    """

    def __init__(self, rate: float, burst: float) -> None:
        self._rate = rate
        self._burst = burst
        self._left = burst
        self._seen_s = 0.0

    def take(self, now: float, amount: float) -> float:
        """Take an amount; returns the seconds after which it is paid for."""
        if not self._rate:
            return 0.0
        self._left = min(self._burst, self._left + (now - self._seen_s) * self._rate) - amount
        self._seen_s = now
        return max(0.0, -self._left / self._rate)


@dataclass(kw_only=True)
class Waits:
    """How long one call was held back so far, since its caller had taken all that it may.

    Attributes:
        received_s: Seconds before what it sends was read on.
        sent_s: Seconds before what it receives was sent.
    """

    received_s: float = 0.0
    sent_s: float = 0.0


class Allowance:
    """What one identity has open and has used. Belongs to one event loop.

    Args:
        name: Whose it is.
        limits: How much it may.

    Attributes:
        processing: Held for each of its pushes that is being processed.
    """

    def __init__(self, name: str, limits: LimitsConfig) -> None:
        self._name = name
        self._limits = limits
        bytes_per_s = limits.mbit * 125_000
        self._received, self._sent = (Bucket(bytes_per_s, BURST_S * bytes_per_s) for _ in range(2))
        self._calls = Bucket(limits.calls_per_s, CALL_BURST_S * limits.calls_per_s)
        self._num_streams = 0
        self._num_waiting = 0
        self._pushes: dict[int, tuple[int, set[tuple[str, int, int]]]] = {}
        self.processing = asyncio.Semaphore(MAX_PROCESSING)

    @property
    def mbit(self) -> float | None:
        """Mbit/s that it may send, and as many that it may receive; None: any."""
        return self._limits.mbit or None

    async def call(self) -> bool:
        """Wait for a call's turn; returns whether it had to wait.

        Raises:
            LimitExceededError: Too many wait already.
        """
        if self._num_waiting >= MAX_WAITING_CALLS:
            raise LimitExceededError(
                f"{self._name!r} has {MAX_WAITING_CALLS} calls waiting for their turn, at limits.calls_per_s = "
                f"{self._limits.calls_per_s:g}; make fewer at once"
            )
        wait_s = self._calls.take(_now(), 1)
        if not wait_s:
            return False
        self._num_waiting += 1
        try:
            await asyncio.sleep(wait_s)
        finally:
            self._num_waiting -= 1
        return True

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Count a stream while it is open.

        Raises:
            LimitExceededError: There are too many.
        """
        if self._num_streams >= self._limits.streams:
            raise LimitExceededError(
                f"{self._name!r} has limits.streams = {self._limits.streams} streams open on this shard; close some, "
                "or let the operator allow more"
            )
        self._num_streams += 1
        try:
            yield
        finally:
            self._num_streams -= 1

    async def received(self, num_bytes: int) -> float:
        """Wait until bytes that have come are paid for; returns the seconds."""
        return await _waited(self._received.take(_now(), num_bytes))

    async def sent(self, num_bytes: int) -> float:
        """Wait until bytes that are to be sent are paid for; returns the seconds."""
        return await _waited(self._sent.take(_now(), num_bytes))

    def push(self, fragment: int, open_bin: int, push: tuple[str, int, int], *, quota: int) -> None:
        """Count a push to a fragment whose bin is open; one that is sent again counts once.

        Args:
            fragment: The fragment.
            open_bin: Its open bin.
            push: The worker, its incarnation and the push's seq.
            quota: Pushes that make a bin full: so many are taken at the least, or one that trains alone could stop.

        Raises:
            LimitExceededError: There were too many in this bin.
        """
        counted_bin, pushes = self._pushes.get(fragment, (open_bin, set()))
        if counted_bin != open_bin:
            pushes = set()
        pushes.add(push)
        self._pushes[fragment] = (open_bin, pushes)
        most = max(self._limits.pushes_per_bin, quota)
        if len(pushes) > most:
            pushes.discard(push)
            raise LimitExceededError(
                f"{self._name!r} has sent {most} pushes of fragment {fragment} to bin {open_bin} already, as many as "
                f"limits.pushes_per_bin = {self._limits.pushes_per_bin} and the bin's quota of {quota} allow; the next "
                "one is taken when that bin has closed"
            )


class Allowances:
    """The allowances of all identities; their number is that of the names that the authority has given out.

    Args:
        limits: How much each may.
    """

    def __init__(self, limits: LimitsConfig) -> None:
        self._limits = limits
        self._by_name: dict[str, Allowance] = {}

    def of(self, name: str | None) -> Allowance | None:
        """What is left to an identity; None for callers without a name, who cannot be told from each other."""
        if name is None:
            return None
        if name not in self._by_name:
            self._by_name[name] = Allowance(name, self._limits)
        return self._by_name[name]


async def _waited(wait_s: float) -> float:
    if wait_s:
        await asyncio.sleep(wait_s)
    return wait_s


def _now() -> float:
    return asyncio.get_running_loop().time()
