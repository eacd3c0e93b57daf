"""A stream's answers are sent in order, and none holds the room that one before it waits for."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
import torch

from integration.patience import PATIENCE_S, wait_until_async
from integration.raw import fp32_bytes, payload_of
from paceline_server.buffers import Buffers
from paceline_server.config import ServerConfig
from paceline_server.config_limits import LimitsConfig
from paceline_server.construction import build_shard
from paceline_server.engine import Engine
from paceline_server.exchange import MAX_PROCESSING, ExchangeStream
from paceline_server.held import Form
from paceline_server.journal import NoJournal
from paceline_server.ledger import Answer
from paceline_server.received import ReceivedPush
from paceline_server.security.limits import MAX_PROCESSING as TURNS_OF_AN_IDENTITY
from paceline_server.security.limits import Allowance
from paceline_server.updates import Encoded, Written
from paceline_wire import codecs
from paceline_wire.bulk import Bulk
from paceline_wire.manifest import Manifest, TensorSpec
from paceline_wire.transfer import outgoing
from paceline_wire.v1 import parameter_server_pb2 as pb

FP32 = codecs.codec("fp32")
ELEMENTS = 256
NUM_FRAGMENTS = 2
MANIFEST = Manifest(
    tensors=(TensorSpec(name="x", shape=(NUM_FRAGMENTS * ELEMENTS,), dtype="float32", role="parameter"),),
    fragment_elements=ELEMENTS,
)


async def begun() -> Engine:
    """A shard with its first parameters, and a worker `a`; its buffer has room for one update."""
    shard = build_shard(ServerConfig.model_validate({"exchange": {"fragment_elements": ELEMENTS}}), 0)
    engine = Engine(shard, NoJournal(), buffers=Buffers(1))
    await engine.begin_initialization(MANIFEST, 7)
    for index in range(NUM_FRAGMENTS):
        await engine.initialize_fragment(index, FP32, codecs.encode(FP32, torch.zeros(ELEMENTS)))
    shard.membership.join(0.0, "a", 1)
    return engine


async def test_an_answer_that_waits_for_room_is_not_kept_waiting_by_the_next() -> None:
    """The buffer has room for one update, and the second answer of the stream has it: both are sent all the same."""
    engine = await begun()
    worker = pb.Worker(worker_id="a", incarnation=1)
    sent: asyncio.Queue[int] = asyncio.Queue()

    async def write(message: Bulk[pb.ExchangeResponse]) -> None:
        sent.put_nowait(message.head.update.fragment)

    async def never() -> AsyncIterator[Bulk[pb.ExchangeRequest]]:
        await asyncio.Event().wait()
        yield Bulk(pb.ExchangeRequest(), b"")

    stream = ExchangeStream(engine, worker, FP32, write)
    room = engine.buffers.outgoing.try_reserve(4 * ELEMENTS)
    assert room is not None
    answers = [Answer(worker="a", incarnation=1, seq=1, bin=0) for _ in range(NUM_FRAGMENTS)]
    values = outgoing(FP32, torch.zeros(4 * ELEMENTS, dtype=torch.uint8))
    written = Written(form=Form(codec=FP32), values=values)
    stream.deliver(0, answers[0], None)
    stream.deliver(1, answers[1], Encoded(written=written, room=room))
    running = asyncio.create_task(stream.run(never()))
    assert [await asyncio.wait_for(sent.get(), 30) for _ in range(NUM_FRAGMENTS)] == [0, 1]
    assert engine.buffers.outgoing.num_waiting == 0
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert engine.buffers.outgoing.held_bytes == 0
    await engine.finish()


@dataclass(frozen=True)
class Streamed:
    """A shard with its parameters, and a stream of its one worker that pushes and then is silent."""

    engine: Engine
    stream: ExchangeStream
    running: "asyncio.Task[None]"

    @classmethod
    async def begun(cls, num_pushes: int, allowance: Allowance | None = None, *, turns_taken: int = 0) -> "Streamed":
        """Begin it; turns_taken of the stream's turns are not free."""
        shard = build_shard(ServerConfig.model_validate({"exchange": {"fragment_elements": ELEMENTS}}), 0)
        engine = Engine(shard, NoJournal())
        await engine.begin_initialization(MANIFEST, 7)
        for index in range(NUM_FRAGMENTS):
            await engine.initialize_fragment(index, FP32, codecs.encode(FP32, torch.zeros(ELEMENTS)))
        shard.membership.join(engine.clock(), "a", 1)
        stream = ExchangeStream(engine, pb.Worker(worker_id="a", incarnation=1), FP32, _drop, allowance=allowance)
        for _ in range(turns_taken):
            await stream._processing.acquire()
        return cls(engine, stream, asyncio.create_task(stream.run(_pushes(num_pushes))))

    async def ended(self) -> None:
        """Wait for its end, and see that it holds nothing."""
        await asyncio.gather(self.running, return_exceptions=True)
        await self.engine.finish()
        assert self.engine.buffers.incoming.held_bytes == 0
        assert self.engine.buffers.outgoing.held_bytes == 0


