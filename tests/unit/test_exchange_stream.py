"""A stream's answers are sent in order, and none holds the room that one before it waits for."""

import asyncio
from collections.abc import AsyncIterator

import pytest
import torch

from integration.patience import PATIENCE_S, wait_until_async
from integration.raw import fp32_bytes, payload_of
from paceline_server.buffers import Buffers
from paceline_server.config import ServerConfig
from paceline_server.config_limits import LimitsConfig
from paceline_server.construction import build_shard
from paceline_server.engine import Engine
from paceline_server.exchange import ExchangeStream
from paceline_server.held import Form
from paceline_server.journal import NoJournal
from paceline_server.ledger import Answer
from paceline_server.received import ReceivedPush
from paceline_server.security.limits import MAX_PROCESSING, Allowance
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


async def test_pushes_of_an_identity_wait_for_its_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over all of its streams: while as many are processed as may be, the next one waits, and nothing more is read."""
    engine = await begun()
    allowance = Allowance("a", LimitsConfig())
    for _ in range(MAX_PROCESSING):
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
