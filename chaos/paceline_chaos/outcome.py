"""What a run of chaos came to: each fault counted, the pushes accounted for, and what was lost."""

import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

from paceline_chaos.plan import Kind
from paceline_chaos.verdict import Verdict


@dataclass(kw_only=True)
class Count:
    """One kind of fault.

    Attributes:
        fired: How often it happened.
        survived: How often pushes were acknowledged again after it.
        num_bytes: Bytes that it touched, for faults of links and disks.
        longest_s: Seconds from its end until pushes were acknowledged again, at most.
    """

    fired: int = 0
    survived: int = 0
    num_bytes: int = 0
    longest_s: float = 0.0

    def happened(self, num_bytes: int = 0) -> None:
        """Count one."""
        self.fired += 1
        self.num_bytes += num_bytes

    def was_survived(self, after_s: float) -> None:
        """Count one of those as survived."""
        self.survived += 1
        self.longest_s = max(self.longest_s, after_s)


@dataclass(kw_only=True)
class Outcome:
    """A run of chaos.

    Attributes:
        seed: What it was drawn from.
        counts: The faults by kind.
        skipped: Kinds that could not be done here, and why.
        recovery_s: Seconds from each SIGKILL of the server until it served again, less the look at its directory.
        looks: How often the stopped server's directory was compared with the witnesses.
        verdict: The last comparison; None where the server's data directory cannot be read here.
        starts: Processes of witnesses that were started.
        ends: What ended witnesses by itself, in sentences.
        lost: What did not hold, in sentences; empty if everything did.
        took_s: Seconds.
    """

    seed: int
    counts: dict[Kind, Count] = field(default_factory=dict)
    skipped: dict[Kind, str] = field(default_factory=dict)
    recovery_s: list[float] = field(default_factory=list)
    looks: int = 0
    verdict: Verdict | None = None
    starts: int = 0
    ends: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    took_s: float = 0.0

    def count(self, kind: Kind) -> Count:
        """The count of one kind."""
        return self.counts.setdefault(kind, Count())

    @property
    def held(self) -> bool:
        """Whether everything held."""
        return not self.lost

    def merged(self, other: "Outcome") -> "Outcome":
        """Both together, as one run."""
        total = Outcome(seed=self.seed, skipped={**self.skipped, **other.skipped}, took_s=self.took_s + other.took_s)
        for part in (self, other):
            for kind, count in part.counts.items():
                into = total.count(kind)
                into.fired += count.fired
                into.survived += count.survived
                into.num_bytes += count.num_bytes
                into.longest_s = max(into.longest_s, count.longest_s)
            total.recovery_s += part.recovery_s
            total.looks += part.looks
            total.starts += part.starts
            total.ends += part.ends
            total.lost += part.lost
        total.verdict = _together(self.verdict, other.verdict)
        return total

    def recovery(self) -> dict[str, float] | None:
        """Shortest, median and longest time of recovery in seconds; None without a kill."""
        if not self.recovery_s:
            return None
        middle = statistics.median(self.recovery_s)
        return {"min": min(self.recovery_s), "median": middle, "max": max(self.recovery_s)}

    def as_mapping(self) -> dict[str, Any]:
        """All of it in values that JSON has."""
        return {
            "seed": self.seed,
            "held": self.held,
            "lost": self.lost,
            "took_s": round(self.took_s, 1),
            "faults": {kind.value: asdict(count) for kind, count in self.counts.items()},
            "skipped": {kind.value: reason for kind, reason in self.skipped.items()},
            "recovery_s": self.recovery(),
            "looks": self.looks,
            "pushes": None if self.verdict is None else asdict(self.verdict),
            "worker_processes": self.starts,
            "workers_ended": self.ends,
        }


def _together(one: Verdict | None, other: Verdict | None) -> Verdict | None:
    if one is None or other is None:
        return one or other
    distances = [verdict.distance for verdict in (one, other) if verdict.distance is not None]
    return Verdict(
        sent=one.sent + other.sent,
        acknowledged=one.acknowledged + other.acknowledged,
        refused=one.refused + other.refused,
        found=one.found + other.found,
        in_flight=one.in_flight + other.in_flight,
        records=one.records + other.records,
        distance=max(distances, default=None),
        lost=one.lost + other.lost,
    )
