"""A loopback port whose connections lead to another address, and can be cut: what emulated and faulty links share."""

import asyncio
import socket
import struct
from abc import ABC, abstractmethod
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, NamedTuple, Self


class End(NamedTuple):
    """One end of a connection that is carried."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter


class ForwardedPort(ABC):
    """A listening port on loopback, while it is entered. Belongs to one event loop.

    Args:
        target_host: Where its connections lead.
        target_port: Likewise.
        chunk_bytes: The most that is read at once.
    """

    def __init__(self, target_host: str, target_port: int, chunk_bytes: int) -> None:
        self.num_accepted = 0
        self._target = (target_host, target_port)
        self._chunk_bytes = chunk_bytes
        self._server: asyncio.Server | None = None
        self._live: dict[asyncio.Task[None], list[asyncio.StreamWriter]] = {}

    @abstractmethod
    def _ways(self, near: End, far: End) -> tuple[Coroutine[Any, Any, None], Coroutine[Any, Any, None]]:
        """What carries the bytes of one connection, from near to far and back; far is the target's end.

        Each ends when its sender has half-closed and it has half-closed towards the receiver, and raises OSError if one
        side is lost.
        """

    @property
    def port(self) -> int:
        """The port to connect to, while it is entered."""
        if self._server is None:
            name = type(self).__name__
            raise RuntimeError(f"nothing is listening: use it as `async with {name}(...) as link`")
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    def cut(self) -> int:
        """Reset every live connection at both ends, losing what is under way; new ones are accepted as before.

        Returns:
            How many connections were cut.
        """
        cut, self._live = self._live, {}
        for task, writers in cut.items():
            for writer in writers:
                _reset(writer)
            task.cancel()
        return len(cut)

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, limit=self._chunk_bytes)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        tasks = list(self._live)
        self.cut()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._server is None:  # accepted while the port was being left
            _reset(writer)
            return
        self.num_accepted += 1
        # A task of our own: a stream server would log the one that it makes of a coroutine when `cut` cancels it.
        writers = [writer]
        self._live[asyncio.create_task(self._carry(End(reader, writer), writers))] = writers

    async def _carry(self, near: End, writers: list[asyncio.StreamWriter]) -> None:
        """Carry one connection's bytes until both ends have half-closed or one is lost."""
        try:
            far = End(*await asyncio.open_connection(*self._target, limit=self._chunk_bytes))
            writers.append(far.writer)
            async with asyncio.TaskGroup() as group:
                for way in self._ways(near, far):
                    group.create_task(way)
            for writer in writers:
                writer.close()
        except* OSError:  # one side is gone, or never was there: tell the other the same way
            for writer in writers:
                _reset(writer)
        finally:
            if (task := asyncio.current_task()) is not None:
                self._live.pop(task, None)


def _reset(writer: asyncio.StreamWriter) -> None:
    """Drop a connection with a TCP reset, so that its peer sees an error and not an orderly end."""
    if not writer.transport.is_closing():
        connection = writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
