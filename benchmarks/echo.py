"""The yardsticks of the exchange benchmark: the same bytes over raw TCP, and in a bare grpc.aio stream.

Each has a server process of its own and does nothing with the bytes; both directions are busy together.

python benchmarks/echo.py tcp|grpc        serves, and prints its port
"""

import asyncio
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

import grpc.aio
import uvloop

from paceline_wire.limits import MAX_MESSAGE_BYTES
from paceline_wire.memory import keep_large_buffers
from paceline_wire.transfer import MESSAGE_BYTES

METHOD = "/bare/Stream"
QUESTION = struct.Struct("!QQ")
"""A round over raw TCP, as the client asks for it: bytes that it sends, and bytes that it wants."""


class EchoServer:
    """A server process; a context manager that ends it.

    Args:
        kind: "tcp" or "grpc".

    Attributes:
        process: It.
        port: Where it listens, on loopback.
    """

    def __init__(self, kind: str) -> None:
        self.process = subprocess.Popen([sys.executable, __file__, kind], stdout=subprocess.PIPE, text=True)
        self.port = int(self.process.stdout.readline()) if self.process.stdout is not None else 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.terminate()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


def raw_round(connection: socket.socket, up: int, down: int) -> float:
    """Seconds in which a connection carries so many bytes each way."""
    connection.sendall(QUESTION.pack(up, down))
    began_s = time.perf_counter()
    _move(connection, up, down)
    return time.perf_counter() - began_s


async def bare_round(call: Any, up: int, down: int) -> float:
    """Seconds in which a stream of `METHOD`, opened with `metadata`, carries so many bytes each way."""
    piece = bytes(MESSAGE_BYTES)

    async def send() -> None:
        sent = 0
        while sent < up:
            part = min(MESSAGE_BYTES, up - sent)
            await call.write(piece[:part])
            sent += part

    async def receive() -> None:
        received = 0
        while received < down:
            received += len(await call.read())

    began_s = time.perf_counter()
    await asyncio.gather(send(), receive())
    return time.perf_counter() - began_s


def metadata(up: int, down: int) -> tuple[tuple[str, str], ...]:
    """What opens a bare stream whose rounds carry so many bytes."""
    return (("up", str(up)), ("down", str(down)))


def options() -> list[tuple[str, int]]:
    """Channel options of both sides."""
    return [
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ]


def _move(connection: socket.socket, send_bytes: int, receive_bytes: int) -> None:
    def send() -> None:
        piece, sent = memoryview(bytes(MESSAGE_BYTES)), 0
        while sent < send_bytes:
            sent += connection.send(piece[: send_bytes - sent])

    sending = threading.Thread(target=send)
    sending.start()
    buffer, received = bytearray(MESSAGE_BYTES), 0
    while received < receive_bytes:
        num_bytes = connection.recv_into(buffer, min(len(buffer), receive_bytes - received))
        if not num_bytes:
            raise ConnectionError("the peer closed the connection in the middle of a round")
        received += num_bytes
    sending.join()


def _serve_tcp() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        connection, _ = listener.accept()
        with connection:
            while len(question := connection.recv(QUESTION.size, socket.MSG_WAITALL)) == QUESTION.size:
                up, down = QUESTION.unpack(question)
                _move(connection, down, up)


async def _serve_grpc() -> None:
    keep_large_buffers()

    async def stream(messages: AsyncIterator[bytes], context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        piece = bytes(MESSAGE_BYTES)
        asked = dict(context.invocation_metadata() or ())
        up, down = int(asked["up"]), int(asked["down"])
        received = sent = 0
        async for message in messages:
            received += len(message)
            # As much of a round's answer as of its question: both directions are busy together.
            while sent * up < received * down:
                part = min(MESSAGE_BYTES, down - sent)
                await context.write(piece[:part])
                sent += part
            if received == up:
                received = sent = 0

    handler = grpc.method_handlers_generic_handler("bare", {"Stream": grpc.stream_stream_rpc_method_handler(stream)})
    server = grpc.aio.server(options=options())
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        if sys.argv[1] == "tcp":
            _serve_tcp()
        else:
            uvloop.run(_serve_grpc())
