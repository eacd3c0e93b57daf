"""What raw TCP moves over a link with a number of connections: the yardstick of everything else that crosses it.

python benchmarks/raw_tcp.py --rate-mbit 1000 --delay-ms 50 --connections 1 4
"""

import argparse
import json
import selectors
import socket
import struct
import subprocess
import sys
import time
from types import TracebackType
from typing import Any, Self

from link import Host, Link, add_shape_arguments, shape_of

PORT = 5201
CHUNK_BYTES = 256 * 1024
QUESTION = struct.Struct("!QQ")
"""A round, as the client asks for it on each connection: bytes that it sends, and bytes that it wants."""


class Connection:
    """One of a round's connections, without blocking: what it still has to send and to receive."""

    def __init__(self, connected: socket.socket, send_bytes: int, receive_bytes: int) -> None:
        connected.setblocking(False)
        self.socket = connected
        self.send_bytes = send_bytes
        self.receive_bytes = receive_bytes

    @property
    def events(self) -> int:
        """What it waits for; 0: nothing, it is done."""
        waits = selectors.EVENT_WRITE if self.send_bytes else 0
        return waits | (selectors.EVENT_READ if self.receive_bytes else 0)

    def advance(self, ready: int, chunk: memoryview) -> None:
        """Send and receive what the socket takes and has."""
        if ready & selectors.EVENT_WRITE:
            self.send_bytes -= self.socket.send(chunk[: min(self.send_bytes, len(chunk))])
        if ready & selectors.EVENT_READ:
            received = self.socket.recv_into(chunk, min(self.receive_bytes, len(chunk)))
            if not received:
                raise ConnectionError("the peer closed a connection in the middle of a round")
            self.receive_bytes -= received


def move(connections: list[Connection]) -> None:
    """Send and receive on all connections at once until none has anything left."""
    chunk = memoryview(bytearray(CHUNK_BYTES))
    with selectors.DefaultSelector() as selector:
        for connection in connections:
            if connection.events:
                selector.register(connection.socket, connection.events, connection)
        while selector.get_map():
            for key, ready in selector.select():
                connection = key.data
                connection.advance(ready, chunk)
                if not connection.events:
                    selector.unregister(connection.socket)
                elif connection.events != key.events:
                    selector.modify(connection.socket, connection.events, connection)


def serve(address: str) -> None:
    """Take one client's connections, and answer its rounds on them until it closes them."""
    with socket.create_server((address, PORT)) as listener:
        print("listening", flush=True)
        first, _ = listener.accept()
        sockets = [first, *(listener.accept()[0] for _ in range(_read(first, 1)[0] - 1))]
    while True:
        questions = [_read(each, QUESTION.size) for each in sockets]
        if not all(questions):
            return
        asked = [QUESTION.unpack(question) for question in questions]
        move([Connection(each, down, up) for each, (up, down) in zip(sockets, asked, strict=True)])
        for each in sockets:
            each.setblocking(True)
            each.sendall(b"!")


class Client:
    """Connections that stay open, for round after round; a context manager that closes them."""

    def __init__(self, address: str, num_connections: int) -> None:
        """Connect; there must be 1 to 255 connections."""
        self._sockets = [socket.create_connection((address, PORT))]
        self._sockets[0].sendall(bytes([num_connections]))
        self._sockets += [socket.create_connection((address, PORT)) for _ in range(num_connections - 1)]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for each in self._sockets:
            each.close()

    def round(self, up_bytes: int, down_bytes: int) -> float:
        """Seconds that so many bytes take, both ways at once, until all are confirmed."""
        began_s = time.monotonic()
        up, down = up_bytes // len(self._sockets), down_bytes // len(self._sockets)
        for each in self._sockets:
            each.setblocking(True)
            each.sendall(QUESTION.pack(up, down))
        move([Connection(each, up, down) for each in self._sockets])
        for each in self._sockets:
            each.setblocking(True)
            _read(each, 1)
        return time.monotonic() - began_s


def raw_rounds(
    server: Host, client: Host, num_connections: int, up_bytes: int, down_bytes: int, rounds: int
) -> list[float]:
    """Seconds of rounds of raw TCP between two hosts, over fresh connections."""
    here = [sys.executable, __file__]
    with server.popen([*here, "--serve", server.address], stdout=subprocess.PIPE, text=True) as serving:
        try:
            assert serving.stdout is not None
            serving.stdout.readline()
            asking = [*here, "--ask", server.address, "--connections", str(num_connections)]
            asking += ["--up-bytes", str(up_bytes), "--down-bytes", str(down_bytes), "--rounds", str(rounds)]
            answer = client.run(asking, stdout=subprocess.PIPE, text=True, check=True).stdout
        finally:
            serving.terminate()
    seconds: list[float] = json.loads(answer)
    return seconds


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shape_arguments(parser)
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--up-bytes", type=int, default=0)
    parser.add_argument("--down-bytes", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--ask", help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve)
        return
    sizes = (arguments.up_bytes, arguments.down_bytes)
    if arguments.ask:
        with Client(arguments.ask, arguments.connections[0]) as client:
            print(json.dumps([client.round(*sizes) for _ in range(arguments.rounds)]))
        return
    results = [_measured(arguments, count, *sizes) for count in arguments.connections]
    if arguments.json:
        print(json.dumps(results))
        return
    for result in results:
        rates = ", ".join(f"{rate:.0f}" for rate in result["mbit_per_s"])
        print(
            f"{result['connections']} connections: {rates} Mbit/s by round; carrier {result['carrier_cpu_s']:.1f} CPU s"
        )


def _measured(arguments: argparse.Namespace, connections: int, up_bytes: int, down_bytes: int) -> dict[str, Any]:
    with Link(shape_of(arguments)) as link:
        seconds = raw_rounds(link.hosts[0], link.hosts[1], connections, up_bytes, down_bytes, arguments.rounds)
    rates = [(up_bytes + down_bytes) * 8 / 1e6 / each for each in seconds]
    cpu_s = link.carried["cpu_s"]
    return {"connections": connections, "seconds": seconds, "mbit_per_s": rates, "carrier_cpu_s": cpu_s}


def _read(connected: socket.socket, num_bytes: int) -> bytes:
    """Exactly so many bytes; none when the peer has closed the connection."""
    parts = b""
    while len(parts) < num_bytes:
        piece = connected.recv(num_bytes - len(parts))
        if not piece:
            return b""
        parts += piece
    return parts


if __name__ == "__main__":
    main()
