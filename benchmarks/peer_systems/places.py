"""Where the processes of a measurement run: which network namespace, address and interface each of them has."""

import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Seat:
    """Where one process runs."""

    prefix: tuple[str, ...] = ()
    """What to put before its command."""
    host: str = "127.0.0.1"
    """Its address."""
    interface: str = "lo"
    """The interface that has it."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Seats for the coordinator and the workers."""

    name: str
    """What the tables call it."""
    coordinator: Seat = field(default_factory=Seat)
    workers: tuple[Seat, ...]
    counts: str
    """Whose counters add up to the bytes on the wire: "one" process's sent bytes (all share an interface), "sent" of
    all workers (they speak to each other), or "both" directions of all workers (they speak to the coordinator)."""

    def wire_bytes(self, traffic: Sequence[Mapping[str, float]]) -> float:
        """Bytes on the wire, both directions, each counted once.

        Args:
            traffic: For each worker, "sent" and "received" bytes on the interfaces that it sees.
        """
        if self.counts == "one":
            return traffic[0]["sent"]
        sent = sum(each["sent"] for each in traffic)
        return sent if self.counts == "sent" else sent + sum(each["received"] for each in traffic)


@contextmanager
def loopback(workers: int) -> Iterator[Place]:
    """A loopback interface of a network namespace of its own, so that nothing else is counted.

    Where this user may make no namespaces, it is the machine's own, and all that passes it meanwhile is counted too.
    """
    name = f"paceline-peers-{os.getpid()}"
    if os.geteuid() != 0:
        yield Place(name="loopback", workers=(Seat(),) * workers, counts="one")
        return
    _ip("netns", "add", name)
    try:
        _ip("-n", name, "link", "set", "lo", "up")
        seat = Seat(prefix=("ip", "netns", "exec", name))
        yield Place(name="loopback", coordinator=seat, workers=(seat,) * workers, counts="one")
    finally:
        _ip("netns", "delete", name)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)
