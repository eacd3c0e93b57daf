"""Which faults a run gets, and when: drawn from a seed before anything happens, so that a run can be repeated."""

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    """Every fault there is; the values are what --kinds takes."""

    SERVER_KILL = "server-kill"
    SERVER_STOP = "server-stop"
    SERVER_CLOCK = "server-clock"
    FULL_DISK = "full-disk"
    WORKER_KILL = "worker-kill"
    WORKER_STOP = "worker-stop"
    WORKER_CLOCK = "worker-clock"
    CUT = "cut"
    BLACKHOLE = "blackhole"
    SLOW = "slow"
    DELAY = "delay"
    DROP = "drop"
    DUPLICATE = "duplicate"
    REORDER = "reorder"
    CORRUPT = "corrupt"

    @property
    def on_server(self) -> bool:
        """Whether it happens to the server, rather than to a worker or its link."""
        return self in (Kind.SERVER_KILL, Kind.SERVER_STOP, Kind.SERVER_CLOCK, Kind.FULL_DISK)

    @property
    def on_link(self) -> bool:
        """Whether it happens to a worker's link."""
        return not self.on_server and not self.value.startswith("worker")


MEANINGS = {
    Kind.SERVER_KILL: "SIGKILL of the server, restarted on the same directory and port",
    Kind.SERVER_STOP: "SIGSTOP of the server, then SIGCONT",
    Kind.SERVER_CLOCK: "the server starts with its wall clock moved by up to an hour, either way",
    Kind.FULL_DISK: "the disk is filled until the server tells of it, then freed",
    Kind.WORKER_KILL: "SIGKILL of a worker, started again under the same name",
    Kind.WORKER_STOP: "SIGSTOP of a worker, beyond its lease or not, then SIGCONT",
    Kind.WORKER_CLOCK: "a worker is killed and starts with its wall clock moved by up to an hour, either way",
    Kind.CUT: "the connections of a link are reset",
    Kind.BLACKHOLE: "a direction carries nothing while its connections stay open",
    Kind.SLOW: "a direction carries a few kB/s",
    Kind.DELAY: "a direction carries everything later",
    Kind.DROP: "bytes are left out of a connection",
    Kind.DUPLICATE: "bytes come twice",
    Kind.REORDER: "two pieces change places",
    Kind.CORRUPT: "a bit of a payload is flipped",
}

LONGEST_JUMP_S = 3600.0

_RARE_WORKER_KINDS = (Kind.WORKER_KILL, Kind.WORKER_CLOCK)
"""Kinds that cost a start of a process each: half as many of them are planned."""


@dataclass(frozen=True, kw_only=True)
class WorkerFault:
    """A fault of a worker or its link.

    Attributes:
        kind: What happens.
        up: Whether it hits the link's direction to the server.
        pause_s: Seconds before it.
        lasts_s: Seconds that it lasts, where it does.
        ends_with_cut: Whether a blackhole, or a garbled connection, ends with a reset after that, as when a router
            forgets it; without one, the peers find out by themselves, which takes them up to 50 s.
        bytes_per_s: The rate that is left (slow).
        delay_s: How much later things come (delay).
        jump_s: Seconds by which the clock is moved.
    """

    kind: Kind
    up: bool
    pause_s: float
    lasts_s: float
    ends_with_cut: bool
    bytes_per_s: float
    delay_s: float
    jump_s: float


@dataclass(frozen=True, kw_only=True)
class ServerFault:
    """What happens to the server around one kill.

    Attributes:
        pause_s: Seconds before it.
        stopped_s: Seconds for which it is stopped first; None: it is not.
        jump_s: Seconds by which its clock is moved at the restart; None: it is not.
        fill: Whether its disk is filled first.
        one_shard: Which shard's process is killed, of several; None: all at once.
    """

    pause_s: float
    stopped_s: float | None
    jump_s: float | None
    fill: bool
    one_shard: int | None


def worker_faults(seed: int, kinds: Sequence[Kind]) -> Iterator[WorkerFault]:
    """Faults of workers and links without end, all kinds among the first ones, in an order that the seed decides."""
    rng = random.Random(f"{seed}/workers")  # noqa: S311  # not for secrets
    for kind in _each_in_turn(rng, [kind for kind in kinds if not kind.on_server]):
        yield WorkerFault(
            kind=kind,
            up=rng.random() < 0.5,
            pause_s=rng.uniform(0.0, 1.0),
            lasts_s=rng.choice((rng.uniform(0.2, 1.0), rng.uniform(1.0, 4.0))),
            ends_with_cut=rng.random() < 0.5,
            bytes_per_s=rng.uniform(4_000, 60_000),
            delay_s=rng.uniform(0.02, 0.4),
            jump_s=_jump_s(rng),
        )


def server_faults(seed: int, kinds: Sequence[Kind], *, shards: int) -> Iterator[ServerFault]:
    """What happens around kills of the server, without end."""
    rng = random.Random(f"{seed}/server")  # noqa: S311  # not for secrets
    for number in itertools.count():
        yield ServerFault(
            pause_s=rng.uniform(0.0, 0.5),
            stopped_s=rng.uniform(0.2, 1.5) if Kind.SERVER_STOP in kinds and number % 4 == 0 else None,
            jump_s=_jump_s(rng) if Kind.SERVER_CLOCK in kinds and number % 4 == 1 else None,
            fill=Kind.FULL_DISK in kinds,
            one_shard=rng.randrange(shards) if shards > 1 and rng.random() < 0.5 else None,
        )


def _each_in_turn(rng: random.Random, kinds: Sequence[Kind]) -> Iterator[Kind]:
    """Kinds in shuffled rounds, so that none is missing among the first ones."""
    turn = list(kinds)
    while turn:
        rng.shuffle(turn)
        yield from turn
        turn = [kind for kind in kinds if kind not in _RARE_WORKER_KINDS or rng.random() < 0.5] or list(kinds)


def _jump_s(rng: random.Random) -> float:
    jump_s = round(rng.uniform(1.0, LONGEST_JUMP_S), 3)
    return jump_s if rng.random() < 0.5 else -jump_s
