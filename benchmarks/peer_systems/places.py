"""Where the processes of a measurement run: which network namespace, address and interface each of them has."""

import os
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from link import Host, Link
from link_queue import LinkShape


@dataclass(frozen=True, kw_only=True)
class Seat:
    """Where one process runs."""

    start: "Callable[..., subprocess.Popen[Any]]" = subprocess.Popen
    """Starts a command there, with the options of Popen."""
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
            traffic: For each worker, "sent" and "received" bytes on the interface that it uses.
        """
        if self.counts == "one":
            return traffic[0]["sent"]
        sent = sum(each["sent"] for each in traffic)
        return sent if self.counts == "sent" else sent + sum(each["received"] for each in traffic)


@dataclass(frozen=True, kw_only=True)
class Places:
    """The same links for both kinds of systems."""

    name: str
    star: Place
    """A coordinator in the middle, and a link from it to each worker."""
    direct: Place
    """Two workers with a link between them; the coordinator, if there is one, is beside worker 0."""


@contextmanager
def loopback(workers: int) -> Iterator[Places]:
    """A loopback interface of a network namespace of its own, so that nothing else is counted.

    Where this user may make no namespaces, it is the machine's own, and all that passes it meanwhile is counted too.
    """
    name = f"paceline-peers-{os.getpid()}"
    with ExitStack() as stack:
        seat = Seat()
        if os.geteuid() == 0:
            _ip("netns", "add", name)
            stack.callback(_ip, "netns", "delete", name)
            _ip("-n", name, "link", "set", "lo", "up")
            seat = Seat(start=partial(_start_in, name))
        place = Place(name="loopback", coordinator=seat, workers=(seat,) * workers, counts="one")
        yield Places(name="loopback", star=place, direct=place)


@contextmanager
def emulated(link: str, workers: int) -> Iterator[Places]:
    """Emulated links that real TCP crosses, "RATE_MBIT:RTT_MS", with Linux's default buffers. Needs root.

    Raises:
        ValueError: The link is not of this form.
    """
    rate_mbit, _, rtt_ms = link.partition(":")
    shape = LinkShape(rate_mbit=float(rate_mbit), delay_ms=float(rtt_ms) / 2)
    with Link(shape, hosts=1 + workers) as star, Link(shape) as direct:
        middle, *around = [_seat(host) for host in star.hosts]
        first, second = [_seat(host) for host in direct.hosts]
        yield Places(
            name=link,
            star=Place(name=link, coordinator=middle, workers=tuple(around), counts="both"),
            direct=Place(name=link, coordinator=first, workers=(first, second), counts="sent"),
        )


def _seat(host: Host) -> Seat:
    return Seat(start=host.popen, host=host.address, interface="wan0")


def _start_in(namespace: str, command: Sequence[str], **options: Any) -> "subprocess.Popen[Any]":
    return subprocess.Popen(["ip", "netns", "exec", namespace, *command], **options)  # noqa: S607  # wherever it is


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)  # noqa: S607  # wherever it is
