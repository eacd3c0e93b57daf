"""A TCP proxy that cuts connections after a number of bytes, holds or slows a direction, and counts what it did."""

import contextlib
import socket
import struct
import threading
import time
from collections import deque
from types import TracebackType
from typing import Literal, Self

from integration.patience import PATIENCE_S

CHUNK_BYTES = 64 * 1024
SLOW_CHUNK_BYTES = 4 * 1024

Way = Literal["up", "down"]
"""Up is from the client to the server."""


class Proxy:
    """A listening port on loopback that leads to another; a context manager.

    Attributes:
        cuts: How often an armed cut has fired.
        carried: Bytes carried so far, each way.
    """

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self.cuts = 0
        self.carried = {"up": 0, "down": 0}
        self._target = (host, int(port))
        self._changed = threading.Condition()
        self._armed: dict[str, deque[int]] = {"up": deque(), "down": deque()}
        self._held: set[str] = set()
        self._limits: dict[str, float] = {}
        self._black_holes: set[tuple[str, tuple[socket.socket, socket.socket]]] = set()
        self._live: list[tuple[socket.socket, socket.socket]] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._threads = [threading.Thread(target=self._accept, daemon=True)]

    @property
    def address(self) -> str:
        """Where clients connect, "127.0.0.1:port"."""
        return f"127.0.0.1:{self._listener.getsockname()[1]}"

    def cut_after(self, num_bytes: int, way: Way) -> None:
        """Cut all connections, once, when so many further bytes have been carried that way.

        A cut that is armed while another still is begins to count when that one has fired.
        """
        with self._changed:
            self._armed[way].append(num_bytes)

    def hold(self, way: Way) -> None:
        """Carry nothing more that way until `release`."""
        with self._changed:
            self._held.add(way)

    def hold_present(self, way: Way) -> None:
        """Carry nothing more that way on the connections that there are; new ones are not held."""
        with self._changed:
            self._black_holes |= {(way, ends) for ends in self._live}

    def release(self, way: Way) -> None:
        """Carry what was held back."""
        with self._changed:
            self._held.discard(way)
            self._changed.notify_all()

    def limit(self, bytes_per_s: float, way: Way) -> None:
        """Carry no more than so much that way from now on, in small pieces, as a slow link does."""
        with self._changed:
            self._limits[way] = bytes_per_s

    def wait_until_carried(self, total_bytes: int, way: Way) -> None:
        """Wait until so many bytes have been carried that way in all."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.carried[way] >= total_bytes, PATIENCE_S), self.carried

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._changed:
            self._held.clear()
            self._black_holes.clear()
            self._cut_all()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(PATIENCE_S)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(self._target)
            except OSError:
                client.close()
                continue
            with self._changed:
                self._live.append((client, server))
            ways: tuple[tuple[Way, socket.socket, socket.socket], ...] = (
                ("up", client, server),
                ("down", server, client),
            )
            for way, source, sink in ways:
                thread = threading.Thread(target=self._carry, args=(way, source, sink, (client, server)), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _carry(
        self, way: Way, source: socket.socket, sink: socket.socket, ends: tuple[socket.socket, socket.socket]
    ) -> None:
        with contextlib.suppress(OSError):
            while chunk := source.recv(SLOW_CHUNK_BYTES if way in self._limits else CHUNK_BYTES):
                if way in self._limits:
                    time.sleep(len(chunk) / self._limits[way])
                with self._changed:
                    self._changed.wait_for(lambda: way not in self._held and (way, ends) not in self._black_holes)
                    armed = self._armed[way]
                    fires = bool(armed) and armed[0] <= len(chunk)
                    allowed = chunk[: armed[0]] if fires else chunk
                    sink.sendall(allowed)
                    self.carried[way] += len(allowed)
                    if fires:
                        armed.popleft()
                        self.cuts += 1
                        self._cut_all()
                    elif armed:
                        armed[0] -= len(chunk)
                    self._changed.notify_all()
                if fires:
                    return
            sink.shutdown(socket.SHUT_WR)

    def _cut_all(self) -> None:
        """Reset every live connection at both ends, as a dying router would; the condition is held."""
        for pair in self._live:
            for end in pair:
                with contextlib.suppress(OSError):
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    end.shutdown(socket.SHUT_RDWR)
                end.close()
        self._live.clear()
