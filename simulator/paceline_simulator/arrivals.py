"""The order in which pushes arrived: recorded by a simulation or a real server, and imposed on a simulation."""

import json
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from paceline_wire.errors import InvalidInputError


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """One push that arrived.

    Attributes:
        time_s: When, in seconds of the server's clock.
        fragment: The fragment that it is about.
        worker: Whose push it was.
        incarnation: The worker's incarnation.
        seq: Counts the incarnation's pushes to the fragment from 1.
        base_bin: The bin of the newest values that the worker held.
        outcome: "applied", "refused" or "duplicate".
    """

    time_s: float
    fragment: int
    worker: str
    incarnation: int
    seq: int
    base_bin: int
    outcome: str


def read_arrivals(path: Path) -> list[Arrival]:
    """The arrivals that a server wrote, as JSON lines.

    Raises:
        InvalidInputError: A line is not an arrival; the text says which.
    """
    arrivals = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            fields = json.loads(line)
            arrivals.append(
                Arrival(
                    time_s=float(fields["time_s"]),
                    fragment=int(fields["fragment"]),
                    worker=str(fields["worker"]),
                    incarnation=int(fields["incarnation"]),
                    seq=int(fields["seq"]),
                    base_bin=int(fields["base_bin"]),
                    outcome=str(fields["outcome"]),
                )
            )
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            raise InvalidInputError(f"line {number} of {path} is not an arrival: {error!r}") from error
    return arrivals


class RecordedOrder:
    """Tells whose turn it is at each fragment.

    A real worker's incarnations are made of the time; a simulated one's count from 1. They are matched in order.

    Args:
        arrivals: What was recorded, in order; duplicates count for nothing.
    """

    def __init__(self, arrivals: Sequence[Arrival]) -> None:
        counted = _incarnations(arrivals)
        self._turns: dict[int, deque[tuple[tuple[str, int, int], float]]] = defaultdict(deque)
        for arrival in arrivals:
            if arrival.outcome != "duplicate":
                incarnation = counted[arrival.worker, arrival.incarnation]
                self._turns[arrival.fragment].append(((arrival.worker, incarnation, arrival.seq), arrival.time_s))

    def turn(self, fragment: int) -> tuple[tuple[str, int, int], float] | None:
        """Whose turn it is, as (worker, incarnation, seq), and the recorded time; None once the record has ended."""
        turns = self._turns[fragment]
        return turns[0] if turns else None

    def take(self, fragment: int) -> None:
        """End the turn."""
        self._turns[fragment].popleft()


def _incarnations(arrivals: Iterable[Arrival]) -> dict[tuple[str, int], int]:
    """The number, from 1, of each (worker, incarnation)."""
    by_worker: dict[str, set[int]] = defaultdict(set)
    for arrival in arrivals:
        by_worker[arrival.worker].add(arrival.incarnation)
    return {
        (worker, incarnation): number
        for worker, incarnations in by_worker.items()
        for number, incarnation in enumerate(sorted(incarnations), start=1)
    }
