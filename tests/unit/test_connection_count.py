"""How many connections are kept, over simulated links: as many as pay, and no more."""

from collections.abc import Callable

import pytest

from paceline.connection_count import RETRY_S, ConnectionCount, Meter


def play(counts: ConnectionCount, rate: Callable[[int], float], seconds: int, *, began_s: float = 0.0) -> list[int]:
    """Move bytes at the rate that so many connections have together, second by second; the counts."""
    chosen, num_bytes = [], 0.0
    for second in range(seconds):
        num_bytes += rate(counts.count)
        chosen.append(
            counts.observe(began_s + second, int(num_bytes), began_s + second, in_effect=True, round_ended=True)
        )
    return chosen


def window_limited(count: int) -> float:
    """1 Gbit/s, 100 ms, and buffers that carry 220 Mbit/s a connection."""
    return min(count * 27e6, 105e6)


def long_link(fixed: int | None = None, most: int = 24) -> ConnectionCount:
    """A count for a link with a round trip of 100 ms."""
    counts = ConnectionCount(fixed, most)
    counts.round_trip(0.1)
    return counts


def test_it_doubles_while_that_pays_and_goes_back_from_what_does_not() -> None:
    """Four connections fill the link; eight are tried once and given up."""
    chosen = play(long_link(), window_limited, 60)
    assert sorted(set(chosen)) == [1, 2, 4, 8]
    assert set(chosen[-30:]) == {4}


def test_a_busy_moment_ends_no_trial() -> None:
    """One bad measurement of twice as many is not believed."""
    counts, spoilt_s = long_link(), 0

    def rate(count: int) -> float:
        nonlocal spoilt_s
        if count == 2 and len(counts._growing) == 1:
            spoilt_s += 1
            return 1e6
        return window_limited(count)

    assert play(counts, rate, 60)[-1] == 4
    assert spoilt_s


def test_what_was_sent_before_a_change_says_nothing_of_it() -> None:
    """While a long round's answers come over the connections that there were, a trial has not begun."""
    counts, num_bytes, before, taken_by = long_link(), 0.0, 1, 1
    for second in range(300):
        if second % 20 == 0:
            taken_by = counts.count
        num_bytes += window_limited(taken_by)
        in_effect = taken_by == counts.count
        before = counts.observe(second, int(num_bytes), second, in_effect=in_effect, round_ended=True)
    assert before == 4


def test_windows_that_still_grow_end_no_trial() -> None:
    """A new connection carries more from round to round at first; what it carries then is what counts."""
    counts, since, age = long_link(), 1, 0

    def rate(count: int) -> float:
        nonlocal since, age
        since, age = count, age + 1 if count == since else 1
        return window_limited(count) * min(1.0, 0.22 * 2 ** (age / 3))

    assert play(counts, rate, 100)[-1] == 4


@pytest.mark.parametrize(("whole_rounds", "kept"), [(True, 4), (False, 2)])
def test_only_whole_rounds_are_measured(whole_rounds: bool, kept: int) -> None:
    """Each round begins with small windows: what lies between other answers has more or less of that, and misleads."""
    counts, now, num_bytes = long_link(), 0.0, 0.0
    counts.observe(now, 0, now, in_effect=True, round_ended=True)
    for _ in range(20):
        now += 3.0
        for fragment in range(24):
            now += 5e6 / window_limited(counts.count)
            num_bytes += 5e6
            round_ended = fragment == 23 or not whole_rounds
            counts.observe(now, int(num_bytes), now, in_effect=True, round_ended=round_ended)
    assert counts.count == kept


def test_a_full_link_keeps_one() -> None:
    """Where one connection fills the link, two are tried and given up."""
    chosen = play(long_link(), lambda _: 11e6, 60)
    assert set(chosen) == {1, 2}
    assert set(chosen[-30:]) == {1}


def test_losses_make_all_of_them_pay() -> None:
    """Where each connection is slow on its own account, as many as may be are kept."""
    assert play(long_link(), lambda count: count * 0.7e6, 60)[-1] == 8


@pytest.mark.parametrize("took_s", [0.0002, 0.004])
def test_short_round_trips_are_left_alone(took_s: float) -> None:
    """Loopback and local networks pay for no second connection."""
    counts = ConnectionCount(None, 24)
    counts.round_trip(took_s)
    counts.round_trip(0.3)
    assert set(play(counts, window_limited, 60)) == {1}


def test_a_round_trip_that_was_seen_through_a_queue_makes_no_endless_measurements() -> None:
    """A heartbeat behind a long update takes seconds; the search goes on all the same."""
    counts = ConnectionCount(None, 24)
    counts.round_trip(8.0)
    assert play(counts, window_limited, 90)[-1] == 4


def test_nothing_is_tried_before_the_round_trip_is_known() -> None:
    """The first measurement is that of a link that is known to be long."""
    assert set(play(ConnectionCount(None, 24), window_limited, 60)) == {1}


def test_a_number_is_kept() -> None:
    """Whoever says how many gets so many, though never more than there are fragments."""
    assert set(play(long_link(fixed=3), window_limited, 60)) == {3}
    assert long_link(fixed=6, most=2).count == 2
    assert max(play(long_link(most=2), window_limited, 60)) == 2


def test_a_link_that_became_wider_is_found_after_a_while() -> None:
    """What did not pay is tried again, rarely."""
    counts = long_link()
    assert play(counts, lambda _: 11e6, 60)[-1] == 1
    chosen = play(counts, window_limited, int(RETRY_S) + 60, began_s=60.0)
    assert set(chosen[: int(RETRY_S) - 60]) == {1}
    assert chosen[-1] == 4


def test_a_link_that_became_narrower_needs_fewer() -> None:
    """Half as many are tried as well, and kept if they do."""
    counts = long_link()
    assert play(counts, window_limited, 60)[-1] == 4
    assert play(counts, lambda _: 11e6, int(RETRY_S) + 60, began_s=60.0)[-1] == 1


def test_only_time_in_which_bytes_move_counts() -> None:
    """Waiting for a bin to close, or for the next round, makes a link no slower."""
    meter = Meter()
    meter.under_way(10.0, 0, "up", is_so=True)
    meter.under_way(10.5, 1, "down", is_so=True)
    meter.moved(11.0, 0, "up", 100, more_follows=False)
    meter.moved(12.0, 1, "down", 50, more_follows=False)
    assert (meter.num_bytes, meter.active_s(100.0)) == (150, 2.0)
    meter.under_way(101.0, 0, "up", is_so=True)
    assert meter.active_s(101.5) == 2.5
    meter.end_stream(102.0, 0)
    assert meter.active_s(200.0) == 3.0
