"""What a shard holds for payloads under way is bounded, and whatever a worker leaves behind is freed."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import grpc
import pytest
import torch

import paceline
import paceline_server
from integration.patience import PATIENCE_S, wait_until
from integration.raw import RawStream, RawWorker, fp32_bytes, payload_of
from paceline_server.buffers import MIB
from paceline_server.processes import ShardProcesses
from paceline_server.settings import config_from_mapping
from paceline_wire import codecs
from paceline_wire.transfer import pieces
from paceline_wire.v1 import parameter_server_pb2 as pb
from resident import peak_resident_mib, resident_mib

NUM_WORKERS = 8
FRAGMENT = 1024 * 1024
FRAGMENT_MIB = 4
"""In fp32."""
NUM_FRAGMENTS = 8
MODEL_MIB = 2 * FRAGMENT_MIB * NUM_FRAGMENTS
"""8 bytes per parameter: w and u."""

PROCESS_MIB = 160
"""What a server's process takes with its first pushes, whatever their size: threads' stacks, code pages of libraries
and scratch of up to 4 MiB a thread, about 25 as measured, and 111 for the compiler of the codecs' loops (190 where they
are not in its cache yet)."""

STREAM_MIB = 10
"""What gRPC may hold of a stream that stands still: the message being written, in up to 4 copies (piece, message,
bytes, slice), the one being read, and what the worker has sent ahead within HTTP/2's window, 4 MiB on a slow link.
About 6 was measured. It depends neither on the size nor on the number of the fragments."""

ZEROS = fp32_bytes(torch.zeros(FRAGMENT))
ZEROS_PAYLOAD = payload_of(ZEROS)
SHORT_ZEROS = codecs.encode(codecs.codec("int4"), torch.zeros(FRAGMENT)).numpy().tobytes()
SHORT_ZEROS_PAYLOAD = payload_of(SHORT_ZEROS, pb.CODEC_INT4)
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@contextmanager
def shard(**changes: Any) -> Iterator[tuple[str, int, float]]:
    """A shard of NUM_FRAGMENTS fragments: its address, its process, and the MiB it had resident before the model."""
    exchange = {"uplink": "fp32", "downlink": "fp32", "fragment_elements": FRAGMENT} | changes.pop("exchange", {})
    schedule = {"quota": NUM_WORKERS, "lease_s": 3600} | changes.pop("schedule", {})
    mapping = {"listen": "127.0.0.1:0", "schedule": schedule, "exchange": exchange, **changes}
    shards = ShardProcesses(config_from_mapping(mapping))
    shards.start()
    try:
        address, pid = f"127.0.0.1:{shards.ports[0]}", shards.processes[0].pid
        with RawWorker(address, "first") as first:
            first.describe()
            before_mib = resident_mib(pid)
            first.stub.Initialize(upload(first))
        yield address, pid, before_mib
    finally:
        shards.stop()


def upload(worker: RawWorker) -> Iterator[pb.InitializeRequest]:
    """First parameters of zeros."""
    tensor = pb.Tensor(name="x", shape=[NUM_FRAGMENTS * FRAGMENT], dtype=pb.DTYPE_FLOAT32, role=pb.ROLE_PARAMETER)
    yield pb.InitializeRequest(start=worker.initialize_start(pb.Manifest(tensors=[tensor], fragment_elements=FRAGMENT)))
    for fragment in range(NUM_FRAGMENTS):
        announced: pb.InitializeFragment | None = pb.InitializeFragment(fragment=fragment, payload=ZEROS_PAYLOAD)
        for piece in pieces(torch.zeros(4 * FRAGMENT, dtype=torch.uint8)):
            yield pb.InitializeRequest(fragment=announced, data=bytes(piece))
            announced = None


def push_in_pieces(
    stream: RawStream, fragment: int, *, num_bytes: int = len(ZEROS), inner_step_us: int | None = None
) -> None:
    """Send a first push of zeros in fp32, or its first bytes, in messages of a MiB."""
    announced: pb.Push | None = pb.Push(
        fragment=fragment, seq=1, base_bin=0, payload=ZEROS_PAYLOAD, inner_step_us=inner_step_us
    )
    for start in range(0, num_bytes, MIB):
        stream.send(pb.ExchangeRequest(push=announced, data=ZEROS[start : min(start + MIB, num_bytes)]))
        announced = None


def push_at_once(stream: RawStream, fragment: int) -> None:
    """Send a first push of zeros in int4, an eighth of the size of its answer."""
    announced = pb.Push(fragment=fragment, seq=1, base_bin=0, payload=SHORT_ZEROS_PAYLOAD)
    stream.send(pb.ExchangeRequest(push=announced, data=SHORT_ZEROS))


@contextmanager
def links(address: str, rate_mbit: float) -> Iterator[list[str]]:
    """A link of its own to the shard for each worker."""
    command = [sys.executable, "-m", "paceline.relay", "--target", address, "--links", str(NUM_WORKERS)]
    with subprocess.Popen(
        [*command, "--rate-mbit", str(rate_mbit)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as relay:
        assert relay.stdin is not None
        assert relay.stdout is not None
        yield [f"127.0.0.1:{port}" for port in json.loads(relay.stdout.readline())["ports"]]
        relay.stdin.close()
        relay.wait(PATIENCE_S)


def pushed_by_all(
    addresses: Sequence[str], push: Callable[[RawStream, int], None], meanwhile: Callable[[], None]
) -> list[set[int]]:
    """Let a worker at each address push every fragment, and then, after `meanwhile`, read its answers."""
    with ExitStack() as stack:
        workers = [stack.enter_context(RawWorker(address, f"worker-{n}")) for n, address in enumerate(addresses)]
        for worker in workers:
            worker.join()
        streams = [stack.enter_context(worker.exchange()) for worker in workers]
        for fragment in range(NUM_FRAGMENTS):
            for stream in streams:
                push(stream, fragment)
        meanwhile()
        with ThreadPoolExecutor(NUM_WORKERS) as threads:
            return list(threads.map(answers, streams))


def answers(stream: RawStream) -> set[int]:
    """Read an update of every fragment: which they were."""
    return {stream.update()[0].fragment for _ in range(NUM_FRAGMENTS)}


@linux
@pytest.mark.parametrize("reading", ["late", "slowly"])
def test_slow_workers_do_not_fill_the_memory(reading: str) -> None:
    """A shard holds its model, its buffer and what gRPC holds, and every worker gets all its answers in the end.

    Eight workers on slow links push everything, and read only once the shard has had to wait; or answers, eight times
    the size of the pushes, pile up. Without a bound the shard held 295 to 363 MiB in these cases, with it 136 to 155.
    """
    buffer_mib = 32
    with (
        shard(exchange={"buffer_mib": buffer_mib}) as (address, pid, before_mib),
        links(address, rate_mbit=100) as addresses,
        RawWorker(address) as observer,
    ):

        def many_are_applied() -> bool:
            # So many at the least, and their answers are decided, before the streams stop reading.
            return observer.status().pushes_applied >= 4 * NUM_WORKERS

        if reading == "late":
            answered = pushed_by_all(addresses, push_in_pieces, lambda: wait_until(many_are_applied))
        else:
            answered = pushed_by_all(addresses, push_at_once, lambda: None)
        grown_mib = peak_resident_mib(pid) - before_mib
    assert answered == [set(range(NUM_FRAGMENTS))] * NUM_WORKERS
    assert grown_mib <= MODEL_MIB + buffer_mib + PROCESS_MIB + STREAM_MIB * NUM_WORKERS


def test_a_new_stream_frees_what_the_abandoned_one_holds() -> None:
    """Half a push fills the buffer; it is dropped when its worker connects again, and others have their turn."""
    with (
        shard(exchange={"buffer_mib": 1}) as (address, _, _),
        RawWorker(address, "abandons") as abandons,
        RawWorker(address, "waits") as waits,
    ):
        abandons.join()
        waits.join()
        with abandons.exchange() as abandoned, waits.exchange() as waiting:
            abandon_half_a_push(abandons, abandoned)
            push_in_pieces(waiting, 1)
            with abandons.exchange() as resumed:
                end = abandoned.end()
                assert (end.error, end.code) == ("SupersededError", grpc.StatusCode.ABORTED)
                assert waiting.update()[0].fragment == 1
                push_in_pieces(resumed, 0)
                assert resumed.update()[0].fragment == 0


def test_a_lease_that_runs_out_frees_what_its_worker_holds() -> None:
    """Half a push fills the buffer; its worker says nothing more, and others have their turn once its lease is over."""

    async def exchange(address: str) -> None:
        async with paceline.connect(address, worker_id="waits") as client:
            base = await client.fetch()
            await client.exchange(base.tensors, base)

    with (
        shard(exchange={"buffer_mib": 1}, schedule={"lease_s": 2.0}) as (address, _, _),
        RawWorker(address, "vanishes") as vanishes,
    ):
        vanishes.join()
        with vanishes.exchange() as abandoned:
            abandon_half_a_push(vanishes, abandoned)
            end = abandoned.end()
            assert (end.error, end.code) == ("NotAMemberError", grpc.StatusCode.FAILED_PRECONDITION)
            asyncio.run(exchange(address))


def abandon_half_a_push(worker: RawWorker, stream: RawStream) -> None:
    """Send half a push, and wait until the shard has begun to receive it, which the speed that it reports shows."""
    push_in_pieces(stream, 0, num_bytes=len(ZEROS) // 2, inner_step_us=1000)

    def begun() -> bool:
        members = {member.worker_id: member for member in worker.status().members}
        name = worker.worker.worker_id
        return name not in members or members[name].inner_step_us == 1000

    wait_until(begun)


@linux
def test_streams_that_end_with_an_error_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Damaged pushes, half pushes and fetches that are broken off do not add up, though errors hold on to frames."""
    # Or the compiler of the codecs' loops would arrive at some time while memory is measured.
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")
    rounds = 20
    with shard(schedule={"quota": 1}) as (address, pid, _), RawWorker(address, "breaks") as worker:
        worker.join()
        for number in range(2 * rounds):
            if number == rounds:
                before_mib = resident_mib(pid)
            break_a_push(worker)
            break_off_a_fetch(worker)
        grown_mib = resident_mib(pid) - before_mib
        assert worker.status().pushes_applied == 0
    # Had each round left a push or a fragment, it would be 20 of them, and 20 MiB had it left a message.
    assert grown_mib <= 2 * FRAGMENT_MIB


