"""The open exchange streams of a shard: of each worker one for each index, and none of those who are no members."""

import asyncio
from collections.abc import Callable
from typing import Protocol

from paceline_wire.errors import PacelineError, SupersededError
from paceline_wire.v1 import parameter_server_pb2 as pb

MAX_STREAMS = 8
"""Streams that a worker may have open at once: with 4 MiB to send on each, enough for 1 Gbit/s over 0.2 s."""


class Stream(Protocol):
    """A worker's exchange stream, as far as its end is concerned."""

    @property
    def worker(self) -> pb.Worker:
        """Who is at the other end."""

    @property
    def index(self) -> int:
        """Which of the worker's streams it is, from 0."""

    def end(self, error: PacelineError) -> None:
        """End it with an error, and free what it holds; does nothing if it has ended."""

    async def drain(self) -> None:
        """Answer what can be answered, and end it."""


class OpenStreams:
    """All of them. A stream whose worker is gone would hold its buffers until the network notices, or for ever."""

    def __init__(self) -> None:
        self._by_worker: dict[str, dict[int, Stream]] = {}

    def add(self, stream: Stream) -> None:
        """Take in a new stream; the older one of its index was abandoned, and ends; so do all of other incarnations."""
        worker_id, incarnation = stream.worker.worker_id, stream.worker.incarnation
        streams = self._by_worker.setdefault(worker_id, {})
        for older in list(streams.values()):
            if older.worker.incarnation != incarnation:
                older.end(_superseded(older, incarnation))
                del streams[older.index]
        replaced, streams[stream.index] = streams.get(stream.index), stream
        if replaced is not None:
            replaced.end(SupersededError(f"worker {worker_id!r} has opened a newer stream; this one has ended"))

    def discard(self, stream: Stream) -> None:
        """Forget a stream that has ended."""
        streams = self._by_worker.get(stream.worker.worker_id, {})
        if streams.get(stream.index) is stream:
            del streams[stream.index]
        if not streams:
            self._by_worker.pop(stream.worker.worker_id, None)

    def keep_only(self, refusal: Callable[[pb.Worker], PacelineError | None]) -> None:
        """End the streams of all from whom nothing is taken any more; refusal says why, or None."""
        for stream in self._all():
            error = refusal(stream.worker)
            if error is not None:
                stream.end(error)

    async def drain(self) -> None:
        """Drain all of them."""
        await asyncio.gather(*(stream.drain() for stream in self._all()))

    def _all(self) -> list[Stream]:
        return [stream for streams in self._by_worker.values() for stream in streams.values()]


def _superseded(stream: Stream, newest: int) -> SupersededError:
    return SupersededError(
        f"worker {stream.worker.worker_id!r} has joined with a newer incarnation ({newest}); "
        f"this one ({stream.worker.incarnation}) must stop"
    )
