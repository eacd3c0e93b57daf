"""The emulated link with the kernel's own TCP: every byte arrives where it belongs, whatever is lost on the way."""

import hashlib
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from link import Host, Link
from link_queue import LinkShape

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not Path("/dev/net/tun").exists(), reason="needs root and /dev/net/tun"
)

DATA_BYTES = 3_000_000
SERVE = """
import hashlib, socket, sys
listener = socket.create_server((sys.argv[1], 7070))
print("listening", flush=True)
connected, digest = listener.accept()[0], hashlib.sha256()
while piece := connected.recv(65536):
    digest.update(piece)
print(digest.hexdigest(), flush=True)
"""
SEND = f"""
import random, socket, sys
connected = socket.create_connection((sys.argv[1], 7070), timeout=30)
connected.sendall(random.Random(1).randbytes({DATA_BYTES}))
"""


def received_digest(server: Host, client: Host) -> str:
    """The SHA-256 of what a server in one host gets from a client in another."""
    command = [sys.executable, "-c", SERVE, server.address]
    with server.popen(command, stdout=subprocess.PIPE, text=True) as serving:
        assert serving.stdout is not None
        assert serving.stdout.readline() == "listening\n"
        client.run([sys.executable, "-c", SEND, server.address], check=True, timeout=60)
        return str(serving.stdout.readline().strip())


def test_what_arrives_is_what_was_sent_though_segments_are_lost() -> None:
    """Super-packets arrive in parts, and TCP puts them together: to the hub, and through it to another host."""
    expected = hashlib.sha256(random.Random(1).randbytes(DATA_BYTES)).hexdigest()
    shape = LinkShape(rate_mbit=400, delay_ms=0.5, loss=0.005, queue_bytes=200_000)
    with Link(shape, hosts=3) as link:
        a, b, c = link.hosts
        assert received_digest(a, b) == expected
        assert received_digest(c, b) == expected
    assert link.carried["up"]["lost_segments"] > 0
    assert link.carried["up"]["bytes"] > 2 * DATA_BYTES
    assert link.carried["down"]["bytes"] > DATA_BYTES


def test_hosts_are_apart_from_the_machine() -> None:
    """A host sees the link and nothing else, and the calling thread comes back."""
    before = Path("/proc/thread-self/net/dev").read_text()
    with Link(LinkShape()) as link:
        with link.hosts[1].entered():
            inside = Path("/proc/thread-self/net/dev").read_text()
        assert {line.partition(":")[0].strip() for line in inside.splitlines()[2:]} == {"lo", "wan0"}
        assert Path("/proc/thread-self/net/dev").read_text().count(":") == before.count(":")
    assert link.carried["up"]["lost_segments"] == 0
