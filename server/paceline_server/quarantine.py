"""Workers that are kept out of the run for a while, since they sent unusable pushes round after round.

Pure: time is an argument, nothing waits.
"""

from collections.abc import Container, Iterable
from dataclasses import dataclass, replace

from paceline_server.conduct import Conduct
from paceline_wire.errors import QuarantinedError


@dataclass(frozen=True, kw_only=True)
class QuarantinedWorker:
    """One worker in quarantine.

    Attributes:
        worker: Its name.
        reason: What it did, in a sentence.
        remaining_s: Seconds until it may join again.
    """

    worker: str
    reason: str
    remaining_s: float


class Quarantine:
    """Who is in quarantine, and who is on the way there.

    Args:
        rounds: Rounds in a row, refused for what they contained, that lead to it.
        duration_s: Seconds that it lasts; 0: nobody is put there.
    """

    def __init__(self, *, rounds: int, duration_s: float) -> None:
        self._rounds = rounds
        self._duration_s = duration_s
        self._conduct: dict[str, Conduct] = {}
        self._until_s: dict[str, float] = {}
        self._reasons: dict[str, str] = {}

    def note_accepted(self, worker: str, incarnation: int, seq: int) -> None:
        """Note that a push was applied."""
        conduct = self._conduct.get(worker)
        if conduct is not None:
            self._conduct[worker] = conduct.after_acceptance((incarnation, seq))

    def note_refused(self, worker: str, incarnation: int, seq: int) -> bool:
        """Note that a push was refused for what it contained; whether so many rounds in a row lead to quarantine."""
        conduct = self._conduct.get(worker, Conduct()).after_refusal((incarnation, seq))
        self._conduct[worker] = replace(conduct, refused=conduct.refused[-self._rounds :])
        return self._duration_s > 0 and len(conduct.refused) >= self._rounds

    def num_refused(self, workers: Iterable[str]) -> int:
        """How many of some workers had their latest round refused."""
        return sum(self._conduct[worker].rounds_refused > 0 for worker in workers if worker in self._conduct)

    def begin(self, now: float, worker: str, fault: str) -> str:
        """Put a worker in quarantine; fault says what its outer gradients were. Returns the reason, a sentence."""
        reason = f"its outer gradients were {fault} in {self._rounds} rounds in a row"
        self._until_s[worker] = now + self._duration_s
        self._reasons[worker] = reason
        self._conduct.pop(worker, None)
        return reason

    def holds(self, now: float, worker: str) -> bool:
        """Whether a worker is in quarantine."""
        return now < self._until_s.get(worker, now)

    def end(self, now: float, worker: str) -> bool:
        """Let a worker in again before its time; whether it was in quarantine."""
        was_held = self.holds(now, worker)
        self._until_s.pop(worker, None)
        self._reasons.pop(worker, None)
        return was_held

    def refuse(self, now: float, worker: str) -> None:
        """Turn a worker away that is in quarantine.

        Raises:
            QuarantinedError: It is; the text says why, for how long, and what to do.
        """
        if self.holds(now, worker):
            raise QuarantinedError(
                f"worker {worker!r} is in quarantine for {self._until_s[worker] - now:.0f} s more: "
                f"{self._reasons[worker]}. Find out why its outer gradients went bad (learning rate, data, hardware) "
                "and start it anew after that time"
            )

    def forget(self, worker: str) -> None:
        """Forget the conduct of a worker that is gone."""
        self._conduct.pop(worker, None)

    def forget_all_but(self, workers: Container[str]) -> None:
        """Forget the conduct of all but some workers: a push that was under way when its worker went is noted, too."""
        self._conduct = {worker: conduct for worker, conduct in self._conduct.items() if worker in workers}

    def workers(self, now: float) -> tuple[QuarantinedWorker, ...]:
        """All that are in quarantine."""
        return tuple(
            QuarantinedWorker(worker=worker, reason=self._reasons[worker], remaining_s=until_s - now)
            for worker, until_s in self._until_s.items()
            if now < until_s
        )

    def restore(self, now: float, workers: Iterable[QuarantinedWorker]) -> None:
        """Take up who was in quarantine; time while the shard was down does not count."""
        self._until_s = {held.worker: now + held.remaining_s for held in workers}
        self._reasons = {held.worker: held.reason for held in workers}

    def release_due(self, now: float) -> list[str]:
        """Forget the quarantines that are over; returns a sentence for each."""
        over = [worker for worker, until_s in self._until_s.items() if now >= until_s]
        for worker in over:
            del self._until_s[worker], self._reasons[worker]
        return [f"the quarantine of worker {worker} is over; it may join again" for worker in over]
