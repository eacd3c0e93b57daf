r"""A wide-area link on one machine that real TCP crosses: two hosts, each a network namespace, and what lies between.

Needs Linux, root, /dev/net/tun and the `ip` command. Each host has a TUN device; a process beside them carries packets
from one to the other through a queue with a rate, a delay, a limit and a loss probability, each direction for itself.
The hosts' TCP is the kernel's own: slow start, retransmission, windows and buffers are real, and so is what they cost.
Emulated are the rate, the delay, the queue (drop tail) and the loss (independent for each segment, with seeded random
numbers).

A command in host b, with a server in host a:

    python benchmarks/link.py --rate-mbit 1000 --delay-ms 50 --loss 0.001 \
        --server "paceline serve --insecure --listen 10.77.0.1:7070" -- python train.py --address 10.77.0.1:7070

As a library; commands are processes of their own, since a process is in one host:

    with Link(LinkShape(rate_mbit=1000, delay_ms=50)) as link:
        a, b = link.hosts
        server = a.popen(["paceline", "serve", "--insecure", "--listen", f"{a.address}:7070"])
        client = b.popen([sys.executable, "worker.py", f"{a.address}:7070"])

More hosts than two make a star: host a is the hub, and every other host has such a link of its own to it, so a server
in a serves workers in b, c, ... over a link each. What goes from b to c travels up b's link and down c's.

`with host.entered():` puts the calling thread into a host: sockets it makes and processes it starts there belong to
that host for good. Namespaces live as long as the descriptors and processes that use them: nothing needs to be cleaned
up, also after a kill.
"""

import argparse
import contextlib
import ctypes
import fcntl
import ipaddress
import json
import os
import shlex
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from link_queue import LinkShape

NETWORK = "10.77.0.0/24"
"""The hosts' addresses: a is 10.77.0.1, b is 10.77.0.2, ... Only namespaces of a link know them."""
LINUX_DEFAULTS = {
    "net/ipv4/tcp_wmem": "4096 16384 4194304",
    "net/ipv4/tcp_rmem": "4096 131072 6291456",
    "net/ipv4/tcp_slow_start_after_idle": "1",
    "net/ipv4/tcp_no_metrics_save": "1",
}
"""What a host's TCP has, whatever this machine has: the defaults of Linux, on which a user can't count to be changed.

`tcp_no_metrics_save` is not the default: without it a connection starts from what an earlier one learned, and a
measurement would depend on those before it.
"""
DEVICE = "wan0"
DEVICE_QUEUE_PACKETS = 10_000
"""Packets that a device holds until they are read: never the limit, the emulated queue is."""

_libc = ctypes.CDLL(None, use_errno=True)
_CLONE_NEWNET = 0x40000000
_TUNSETIFF, _TUNSETOFFLOAD = 0x400454CA, 0x400454D0
_IFF_TUN, _IFF_NO_PI, _IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
_TUN_F_CSUM, _TUN_F_TSO4 = 0x01, 0x02
_PR_SET_PDEATHSIG = 1


class Host:
    """One end of a link: a network namespace with a TUN device, and the processes that are started in it."""

    def __init__(self, index: int, sysctls: Mapping[str, str], congestion: str) -> None:
        """Make the namespace and its device.

        Raises:
            OSError: This process isn't root, or the machine has no TUN devices or no `ip` command.
            CalledProcessError: The kernel has no such congestion control.
        """
        self.name = chr(ord("a") + index)
        self.address = str(ipaddress.ip_network(NETWORK)[index + 1])
        """Its IPv4 address, which the link's other hosts reach."""
        with _restored_namespace():
            _check(_libc.unshare(_CLONE_NEWNET), "unshare needs root")
            self._namespace = _open_namespace()
            self.device = _make_device(self.address, congestion)
            for name, value in sysctls.items():
                Path("/proc/sys", name).write_text(value)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Put the calling thread into this host: sockets and processes made inside belong to it for good."""
        with _restored_namespace():
            _check(_libc.setns(self._namespace, _CLONE_NEWNET), "setns")
            yield

    def popen(self, command: Sequence[str], **options: Any) -> "subprocess.Popen[Any]":
        """Start a command in this host; `options` are those of `subprocess.Popen`."""
        with self.entered():
            return subprocess.Popen(command, **options)

    def run(self, command: Sequence[str], **options: Any) -> "subprocess.CompletedProcess[Any]":
        """Run a command in this host to its end; `options` are those of `subprocess.run`."""
        with self.entered():
            return subprocess.run(command, **options)

    def set(self, name: str, value: str) -> None:
        """Set one of this host's sysctls, such as "net/ipv4/tcp_wmem", for connections made from then on."""
        with self.entered():
            Path("/proc/sys", name).write_text(value)

    def close(self) -> None:
        """Let go of the namespace; it is gone when its last process is."""
        os.close(self._namespace)


