"""The open exchange streams of a shard: at most one of each worker, and none of those who are no longer members."""

import asyncio
from collections.abc import Callable
from typing import Protocol

from paceline_wire.errors import PacelineError, SupersededError
from paceline_wire.v1 import parameter_server_pb2 as pb


class Stream(Protocol):
    """A worker's exchange stream, as far as its end is concerned."""

    @property
    def worker(self) -> pb.Worker:
        """Who is at the other end."""

    def end(self, error: PacelineError) -> None:
        """End it with an error, and free what it holds; does nothing if it has ended."""

    async def drain(self) -> None:
        """Answer what can be answered, and end it."""


class OpenStreams:
    """All of them. A stream whose worker is gone would hold its buffers until the network notices, or for ever."""

    def __init__(self) -> None:
        self._by_worker: dict[str, Stream] = {}

    def add(self, stream: Stream) -> None:
        """Take in a new stream; the one that its worker had before has been abandoned, and ends."""
        worker_id = stream.worker.worker_id
        older, self._by_worker[worker_id] = self._by_worker.get(worker_id), stream
        if older is None:
            return
        if older.worker.incarnation == stream.worker.incarnation:
            older.end(SupersededError(f"worker {worker_id!r} has opened a newer stream; this one has ended"))
        else:
            older.end(_superseded(older, stream.worker.incarnation))

    def discard(self, stream: Stream) -> None:
        """Forget a stream that has ended."""
        if self._by_worker.get(stream.worker.worker_id) is stream:
            del self._by_worker[stream.worker.worker_id]

    def keep_only(self, refusal: Callable[[pb.Worker], PacelineError | None]) -> None:
        """End the streams of all from whom nothing is taken any more; refusal says why, or None."""
        for stream in list(self._by_worker.values()):
            error = refusal(stream.worker)
            if error is not None:
                stream.end(error)

    async def drain(self) -> None:
        """Drain all of them."""
        await asyncio.gather(*(stream.drain() for stream in self._by_worker.values()))


def _superseded(stream: Stream, newest: int) -> SupersededError:
    return SupersededError(
        f"worker {stream.worker.worker_id!r} has joined with a newer incarnation ({newest}); "
        f"this one ({stream.worker.incarnation}) must stop"
    )
