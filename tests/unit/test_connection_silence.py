"""A connection counts as dead when heartbeats are lost and nothing moves, and never while a slow link moves."""

import pytest

from paceline.silence import LOST_HEARTBEATS, SHORTEST_DEADLINE_S, SLOWEST_BYTES_PER_S, Silence
from paceline_wire.transfer import FIRST_PIECE_BYTES, MESSAGE_BYTES, SMALLEST_PIECE_BYTES, PieceSize

LONGEST_S = 20.0


def lost_in_a_row(silence: Silence, now: float) -> list[bool]:
    """Lose heartbeats one after the other; whether the connection counts as dead after each."""
    return [silence.lost(now + 3 * number + 3, now + 3 * number) for number in range(LOST_HEARTBEATS)]


def test_silence_and_lost_heartbeats_make_it_dead() -> None:
    """The last of several heartbeats in a row decides."""
    silence = Silence(LONGEST_S)
    assert lost_in_a_row(silence, 100.0) == [False] * (LOST_HEARTBEATS - 1) + [True]
    assert silence.lost_heartbeats == LOST_HEARTBEATS


def test_an_answer_in_between_begins_the_count_anew() -> None:
    """Heartbeats that are lost now and then mean nothing."""
    silence = Silence(LONGEST_S)
    for number in range(10):
        assert not silence.lost(10.0 * number + 3, 10.0 * number)
        silence.answered(0.1)


def test_a_message_since_the_heartbeat_was_sent_is_a_sign_of_life() -> None:
    """While messages come or go, lost heartbeats wait behind them."""
    silence = Silence(LONGEST_S)
    for number in range(10):
        silence.received(5.0 * number + 1, more_follows=False)
        assert not silence.lost(5.0 * number + 3, 5.0 * number)
    assert lost_in_a_row(silence, 100.0)[-1]


def test_a_message_under_way_gets_the_time_of_a_slow_link() -> None:
    """Nothing is dead while the message that is being written may need so long."""
    silence = Silence(LONGEST_S)
    silence.wrote(100.0, 10 * SLOWEST_BYTES_PER_S)
    silence.wrote(100.0, SLOWEST_BYTES_PER_S)
    assert not any(lost_in_a_row(silence, 100.0))
    silence.arrived(109.0, 10 * SLOWEST_BYTES_PER_S)
    assert not any(lost_in_a_row(silence, 107.0))
    assert lost_in_a_row(silence, 111.0)[-1]


def test_an_update_under_way_gets_the_time_of_a_slow_link() -> None:
    """Between two messages of one payload a connection is not dead before the next may have come."""
    silence = Silence(LONGEST_S)
    silence.received(100.0, more_follows=True)
    assert not any(lost_in_a_row(silence, 110.0))
    silence.received(130.0, more_follows=False)
    assert lost_in_a_row(silence, 131.0)[-1]


def test_messages_grow_by_what_has_arrived() -> None:
    """What buffers take at once says nothing of the link."""
    silence = Silence(LONGEST_S)
    for _ in range(10):
        silence.wrote(0.0, FIRST_PIECE_BYTES)
    assert silence.piece_size.num_bytes == FIRST_PIECE_BYTES
    silence.arrived(0.1, FIRST_PIECE_BYTES)
    assert silence.piece_size.num_bytes == 2 * FIRST_PIECE_BYTES
    silence.arrived(6.1, 4 * FIRST_PIECE_BYTES)
    assert silence.piece_size.num_bytes == FIRST_PIECE_BYTES


def test_a_new_stream_begins_without_a_past() -> None:
    """What was under way and lost belongs to the one before."""
    silence = Silence(LONGEST_S)
    silence.wrote(0.0, 1000 * SLOWEST_BYTES_PER_S)
    silence.received(0.0, more_follows=True)
    silence.begin_stream()
    assert lost_in_a_row(silence, 100.0) == [False] * (LOST_HEARTBEATS - 1) + [True]


def test_the_deadline_follows_the_round_trips() -> None:
    """Unknown ways get the longest deadline, fast ones the shortest, slow ones as much as theirs take."""
    silence = Silence(LONGEST_S)
    assert silence.deadline_s == LONGEST_S
    for _ in range(5):
        silence.answered(0.01)
    assert silence.deadline_s == SHORTEST_DEADLINE_S
    for _ in range(32):
        silence.answered(2.0)
    assert silence.deadline_s == pytest.approx(6.0)


def test_messages_have_the_size_that_the_link_carries_in_time() -> None:
    """They grow to the fastest size, and shrink to one that a slow link shows progress with."""
    size = PieceSize()
    sizes = [size.num_bytes]
    for _ in range(10):
        size.observe(0.0)
        sizes.append(size.num_bytes)
    assert (sizes[0], sizes[-1]) == (FIRST_PIECE_BYTES, MESSAGE_BYTES)
    size.observe(0.5)
    assert size.num_bytes == MESSAGE_BYTES
    for _ in range(10):
        size.observe(2.0)
    assert size.num_bytes == SMALLEST_PIECE_BYTES
