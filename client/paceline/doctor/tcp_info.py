"""What the kernel knows of this process's TCP connections to a server: retransmissions, and what held them back.

Linux only. gRPC does not hand out its sockets, but they are descriptors of this process.
"""

import os
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

LEAST_SEGMENTS = 100
"""With fewer, one that is lost would say nothing."""

_TCP_INFO_BYTES = 232
_TOTAL_RETRANS = struct.Struct("=I"), 100
_MIN_RTT_US = struct.Struct("=I"), 148
_DATA_SEGS_OUT = struct.Struct("=I"), 156
_LIMITS_US = struct.Struct("=QQQ"), 168
"""The layout of struct tcp_info since Linux 4.10: what is read, and at which byte."""


@dataclass(frozen=True, kw_only=True)
class Connections:
    """The connections of this process to a port, together.

    Attributes:
        count: How many there are.
        segments_sent: Segments with data that were sent.
        segments_resent: Those of them that were sent again.
        busy_s: Seconds in which data was under way.
        receiver_limited_s: Those in which the peer's buffer was full.
        sender_limited_s: Those in which this host's send buffer was what held it back.
        min_round_trip_s: The shortest round trip that TCP saw; None: none.
    """

    count: int
    segments_sent: int
    segments_resent: int
    busy_s: float
    receiver_limited_s: float
    sender_limited_s: float
    min_round_trip_s: float | None

    def loss_since(self, before: "Connections") -> float | None:
        """The share of segments since then that had to be sent again; None: too few were sent to say."""
        sent, again = self.segments_sent - before.segments_sent, self.segments_resent - before.segments_resent
        return again / sent if sent >= LEAST_SEGMENTS else None


def connections_to(port: int) -> Connections | None:
    """What the kernel knows of the connections to a port, whatever the host; None where it does not say."""
    if sys.platform != "linux":
        return None
    infos = [info for info in _infos(port) if len(info) >= _TCP_INFO_BYTES - 40]
    if not infos:
        return None
    limits = [_LIMITS_US[0].unpack_from(info, _LIMITS_US[1]) for info in infos]
    round_trips = [_read(info, _MIN_RTT_US) for info in infos]
    # The kernel says all ones where it has not seen any.
    seen = [value for value in round_trips if 0 < value < 2**32 - 1]
    return Connections(
        count=len(infos),
        segments_sent=sum(_read(info, _DATA_SEGS_OUT) for info in infos),
        segments_resent=sum(_read(info, _TOTAL_RETRANS) for info in infos),
        busy_s=sum(limit[0] for limit in limits) / 1e6,
        receiver_limited_s=sum(limit[1] for limit in limits) / 1e6,
        sender_limited_s=sum(limit[2] for limit in limits) / 1e6,
        min_round_trip_s=min(seen) / 1e6 if seen else None,
    )


def _infos(port: int) -> Iterator[bytes]:
    for entry in Path("/proc/self/fd").iterdir():
        with _socket_of(int(entry.name)) as found:
            try:
                if found is not None and found.getpeername()[1] == port:
                    yield found.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
            except (OSError, IndexError, TypeError):
                continue  # not a TCP socket, or not connected any more


@contextmanager
def _socket_of(descriptor: int) -> Iterator[socket.socket | None]:
    """A descriptor as a socket of its own, so that closing it leaves the other open; None if it is none."""
    try:
        copy = os.dup(descriptor)
    except OSError:
        yield None
        return
    try:
        found = socket.socket(fileno=copy)
    except OSError:
        os.close(copy)
        yield None
        return
    with found:
        yield found


def _read(info: bytes, field: tuple[struct.Struct, int]) -> int:
    value: int = field[0].unpack_from(info, field[1])[0]
    return value
