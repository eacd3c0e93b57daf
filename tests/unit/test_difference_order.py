"""Differences follow one another, whatever is deferred, sent again or cut off: no bit is ever apart."""

import asyncio
import random
from collections.abc import AsyncIterator
from typing import Any

import torch

from integration.patience import PATIENCE_S, wait_until_async
from paceline.held import Held, follow
from paceline_server.buffers import Buffers
from paceline_server.construction import build_shard
from paceline_server.engine import Engine
from paceline_server.exchange import ExchangeStream
from paceline_server.held import Form
from paceline_server.journal import NoJournal
from paceline_server.ledger import Answer
from paceline_server.settings import config_from_mapping
from paceline_server.updates import Encoded
from paceline_wire import codecs
from paceline_wire.bulk import Bulk
from paceline_wire.manifest import Manifest, TensorSpec
from paceline_wire.transfer import Assembly, Receiver, outgoing
from paceline_wire.v1 import parameter_server_pb2 as pb

FRAGMENTS, SIZE = 3, 256
INT8 = codecs.codec("int8")


class CountingEngine(Engine):
    """A shard in operation that counts the answers that had to wait for room."""

    deferred = 0

    async def newest(self, index: int, answer: Answer, form: Form) -> tuple[Answer, Encoded]:
        """Count it."""
        self.deferred += 1
        return await super().newest(index, answer, form)


def engine(**schedule: Any) -> CountingEngine:
    """A shard of a few small fragments, with room for a few updates at once."""
    config = config_from_mapping(
        {"schedule": schedule, "outer": {"late_bins": 1000}, "exchange": {"fragment_elements": SIZE}}
    )
    shard = build_shard(config, 0)
    spec = TensorSpec(name="x", shape=(FRAGMENTS * SIZE,), dtype="float32", role="parameter")
    shard.begin_initialization(Manifest.of([spec], SIZE), 1)
    for fragment in range(FRAGMENTS):
        shard.initialize_fragment(fragment, torch.randn(SIZE, generator=torch.Generator().manual_seed(fragment)))
    for name in ("worker", "other"):
        shard.membership.join(0.0, name, 1)
    return CountingEngine(shard, NoJournal(), buffers=Buffers(6000))


class Worker:
    """A worker that pushes to a shard in this process, over streams that can be cut at any message.

    Attributes:
        whole: Updates that came whole.
        differences: Updates that came as differences.
    """

    def __init__(self, shard: Engine, moments: random.Random, name: str = "worker") -> None:
        self.name = name
        self.whole = self.differences = 0
        self._engine = shard
        self._moments = moments
        self._held: dict[int, Held] = {}
        self._seqs = [0] * FRAGMENTS
        self._bins = [0] * FRAGMENTS
        self._unanswered: dict[tuple[int, int], bytes] = {}
        self._answered = asyncio.Event()
        self._open()

    def push(self, fragment: int) -> None:
        """Push something new."""
        self._seqs[fragment] += 1
        values = torch.randn(SIZE, generator=torch.Generator().manual_seed(self._moments.randrange(1 << 30)))
        self._unanswered[fragment, self._seqs[fragment]] = codecs.encode(INT8, values).numpy().tobytes()
        self._send(fragment, self._seqs[fragment])

    def push_again(self, fragment: int) -> None:
        """Push what was pushed last once more, answered or not."""
        seq = self._seqs[fragment]
        if seq:
            self._unanswered.setdefault((fragment, seq), bytes(INT8.encoded_bytes(SIZE)))
            self._send(fragment, seq)

    async def cut(self) -> None:
        """Lose the connection and all that is on its way, and resume on another one."""
        await self.close()
        self._open()
        for fragment, seq in sorted(self._unanswered, key=lambda each: each[1]):
            self._send(fragment, seq)

    async def answered(self, but: int = 0) -> None:
        """Wait until all is answered but so many pushes."""
        while len(self._unanswered) > but:
            self._answered.clear()
            async with asyncio.timeout(PATIENCE_S):
                answered = asyncio.create_task(self._answered.wait())
                await asyncio.wait({answered, *self._connection}, return_when=asyncio.FIRST_COMPLETED)
            assert not [task.exception() for task in self._connection if task.done()]

    async def close(self) -> None:
        """End the connection."""
        for task in self._connection:
            task.cancel()
        await asyncio.gather(*self._connection, return_exceptions=True)

    def holds(self, fragment: int) -> torch.Tensor:
        """What it holds."""
        return self._held[fragment].values

    def _open(self) -> None:
        self._requests = asyncio.Queue[Bulk[pb.ExchangeRequest]]()
        responses = asyncio.Queue[Bulk[pb.ExchangeResponse]](maxsize=2)
        stream = ExchangeStream(self._engine, pb.Worker(worker_id=self.name, incarnation=1), INT8, responses.put)
        self._connection = {
            asyncio.create_task(stream.run(self._messages(self._requests))),
            asyncio.create_task(self._receive(responses)),
        }

    async def _messages(
        self, requests: "asyncio.Queue[Bulk[pb.ExchangeRequest]]"
    ) -> AsyncIterator[Bulk[pb.ExchangeRequest]]:
        while True:
            yield await requests.get()

    def _send(self, fragment: int, seq: int) -> None:
        payload = codecs.payload_tensor(self._unanswered[fragment, seq])
        held = self._held.get(fragment)
        push = pb.Push(
            fragment=fragment,
            seq=seq,
            base_bin=self._bins[fragment],
            payload=outgoing(INT8, payload).announced,
            held_version=None if held is None else held.version,
        )
        self._requests.put_nowait(Bulk(pb.ExchangeRequest(push=push), self._unanswered[fragment, seq]))

    async def _receive(self, responses: "asyncio.Queue[Bulk[pb.ExchangeResponse]]") -> None:
        receiver, announced = Receiver(), pb.Update()
        while True:
            message, data = await responses.get()
            for _ in range(self._moments.choice((0, 0, 5, 50))):  # a link on which several updates are on their way
                await asyncio.sleep(0)
            if message.HasField("update"):
                announced = message.update
                receiver.begin(announced.payload, SIZE)
            assembly = receiver.add(data)
            if assembly is not None:
                self._follow(announced, assembly)

    def _follow(self, announced: pb.Update, assembly: Assembly) -> None:
        fragment = announced.fragment
        followed = follow(announced, assembly.codec, assembly.payload(), (SIZE, 0), self._held.pop(fragment, None))
        assert followed.held is not None
        self._held[fragment], self._bins[fragment] = followed.held, announced.bin
        self.whole += not announced.HasField("difference_to")
        self.differences += announced.HasField("difference_to")
        self._unanswered.pop((fragment, announced.seq), None)
        self._answered.set()


