"""Sends a shard's current values to whoever asks: one fragment at a time, each with room of its own."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable

from paceline_server.buffers import STALLED_S
from paceline_server.engine import Engine
from paceline_wire.bulk import Bulk
from paceline_wire.codecs.base import Codec
from paceline_wire.errors import UnavailableError
from paceline_wire.transfer import pieces
from paceline_wire.v1 import parameter_server_pb2 as pb

Write = Callable[[Bulk[pb.FetchResponse]], Awaitable[None]]
"""Sends one message; returns when gRPC has room for the next."""


async def send_fragments(engine: Engine, fragments: Iterable[int], codec: Codec, write: Write) -> None:
    """Send the current values of fragments, in order.

    Raises:
        InvalidInputError: A fragment does not live here.
        NotInitializedError: The shard's parameters are not complete.
        UnavailableError: The caller took nothing while others waited for the room.
    """
    sending = asyncio.current_task()
    stalled = False

    def end() -> None:
        nonlocal stalled
        stalled = True
        if sending is not None:
            sending.cancel()

    try:
        for index in fragments:
            await _send_fragment(engine, index, codec, write, end)
    except asyncio.CancelledError:
        if not stalled or sending is None or sending.uncancel() > 0:
            raise
        raise UnavailableError(
            f"the fetch was ended: no message passed for {STALLED_S:g} s while others waited for the room that it held"
        ) from None


async def _send_fragment(engine: Engine, index: int, codec: Codec, write: Write, end: Callable[[], None]) -> None:
    newest_bin, encoded = await engine.snapshot(index, codec)
    try:
        encoded.room.begin_transfer(end)
        announced: pb.FetchedFragment | None = pb.FetchedFragment(
            fragment=index, bin=newest_bin, payload=encoded.written.values.announced
        )
        for piece in pieces(encoded.written.values.payload):
            await write(Bulk(pb.FetchResponse(fragment=announced), piece))
            encoded.room.moved()
            announced = None
        engine.shard.counters.bytes_sent += encoded.written.values.payload.numel()
    finally:
        encoded.room.release()
