"""When workers may be judged by their silence: once a shard that was away has read what they sent."""

from itertools import pairwise

from paceline_server.attention import MOST_LATE_LOOKS, OVERSLEPT_S, Attention

READING_S = 2.0
LATE_S = 2 * OVERSLEPT_S


def attention() -> Attention:
    """That of a shard with the default lease."""
    return Attention(READING_S)


def test_looks_in_time_judge_at_once() -> None:
    """Small delays are those of any event loop."""
    watching = attention()
    assert all(watching.look(second + OVERSLEPT_S / 2, second) for second in range(100))
    assert watching.judges_at_s is None


def test_after_a_pause_nobody_is_judged_until_what_came_is_read() -> None:
    """The next look is due when reading has had its time, and judges."""
    watching = attention()
    assert not watching.look(100.0, 5.0)
    assert watching.judges_at_s == 100.0 + READING_S
    assert not watching.look(101.0, 101.0)  # a worker joined
    assert watching.look(102.0, 102.0)
    assert watching.judges_at_s is None


def test_a_second_pause_while_reading_counts_as_well() -> None:
    """Otherwise whatever came during the second one would count as silence."""
    watching = attention()
    assert not watching.look(10.0, 5.0)
    assert not watching.look(25.0, 12.0)
    assert watching.judges_at_s == 27.0
    assert watching.look(27.0, 27.0)


def test_a_machine_that_is_always_late_still_judges() -> None:
    """Progress: a worker that is gone is given up, if somewhat later."""
    watching, now, due_s, judged = attention(), 0.0, 0.0, []
    while now < 100.0:
        now = due_s + LATE_S
        if watching.look(now, due_s):
            judged.append(now)
        due_s = watching.judges_at_s or now + READING_S
    gaps_s = [after - before for before, after in pairwise(judged)]
    assert max(gaps_s) <= (MOST_LATE_LOOKS + 1) * (READING_S + LATE_S) + 1e-6