async def _drop(message: Bulk[pb.ExchangeResponse]) -> None:
    pass


async def _pushes(count: int) -> AsyncIterator[Bulk[pb.ExchangeRequest]]:
    values = outgoing(FP32, codecs.encode(FP32, torch.zeros(ELEMENTS)))
    for seq in range(1, count + 1):
        push = pb.Push(fragment=0, seq=seq, base_bin=0, payload=values.announced)
        yield Bulk(pb.ExchangeRequest(push=push), values.payload.numpy().tobytes())
    await asyncio.Event().wait()


async def test_a_stream_that_ends_while_it_waits_for_its_turn_does_not_hold_up_the_drain() -> None:
    """An identity's other streams have all of its turns; the drain must not wait for the one that is gone."""
    allowance = Allowance("a", LimitsConfig())
    while not allowance.processing.locked():
        await allowance.processing.acquire()
    streamed = await Streamed.begun(1, allowance)

    async def waits_for_its_turn() -> bool:
        return bool(allowance.processing._waiters)

    await wait_until_async(waits_for_its_turn)
    draining = asyncio.create_task(streamed.stream.drain())
    await asyncio.sleep(0)
    streamed.running.cancel()
    await asyncio.wait_for(draining, PATIENCE_S)
    await streamed.ended()


async def test_nothing_more_is_read_while_a_stream_is_drained() -> None:
    """A push that came whole is left for the server's return, and what follows it is not taken from the link."""
    streamed = await Streamed.begun(3, turns_taken=MAX_PROCESSING)

    async def waits_for_a_turn() -> bool:
        return bool(streamed.stream._processing._waiters)

    await wait_until_async(waits_for_a_turn)
    draining = asyncio.create_task(streamed.stream.drain())
    await asyncio.sleep(0)
    for _ in range(MAX_PROCESSING):
        streamed.stream._processing.release()
    await asyncio.wait_for(draining, PATIENCE_S)
    await streamed.ended()
    assert streamed.engine.shard.counters.bytes_received == 4 * ELEMENTS


async def test_pushes_of_an_identity_wait_for_its_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over all of its streams: while as many are processed as may be, the next one waits, and nothing more is read."""
    engine = await begun()
    allowance = Allowance("a", LimitsConfig())
    for _ in range(TURNS_OF_AN_IDENTITY):
        await allowance.processing.acquire()
    submitted, num_read, submit = asyncio.Event(), 0, engine.submit

    def submitting(push: ReceivedPush, stream: ExchangeStream) -> "asyncio.Task[None]":
        submitted.set()
        return submit(push, stream)

    async def pushes() -> AsyncIterator[Bulk[pb.ExchangeRequest]]:
        nonlocal num_read
        for seq in (1, 2):
            num_read += 1
            data = fp32_bytes(torch.zeros(ELEMENTS))
            push = pb.Push(fragment=0, seq=seq, payload=payload_of(data))
            yield Bulk(pb.ExchangeRequest(push=push), data)
        await asyncio.Event().wait()

    async def write(message: Bulk[pb.ExchangeResponse]) -> None:
        pass

    monkeypatch.setattr(engine, "submit", submitting)
    stream = ExchangeStream(engine, pb.Worker(worker_id="a", incarnation=1), FP32, write, allowance=allowance)
    running = asyncio.create_task(stream.run(pushes()))

    async def is_received() -> bool:
        return engine.shard.counters.bytes_received > 0

    await wait_until_async(is_received)
    for _ in range(10):
        await asyncio.sleep(0)
    assert (submitted.is_set(), num_read) == (False, 1)
    allowance.processing.release()
    await asyncio.wait_for(submitted.wait(), PATIENCE_S)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await engine.finish()