def assert_same_bits(shard: Engine, worker: Worker, fragment: int) -> torch.Tensor:
    """What the shard keeps is what the worker holds; returns it."""
    holding = shard.holdings.of(worker.name)
    assert holding is not None
    kept = holding.by_fragment[fragment]
    assert torch.equal(kept.values.view(torch.int32), worker.holds(fragment).view(torch.int32))
    return kept.values


async def test_no_bit_is_apart_whatever_is_deferred_sent_again_or_cut_off() -> None:
    """Bursts of pushes to all fragments, some sent twice, over a link that is cut; the worker checks every version."""
    moments, shard = random.Random(0), engine(quota=1)
    worker, cuts = Worker(shard, moments), 30
    for _ in range(cuts):
        for _ in range(moments.randrange(1, 25)):
            fragment = moments.randrange(FRAGMENTS)
            worker.push(fragment) if moments.random() < 0.8 else worker.push_again(fragment)
            if moments.random() < 0.3:
                await asyncio.sleep(0)
        await worker.answered(but=moments.choice((0, 1, 3, 9)))
        await worker.cut()
    for fragment in range(FRAGMENTS):
        worker.push(fragment)
    await worker.answered()
    for fragment in range(FRAGMENTS):
        assert_same_bits(shard, worker, fragment)
    assert worker.differences > worker.whole > FRAGMENTS
    assert shard.deferred > 20
    await worker.close()
    await shard.finish()
    assert shard.buffers.outgoing.held_bytes == 0


async def test_two_answers_that_are_due_at_once_follow_one_another() -> None:
    """A bin that closes with two pushes of one worker to a fragment: the second answer is a difference to the first."""
    shard = engine(kind="barrier")
    shard.shard.membership.leave(0.0, "other", 1)
    worker = Worker(shard, random.Random(0))
    worker.push(0)
    await worker.answered()
    shard.shard.membership.join(0.0, "other", 2)
    worker.push(0)
    worker.push(0)

    async def both_wait() -> bool:
        return len(shard.shard.fragments[0].ledger.waiting.get("worker", ())) == 2

    await wait_until_async(both_wait)
    shard.shard.membership.leave(0.0, "other", 2)
    await shard.close_due_bins()
    await worker.answered()
    assert (worker.whole, worker.differences) == (1, 2)
    assert_same_bits(shard, worker, 0)
    await worker.close()
    await shard.finish()


async def test_workers_that_are_answered_alike_share_what_they_hold() -> None:
    """Under a barrier of two, one difference and one reference in memory serve both."""
    shard = engine(kind="barrier")
    workers = [Worker(shard, random.Random(0), name) for name in ("worker", "other")]
    for _ in range(3):
        for worker in workers:
            worker.push(0)
        for worker in workers:
            await worker.answered()
    first, second = (assert_same_bits(shard, worker, 0) for worker in workers)
    assert first is second
    assert [(worker.whole, worker.differences) for worker in workers] == [(1, 2), (1, 2)]
    for worker in workers:
        await worker.close()
    await shard.finish()
