"""Which answers complete rounds, seen from one shard's connection."""

from paceline.whole_rounds import WholeRounds


def test_a_round_is_whole_when_every_fragment_is_answered_and_nothing_is_due() -> None:
    """In whatever order the answers come."""
    rounds = WholeRounds(3)
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        ended = [rounds.answered(fragment, more_follow=fragment != order[-1]) for fragment in order]
        assert ended == [False, False, True]


def test_a_link_that_is_faster_than_the_encoding_ends_no_round() -> None:
    """Nothing is due between two fragments, and the round goes on."""
    rounds = WholeRounds(3)
    for _ in range(4):
        assert [rounds.answered(fragment, more_follow=False) for fragment in range(3)] == [False, False, True]


def test_what_is_left_of_a_round_is_none() -> None:
    """After a restart only some fragments are sent again; the next round is the first whole one, and those after it."""
    rounds = WholeRounds(4)
    assert [rounds.answered(2, more_follow=True), rounds.answered(3, more_follow=False)] == [False, False]
    for _ in range(3):
        ended = [rounds.answered(fragment, more_follow=fragment < 3) for fragment in range(4)]
        assert ended == [False, False, False, True]


def test_overlapping_rounds_end_with_an_answer_for_each_fragment() -> None:
    """Something is always due; a moment in which nothing was, once, changes that for one round."""
    rounds = WholeRounds(2)
    assert not rounds.answered(0, more_follow=False)
    ended = [rounds.answered(number % 2, more_follow=True) for number in range(1, 12)]
    assert ended == [False, False, True, False, True, False, True, False, True, False, True]


def test_a_shard_of_one_fragment() -> None:
    """Every answer ends a round."""
    rounds = WholeRounds(1)
    assert all(rounds.answered(0, more_follow=bool(number % 2)) for number in range(5))
