"""The open exchange streams of a shard: at most one of each worker, and none of those who are no longer members."""

import asyncio
from collections.abc import Iterable
from typing import Protocol

from paceline_server.membership import Member
from paceline_wire.errors import NotAMemberError, PacelineError, SupersededError
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

    def keep_only(self, members: Iterable[Member]) -> None:
        """End the streams of all who are not among the members."""
        if not self._by_worker:
            return
        incarnations = {member.worker: member.incarnation for member in members}
        for worker_id, stream in list(self._by_worker.items()):
            newest = incarnations.get(worker_id)
            if newest is None:
                reason = "it left, or its lease ran out; join again"
                stream.end(NotAMemberError(f"worker {worker_id!r} is no longer a member: {reason}"))
            elif newest != stream.worker.incarnation:
                stream.end(_superseded(stream, newest))

    async def drain(self) -> None:
        """Drain all of them."""
        await asyncio.gather(*(stream.drain() for stream in self._by_worker.values()))


def _superseded(stream: Stream, newest: int) -> SupersededError:
    return SupersededError(
        f"worker {stream.worker.worker_id!r} has joined with a newer incarnation ({newest}); "
        f"this one ({stream.worker.incarnation}) must stop"
    )