class Link:
    """A link, its hosts and the process that carries its packets, from entering the context to leaving it."""

    def __init__(
        self,
        shape: LinkShape,
        *,
        hosts: int = 2,
        sysctls: Mapping[str, str] | None = None,
        congestion: str = "cubic",
    ) -> None:
        """Describe the link; nothing happens before it is entered.

        Args:
            shape: Rate, delay, queue and loss of every link.
            hosts: How many there are: the hub, and one for each link.
            sysctls: Of every host, over Linux's defaults: {"net/ipv4/tcp_slow_start_after_idle": "0"}.
            congestion: Congestion control of every host's TCP: "cubic", Linux's default, or "bbr", "reno".
        """
        self.hosts: list[Host] = []
        self.carried: dict[str, Any] = {}
        """What was carried, once the link is left: bytes and lost segments up (to the hub) and down, CPU seconds."""
        self._shape = shape
        self._num_hosts = hosts
        self._sysctls = LINUX_DEFAULTS | dict(sysctls or {})
        self._congestion = congestion
        self._carrier: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        self.hosts = [Host(index, self._sysctls, self._congestion) for index in range(self._num_hosts)]
        devices = [host.device for host in self.hosts]
        settings = {"devices": devices, "network": NETWORK, "shape": asdict(self._shape)}
        command = [sys.executable, str(Path(__file__).with_name("link_carrier.py")), json.dumps(settings)]
        self._carrier = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, pass_fds=devices
        )
        for device in devices:
            os.close(device)
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._carrier is not None:
            totals, _ = self._carrier.communicate()  # closes its standard input first
            self.carried = json.loads(totals) if totals else {}
        for host in self.hosts:
            host.close()


def _make_device(address: str, congestion: str) -> int:
    """A TUN device of the calling thread's namespace, up, with the address; its descriptor."""
    device = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", DEVICE.encode(), _IFF_TUN | _IFF_NO_PI | _IFF_VNET_HDR))
    # Super-packets of 64 KiB: a Python process can't carry 80 000 packets a second, but it can carry 2 000.
    fcntl.ioctl(device, _TUNSETOFFLOAD, _TUN_F_CSUM | _TUN_F_TSO4)
    length = ipaddress.ip_network(NETWORK).prefixlen
    # The sysctl refuses a namespace what the machine doesn't allow to everyone; a route's option asks nobody.
    setup = f"""
        link set lo up
        addr add {address}/{length} dev {DEVICE}
        link set {DEVICE} txqueuelen {DEVICE_QUEUE_PACKETS} up
        route replace {NETWORK} dev {DEVICE} src {address} congctl {congestion}
    """
    subprocess.run(["ip", "-batch", "-"], input=setup, text=True, check=True)  # noqa: S607 - wherever it is
    return device


@contextlib.contextmanager
def _restored_namespace() -> Iterator[None]:
    """Bring the calling thread back into the namespace it is in now."""
    before = _open_namespace()
    try:
        yield
    finally:
        _check(_libc.setns(before, _CLONE_NEWNET), "setns")
        os.close(before)


def _open_namespace() -> int:
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def add_shape_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a benchmark's command the options that describe a link."""
    parser.add_argument("--rate-mbit", type=float, help="of each direction; left out, no limit")
    parser.add_argument("--delay-ms", type=float, default=0.0, help="one way")
    parser.add_argument("--loss", type=float, default=0.0, help="probability that a segment is lost")
    parser.add_argument("--queue-bytes", type=int, help="that wait in front of the link at most")
    parser.add_argument("--queue-bdp", type=float, default=1.0, help="the same in bandwidth-delay products")
    parser.add_argument("--seed", type=int, default=0, help="of what is lost")


def shape_of(arguments: argparse.Namespace) -> LinkShape:
    """The link that the options describe.

    Raises:
        ValueError: One of them is out of range.
    """
    return LinkShape(
        rate_mbit=arguments.rate_mbit,
        delay_ms=arguments.delay_ms,
        loss=arguments.loss,
        queue_bytes=arguments.queue_bytes,
        queue_bdp=arguments.queue_bdp,
        seed=arguments.seed,
    )


def main() -> None:
    """Run a command in host b, with a server in host a if asked for, and exit with the command's status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shape_arguments(parser)
    parser.add_argument("--congestion", default="cubic", help="congestion control of both hosts, such as bbr")
    parser.add_argument("--server", help="a command for host a (10.77.0.1), ended after the other")
    parser.add_argument("command", nargs="+", help="the command for host b (10.77.0.2)")
    arguments = parser.parse_args()
    # A terminated link ends its commands on its way out; Python would not unwind on SIGTERM by itself.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    link = Link(shape_of(arguments), congestion=arguments.congestion)
    with link, contextlib.ExitStack() as stack:
        a, b = link.hosts
        if arguments.server:
            stack.enter_context(_ended(a, shlex.split(arguments.server)))
        status = stack.enter_context(_ended(b, arguments.command)).wait()
    print(json.dumps(link.carried), file=sys.stderr)
    sys.exit(status)


@contextlib.contextmanager
def _ended(host: Host, command: Sequence[str]) -> "Iterator[subprocess.Popen[Any]]":
    """A command in a host that ends with this process, however this process ends."""
    process = host.popen(command, preexec_fn=_die_with_parent)
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def _die_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main()