def break_a_push(worker: RawWorker) -> None:
    """Send a push with a wrong checksum, to the end of its stream."""
    damaged = pb.Payload(codec=ZEROS_PAYLOAD.codec, num_bytes=len(ZEROS), crc32=1)
    with worker.exchange() as stream:
        announced: pb.Push | None = pb.Push(fragment=0, seq=1, base_bin=0, payload=damaged)
        for start in range(0, len(ZEROS), MIB):
            stream.send(pb.ExchangeRequest(push=announced, data=ZEROS[start : start + MIB]))
            announced = None
        assert stream.end().error == "DamagedPayloadError"


def break_off_a_fetch(worker: RawWorker) -> None:
    """Fetch everything, and cancel after the first message."""
    call = worker.stub.Fetch(pb.FetchRequest(codec=pb.CODEC_FP32), timeout=PATIENCE_S)
    assert next(call).data
    call.cancel()


def test_a_barrier_is_exact_however_small_the_buffer() -> None:
    """Answers that were decided without room are encoded later: a barrier's values do not change in between."""
    config = {
        "outer": {"lr": 1.0, "momentum": 0.0},
        "schedule": {"kind": "barrier", "quota": 2},
        "exchange": {"uplink": "fp32", "downlink": "fp32", "fragment_elements": FRAGMENT // 2, "buffer_mib": 1},
    }
    first = {"x": torch.arange(2.0 * FRAGMENT)}

    async def work(address: str, step: float) -> list[float]:
        """Push a step, three times; by how much the parameters moved each time."""
        async with paceline.connect(address, worker_id=f"worker-{step}") as client:
            await client.initialize(first)
            base, moved = await client.fetch(), []
            for _ in range(3):
                newer = await client.exchange({"x": torch.full_like(first["x"], step)}, base)
                distances = torch.unique(base.tensors["x"] - newer.tensors["x"])
                moved.append(distances.item())
                base = newer
            return moved

    async def all_work(address: str) -> list[list[float]]:
        return list(await asyncio.gather(work(address, 2.0), work(address, 4.0)))

    with paceline_server.local(config) as address:
        assert asyncio.run(all_work(address)) == [[3.0] * 3] * 2
