"""Pushes leave no faster than the cap, and a round is spread over the time that it has."""

import pytest

from paceline.pacing import BURST_S, SPREAD, Pace


def seconds_for(pace: Pace, num_messages: int, message_bytes: int) -> float:
    """How long a number of messages take that leave as soon as they may."""
    now = 0.0
    for _ in range(num_messages):
        now += pace.take(now, message_bytes)
    return now + pace.take(now, 0)


def test_the_cap_holds_for_messages_of_any_size() -> None:
    """8 Mbit/s are a megabyte a second, also in messages larger than what the bucket holds."""
    assert seconds_for(Pace(8), 10, 1_000_000) == pytest.approx(10, abs=0.2)
    assert seconds_for(Pace(8), 10_000, 1000) == pytest.approx(10, abs=0.2)


def test_without_a_cap_nothing_waits() -> None:
    """Pacing is asked for, or it is not there."""
    assert seconds_for(Pace(), 1000, 1_000_000) == 0.0


def test_a_pause_saves_up_no_more_than_a_burst() -> None:
    """After an idle minute the cap holds as before."""
    pace = Pace(8)
    assert pace.take(0.0, 0) == 0.0
    assert pace.take(60.0, 1_000_000) == 0.0
    assert pace.take(60.0, 0) == pytest.approx(1 - BURST_S)


def test_senders_that_wait_at_once_have_their_turns_one_after_the_other() -> None:
    """Several connections share the cap."""
    pace = Pace(8)
    assert [pace.take(0.0, 1_000_000) for _ in range(4)] == pytest.approx([0, 1, 2, 3])


def test_a_round_is_spread_over_part_of_the_next() -> None:
    """Its pushes take that part of the time, and a tighter cap goes before."""
    pace = Pace()
    pace.spread(10_000_000, 20.0)
    assert seconds_for(pace, 10, 1_000_000) == pytest.approx(SPREAD * 20, abs=0.2)
    capped = Pace(1)
    capped.spread(10_000_000, 20.0)
    assert capped.bytes_per_s == 125_000
    capped.spread(10_000_000, 0.0)
    assert capped.bytes_per_s == 125_000
