"""What one identity may take of a shard: when it waits and for how long, and when it is refused. In virtual time."""

import asyncio

import pytest

from paceline_server.config_limits import LimitsConfig
from paceline_server.security.limits import BURST_S, MAX_PROCESSING, MAX_WAITING_CALLS, Allowance, Allowances
from paceline_wire.errors import LimitExceededError
from support_virtual_time import play, seconds

MBIT = 8.0
"""A million bytes a second."""

BURST = round(BURST_S * 1e6)


def allowance(name: str = "a", **limits: float) -> Allowance:
    """What an identity has under these limits."""
    return Allowance(name, LimitsConfig.model_validate(limits))


@pytest.mark.parametrize("way", ["received", "sent"])
def test_bytes_wait_until_they_are_paid_for(way: str) -> None:
    """A burst passes at once, then the rate counts, for all streams together; a message above it passes whole."""

    async def scenario() -> None:
        held = allowance(mbit=MBIT)
        take, other = getattr(held, way), held.sent if way == "received" else held.received
        assert await seconds(take(BURST)) == 0
        assert await seconds(take(500_000)) == pytest.approx(0.5)
        assert await seconds(asyncio.wait({asyncio.create_task(take(300_000)) for _ in range(3)})) == pytest.approx(0.9)
        assert await seconds(other(BURST)) == 0
        # However long the pause, what may come at once does not grow.
        await asyncio.sleep(3600)
        assert await seconds(take(BURST + 40_000_000)) == pytest.approx(40)

    play(scenario)


def test_without_a_rate_nothing_waits() -> None:
    """0 is no limit, and not a limit of none."""

    async def scenario() -> None:
        held = allowance(mbit=0)
        assert await seconds(held.received(10**15)) == await seconds(held.sent(10**15)) == 0

    play(scenario)


def test_calls_wait_for_their_turn_and_beyond_64_are_refused() -> None:
    """A worker's start passes at once, later calls one by one, and whoever hangs up gives its place back."""

    async def scenario() -> None:
        held = allowance(calls_per_s=10)
        assert [await held.call() for _ in range(20)] == [False] * 20
        assert await seconds(held.call()) == pytest.approx(0.1)
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        waiting = [asyncio.create_task(held.call()) for _ in range(MAX_WAITING_CALLS)]
        await asyncio.sleep(0)
        with pytest.raises(LimitExceededError, match=r"'a' has 64 calls waiting .*calls_per_s = 10; make fewer"):
            await held.call()
        waiting.pop().cancel()
        await asyncio.sleep(0)
        waiting.append(asyncio.create_task(held.call()))
        assert await asyncio.gather(*waiting) == [True] * MAX_WAITING_CALLS
        # The call that hung up has had its turn, too.
        assert loop.time() - began_s == pytest.approx((MAX_WAITING_CALLS + 1) / 10)
        await asyncio.sleep(3600)
        assert [await held.call() for _ in range(21)] == [False] * 20 + [True]

    play(scenario)


def test_as_many_streams_as_allowed() -> None:
    """One more is refused with a sentence; one that ends, however it ends, makes room for another."""
    held = allowance(streams=2)
    with held.stream():
        with pytest.raises(ZeroDivisionError), held.stream():
            raise ZeroDivisionError
        with held.stream():
            for _ in range(3):
                with pytest.raises(LimitExceededError, match=r"'a' has limits.streams = 2 streams open"), held.stream():
                    pass
        with held.stream():
            pass


class TestPushes:
    """Pushes of a fragment's open bin."""

    def test_one_that_is_sent_again_counts_once(self) -> None:
        """Before the limit and at it; a worker's next incarnation and another worker's push are others."""
        held = allowance(pushes_per_bin=3)
        taken = [("a", 1, 1), ("a.0", 1, 1), ("a", 2, 1)]
        for push in (*taken, *taken):
            held.push(0, 5, push, quota=1)
        for _ in range(2):
            with pytest.raises(LimitExceededError, match=r"3 pushes of fragment 0 to bin 5 .*pushes_per_bin = 3"):
                held.push(0, 5, ("a", 1, 2), quota=1)
        for push in taken:
            held.push(0, 5, push, quota=1)

    def test_the_next_bin_begins_anew(self) -> None:
        """What was refused is taken, and no more than before; so it is when a bin comes back, as after a restart."""
        held = allowance(pushes_per_bin=1)
        for open_bin in (5, 6, 5):
            held.push(0, open_bin, ("a", 1, open_bin), quota=1)
            with pytest.raises(LimitExceededError, match=f"to bin {open_bin} already"):
                held.push(0, open_bin, ("a", 1, 99), quota=1)

    def test_each_fragment_has_its_own(self) -> None:
        """A fragment's pushes do not count for another, whose bin may be another one."""
        held = allowance(pushes_per_bin=1)
        for fragment, open_bin in ((0, 5), (1, 7), (2, 5)):
            held.push(fragment, open_bin, ("a", 1, 1), quota=1)
        with pytest.raises(LimitExceededError):
            held.push(0, 5, ("a", 1, 2), quota=1)


def test_every_name_has_its_own_and_nobody_has_none() -> None:
    """One name has one allowance for all of its connections; callers without a name are not told apart, nor bounded."""
    allowances = Allowances(LimitsConfig(streams=1))
    a, b = allowances.of("a"), allowances.of("b")
    assert a is not None
    assert b is not None
    assert allowances.of("a") is a
    with a.stream(), b.stream(), pytest.raises(LimitExceededError, match="'a' has"), a.stream():
        pass
    assert allowances.of(None) is None


def test_pushes_of_one_identity_are_processed_a_few_at_once() -> None:
    """The fifth waits until one of the four is done."""

    async def scenario() -> None:
        held = allowance()
        for _ in range(MAX_PROCESSING):
            await held.processing.acquire()
        assert held.processing.locked()
        held.processing.release()
        assert not held.processing.locked()

    play(scenario)
