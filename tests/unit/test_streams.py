"""Which streams stay open: the newest of each worker, and of members only."""

from paceline_server.streams import OpenStreams
from paceline_wire.errors import NotAMemberError, PacelineError, SupersededError
from paceline_wire.v1 import parameter_server_pb2 as pb


class FakeStream:
    """A stream that notes how it was ended."""

    def __init__(self, worker_id: str, incarnation: int = 1, index: int = 0) -> None:
        self.index = index
        self.worker = pb.Worker(worker_id=worker_id, incarnation=incarnation)
        self.ended: list[PacelineError] = []

    def end(self, error: PacelineError) -> None:
        """Note the error."""
        self.ended.append(error)

    async def drain(self) -> None:
        """End it."""
        self.end(PacelineError("drained"))


def test_a_newer_stream_of_a_worker_ends_the_older() -> None:
    """What the abandoned stream holds is free at once; others go on."""
    streams, older, other, newer = OpenStreams(), FakeStream("a"), FakeStream("b"), FakeStream("a")
    for stream in (older, other, newer):
        streams.add(stream)
    assert [type(error) for error in older.ended] == [SupersededError]
    assert "newer stream" in str(older.ended[0])
    assert not other.ended
    assert not newer.ended


def test_streams_of_other_indexes_go_on() -> None:
    """A worker's streams stand beside each other; each is superseded by the next of its own index only."""
    streams, first, second, newer = OpenStreams(), FakeStream("a"), FakeStream("a", index=1), FakeStream("a", index=1)
    for stream in (first, second, newer):
        streams.add(stream)
    assert len(second.ended) == 1
    assert not first.ended
    assert not newer.ended


def test_a_newer_incarnation_ends_all_streams() -> None:
    """Nothing is taken from an earlier start of a worker, whichever of its streams it would come by."""
    streams, newer = OpenStreams(), FakeStream("a", 2, index=1)
    older = [FakeStream("a", 1, index=index) for index in range(3)]
    for stream in (*older, newer):
        streams.add(stream)
    assert [len(stream.ended) for stream in older] == [1, 1, 1]
    assert not newer.ended
    streams.discard(older[1])
    streams.keep_only(lambda _: NotAMemberError("join again"))
    assert [len(stream.ended) for stream in (*older, newer)] == [1, 1, 1, 1]


def test_a_newer_incarnation_is_named() -> None:
    """A worker that was started again is told from one that connected again."""
    streams, older = OpenStreams(), FakeStream("a", 3)
    streams.add(older)
    streams.add(FakeStream("a", 4))
    assert "newer incarnation (4); this one (3) must stop" in str(older.ended[0])


def test_only_members_keep_their_streams() -> None:
    """Who is refused loses its stream, and is told why; others keep theirs."""
    streams = OpenStreams()
    staying, expired, superseded = FakeStream("a"), FakeStream("b"), FakeStream("c")
    for stream in (staying, expired, superseded):
        streams.add(stream)
    reasons = {"b": NotAMemberError("join again"), "c": SupersededError("must stop")}
    streams.keep_only(lambda worker: reasons.get(worker.worker_id))
    assert not staying.ended
    assert [type(error) for error in expired.ended] == [NotAMemberError]
    assert [type(error) for error in superseded.ended] == [SupersededError]


async def test_the_end_of_an_older_stream_does_not_hide_the_newer() -> None:
    """An abandoned stream that ends late leaves its successor among those that are drained."""
    streams, older, newer = OpenStreams(), FakeStream("a"), FakeStream("a")
    streams.add(older)
    streams.add(newer)
    streams.discard(older)
    await streams.drain()
    assert [str(error) for error in newer.ended] == ["drained"]
    streams.discard(newer)
    streams.keep_only(lambda _: NotAMemberError("join again"))
    assert len(newer.ended) == 1
