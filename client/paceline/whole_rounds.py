"""When a round's pushes to a shard are all answered, as far as its connection can see. Pure.

A connection is handed pushes and not rounds. A round has one push for each of the shard's fragments. Mostly the next
begins when all are answered; with a window of several rounds, pushes are always under way.
"""

from collections import Counter


class WholeRounds:
    """Tells which answers complete rounds.

    Where rounds do not overlap, a round is whole when nothing is unanswered and every fragment has its answer. That
    nothing is unanswered is not enough: a link can be faster than the encoding. Where they overlap there is no such
    moment, and one answer for each fragment is a round's worth of bytes.

    Args:
        num_fragments: Fragments of the shard.
    """

    def __init__(self, num_fragments: int) -> None:
        self._num_fragments = num_fragments
        self._answers: Counter[int] = Counter()
        self._was_idle = False

    def answered(self, fragment: int, *, more_follow: bool) -> bool:
        """Note an answer, and whether others are due; returns whether a round is whole now.

        Of a round of which something was answered before this object was made, or that has only some of the fragments,
        as after a restart, the rest does not count as one: it ends with a moment in which nothing is due.
        """
        self._answers[fragment] += 1
        fewest = min(self._answers.values()) if len(self._answers) >= self._num_fragments else 0
        # A round in which nothing was due for a moment ends with such a moment, unless that was the last one.
        if fewest < (2 if more_follow and self._was_idle else 1):
            self._was_idle = self._was_idle or not more_follow
            return False
        self._answers.clear()
        self._was_idle = False
        return True
