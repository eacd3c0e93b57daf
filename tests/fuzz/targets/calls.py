"""Every RPC's handler, fed as gRPC feeds it: messages as bytes, in any order, from a worker that may be a member.

Each input begins from the same state, so that an input alone leads to what it leads to. Beside some of them an honest
worker exchanges; what it is told must be, bit for bit, what it is told by a shard that took nothing but the pushes that
were accepted. The same is checked of the parameters, the momentum and the bookkeeping after every input.
"""

import asyncio
import random
import zlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

import grpc
import torch
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from fuzz.mutation import framed, frames, mutated_bytes, mutated_message
from fuzz.target import Target, ViolationError
from fuzz.targets.numbers import use_kernels_for_small_fragments
from paceline_server.admin import AdminService
from paceline_server.audit import AuditLog
from paceline_server.config import ServerConfig
from paceline_server.construction import build_shard
from paceline_server.engine import Engine
from paceline_server.hosted import FragmentCopy
from paceline_server.journal import Decided, NoJournal, Record
from paceline_server.live_configuration import LiveConfiguration
from paceline_server.membership import MembershipState
from paceline_server.operations import Operations
from paceline_server.service import ParameterServerService
from paceline_server.settings import config_from_mapping
from paceline_server.shard import Shard
from paceline_wire import PROTOCOL_VERSION, codecs
from paceline_wire.bulk import Bulk, splitter
from paceline_wire.errors import ERROR_METADATA_KEY
from paceline_wire.v1 import admin_pb2
from paceline_wire.v1 import parameter_server_pb2 as pb

FRAGMENT = 512
MANIFEST = pb.Manifest(
    tensors=[
        pb.Tensor(name="b", shape=[300], dtype=pb.DTYPE_FLOAT32, role=pb.ROLE_AVERAGED),
        pb.Tensor(name="x", shape=[2, 300], dtype=pb.DTYPE_BFLOAT16, role=pb.ROLE_PARAMETER),
    ],
    fragment_elements=FRAGMENT,
)
SIZES = (512, 88, 300)
HOSTILE, HONEST = pb.Worker(worker_id="hostile", incarnation=5), pb.Worker(worker_id="honest", incarnation=1)
PATIENCE_S = 4.0
INITIALIZATION = 7

CONFIGS: tuple[ServerConfig, ...] = tuple(
    config_from_mapping({"schedule": {"quota": 2, "lease_s": 3600}, **rest, "exchange": {**exchange, **common}})
    for rest, exchange in (
        ({}, {"downlink": "fp32"}),
        ({"outer": {"publish": "look-ahead"}}, {"downlink": "int8", "own_weight": "predicted"}),
        ({"outer": {"rule": "orlomo"}}, {"downlink": "bf16"}),
    )
    for common in ({"fragment_elements": FRAGMENT, "dynamic_inner_steps": False},)
)


@dataclass(frozen=True, kw_only=True)
class Method:
    """One of the calls.

    Attributes:
        name: Its name.
        request: The type of its requests.
        streams_in: Whether it takes a stream.
        streams_out: Whether it answers with one.
        service: The full name of its service.
    """

    name: str
    request: type[Message]
    streams_in: bool = False
    streams_out: bool = False
    service: str = "paceline_wire.v1.ParameterServerService"


METHODS = (
    Method(name="Describe", request=pb.DescribeRequest),
    Method(name="Initialize", request=pb.InitializeRequest, streams_in=True),
    Method(name="Join", request=pb.JoinRequest),
    Method(name="Heartbeat", request=pb.HeartbeatRequest),
    Method(name="Leave", request=pb.LeaveRequest),
    Method(name="Fetch", request=pb.FetchRequest, streams_out=True),
    Method(name="Exchange", request=pb.ExchangeRequest, streams_in=True, streams_out=True),
    *(
        Method(name=name, request=GetMessageClass(described.input_type), service="paceline_wire.v1.AdminService")
        for name, described in admin_pb2.DESCRIPTOR.services_by_name["AdminService"].methods_by_name.items()
    ),
)
ADMIN = tuple(method.name for method in METHODS if method.service.endswith("AdminService"))
ACTS = tuple(name for name in ADMIN if name not in ("Status", "Audit"))
"""What operators do: each on a shard of its own, since it may change what the next input would begin from."""

_BY_NAME = {method.name: number for number, method in enumerate(METHODS)}
_EMPTY_SHARD = 0x80
"""Bit of an input's first byte: the shard has no parameters yet."""


def payload_of(data: bytes, codec: str) -> pb.Payload:
    """An honest announcement of data."""
    number = codecs.wire_value(codecs.codec(codec))
    return pb.Payload(codec=number, num_bytes=len(data), crc32=zlib.crc32(data))


def encoded(codec: str, num_elements: int, scale: float) -> bytes:
    """Some numbers, encoded."""
    values = torch.linspace(-scale, scale, num_elements)
    return codecs.encode(codecs.codec(codec), values).numpy().tobytes()


def push_message(fragment: int, seq: int, codec: str, num_elements: int, **more: Any) -> pb.ExchangeRequest:
    """An honest push."""
    data = encoded(codec, num_elements, 0.01)
    push = pb.Push(fragment=fragment, seq=seq, base_bin=0, payload=payload_of(data, codec), **more)
    return pb.ExchangeRequest(push=push, data=data)


def conversations() -> list[tuple[str, list[Message]]]:
    """Honest calls of the hostile worker: methods and their messages."""
    start = pb.InitializeStart(protocol_version=PROTOCOL_VERSION, manifest=MANIFEST, initialization_id=9)
    upload: list[Message] = [pb.InitializeRequest(start=start)]
    for fragment, size in enumerate(SIZES):
        data = encoded("fp32", size, 1.0)
        announced = pb.InitializeFragment(fragment=fragment, payload=payload_of(data, "fp32"))
        upload.append(pb.InitializeRequest(fragment=announced, data=data))
    found: list[tuple[str, list[Message]]] = [
        ("Describe", [pb.DescribeRequest(protocol_version=PROTOCOL_VERSION)]),
        ("Initialize", upload),
        ("Join", [pb.JoinRequest(protocol_version=PROTOCOL_VERSION, worker=HOSTILE)]),
        ("Join", [pb.JoinRequest(protocol_version=1, worker=HOSTILE, previous_incarnation=4)]),
        ("Heartbeat", [pb.HeartbeatRequest(worker=HOSTILE, inner_step_us=1000)]),
        ("Leave", [pb.LeaveRequest(worker=HOSTILE)]),
        ("Fetch", [pb.FetchRequest(fragments=[0, 2], codec=pb.CODEC_BF16)]),
        ("Status", [admin_pb2.StatusRequest()]),
        ("Audit", [admin_pb2.AuditRequest(num_entries=3)]),
        ("Drain", [admin_pb2.DrainRequest(discard_state=True)]),
        ("Evict", [admin_pb2.EvictRequest(worker_id=HOSTILE.worker_id, reason="why", duration_ms=1000)]),
        ("Admit", [admin_pb2.AdmitRequest(worker_id=HOSTILE.worker_id)]),
        ("Snapshot", [admin_pb2.SnapshotRequest()]),
        ("Configure", [admin_pb2.ConfigureRequest(lr=0.5, inner_steps=7, quota=3)]),
    ]
    for downlink in (pb.CODEC_UNSPECIFIED, pb.CODEC_INT8, pb.CODEC_INT4):
        opening = pb.ExchangeOpen(worker=HOSTILE, downlink=downlink, report_received=True)
        for codec in codecs.CODEC_NAMES:
            for double in (1, 2):
                pushes = [push_message(0, 1, codec, double * SIZES[0], tokens=5, held_version=1)]
                pushes += [push_message(1, 1, codec, double * SIZES[1], inner_step_us=7)]
                pushes += [push_message(2, seq, codec, SIZES[2]) for seq in (1, 2)]
                found.append(("Exchange", [pb.ExchangeRequest(open=opening), *pushes]))
    return found


def mutated_conversation(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """Another shard, or messages changed, left out, repeated or moved, payloads often announced as they then are."""
    messages = frames(data[2:])
    if not messages or rng.random() < 0.1:
        return mutated_bytes(rng, data, other)
    kind = rng.randrange(8)
    at = rng.randrange(len(messages))
    if kind == 0:
        return bytes([data[0] ^ (_EMPTY_SHARD if data[0] & 7 == 1 else 0), rng.randrange(256)]) + data[2:]
    if kind == 1:
        del messages[at]
    elif kind == 2:
        messages.insert(at, rng.choice([*messages, *frames(other[2:])]))
    elif kind == 3 and len(messages[at]) > 1:
        cut = rng.randrange(1, len(messages[at]))
        messages[at : at + 1] = [messages[at][:cut], messages[at][cut:]]
    else:
        request = METHODS[data[0] % len(METHODS)].request
        messages[at] = mutated_message(rng, request, messages[at], b"")
        if rng.random() < 0.6:
            messages[at] = _announced_honestly(request, messages[at])
    return data[:2] + framed(messages[:64])


def _announced_honestly(request: type[Message], message: bytes) -> bytes:
    """A message whose announcement is of the payload that it has."""
    try:
        parsed: Any = request.FromString(message)
    except DecodeError:
        return message
    name = {pb.ExchangeRequest: "push", pb.InitializeRequest: "fragment"}.get(request)
    if name is not None and parsed.HasField(name):
        announced = getattr(parsed, name).payload
        announced.num_bytes, announced.crc32 = len(parsed.data), zlib.crc32(parsed.data)
    return bytes(parsed.SerializeToString())


class _AbortedError(Exception):
    """A call that the handler ended with a status."""


class _Context:
    """What a handler sees of a call."""

    def __init__(self) -> None:
        self.written: list[Any] = []

    async def abort(self, code: grpc.StatusCode, details: str, trailing_metadata: Any) -> NoReturn:
        named = dict(trailing_metadata).get(ERROR_METADATA_KEY)
        raise _AbortedError(f"{code.name} {named}: {details}")

    def peer(self) -> str:
        return "ipv4:192.0.2.7:1"

    def auth_context(self) -> dict[str, Any]:
        return {}

    async def send_initial_metadata(self, _metadata: Any) -> None:
        await asyncio.sleep(0)

    async def write(self, message: Any) -> None:
        self.written.append(message)
        await asyncio.sleep(0)


class _Journal(NoJournal):
    """Keeps records in memory."""

    def __init__(self) -> None:
        self.records: list[Record] = []

    async def append(self, record: Record) -> int:
        self.records.append(record)
        return len(self.records)


class _Served:
    """A shard with its services, and the state from which every input begins."""

    def __init__(self, config: ServerConfig, *, initialized: bool) -> None:
        self.shard = build_shard(config, 0)
        self.journal = _Journal()
        predicted = config.exchange.own_weight == "predicted"
        self.engine = Engine(self.shard, self.journal, send_momentum=predicted)
        live = LiveConfiguration(config)
        self.service = ParameterServerService(self.engine, live, [pb.Shard(port=1)])
        operations = Operations(
            self.engine,
            live,
            None,
            AuditLog(None),
            keep_settings=None,
            stop_serving=self.service.drain,
            end=lambda: None,
        )
        self.admin = AdminService(self.engine, live, None, operations)
        self.mirror = build_shard(config, 0)
        self.copies: dict[int, FragmentCopy] = {}
        self.members = MembershipState()
        self.initialized = initialized

    def remember(self) -> None:
        """Take the state as it is for the one that inputs begin from."""
        self.copies = {index: hosted.copied() for index, hosted in self.shard.fragments.items()}
        self.members = self.shard.membership.state(self.engine.clock())
        if self.shard.manifest is not None:
            self.mirror.take_manifest(self.shard.manifest, self.shard.initialization_id)

    def reset(self) -> None:
        """Go back to it."""
        for shard in (self.shard, self.mirror):
            _restore(shard, self.copies)
            shard.membership.restore(self.members, self.engine.clock())
        self.shard.forget_gone(self.engine.clock(), ())
        self.journal.records.clear()

    async def settle(self) -> None:
        """Wait for what has begun: a push goes on when its stream has ended."""
        while self.engine._events:
            await asyncio.wait(list(self.engine._events))
        for _ in range(20):
            await asyncio.sleep(0)

    def require_undisturbed(self) -> None:
        """The state is that of a shard that was told of the accepted pushes alone."""
        for record in self.journal.records:
            if isinstance(record, Decided):
                follow(self.mirror, record)
        for index, hosted in self.shard.fragments.items():
            other = self.mirror.fragments[index]
            if hosted.ledger != other.ledger or hosted.norms != other.norms:
                raise ViolationError(f"the bookkeeping of fragment {index} is not that of an undisturbed shard")
            if values_of(self.shard, index) != values_of(self.mirror, index):
                raise ViolationError(f"the numbers of fragment {index} are not those of an undisturbed shard")

    def require_nothing_held(self) -> None:
        """Nothing is left of the calls."""
        engine = self.engine
        left = {
            "room for pushes": engine.buffers.incoming.held_bytes,
            "room for updates": engine.buffers.outgoing.held_bytes,
            "streams": len(engine.streams._all()),
            "recipients": len(engine._recipients),
            "events": len(engine._events),
            "an upload": engine.initializing.locked(),
            "tasks": len(asyncio.all_tasks()) - 1,
        }
        found = [name for name, number in left.items() if number]
        if found:
            raise ViolationError(f"left behind: {', '.join(found)}")
        if engine.failed.done():
            raise ViolationError(f"the shard has ended: {engine.failed.result()}")


def _restore(shard: Shard, copies: dict[int, FragmentCopy]) -> None:
    for index, copy in copies.items():
        vectors = {name: vector.clone() for name, vector in copy.vectors.items()}
        shard.restore_fragment(index, FragmentCopy(vectors=vectors, meta=copy.meta))


def follow(shard: Shard, record: Decided) -> None:
    """Let an undisturbed shard decide about a push that another has decided about, and follow.

    Raises:
        ViolationError: It decides otherwise.
    """
    decision, ledger = record.decision, record.ledger
    if record.push is not None:
        decision, ledger = shard.decide_push(record.time_s, record.fragment, record.push)
        if (decision, ledger) != (record.decision, record.ledger):
            raise ViolationError("an undisturbed shard decides otherwise about a push")
    values = shard.fragments[record.fragment].values
    if values is None:
        raise ViolationError("a push to a fragment without values was decided about")
    codec = None if record.codec is None else codecs.codec(record.codec)
    values.follow(decision, codec, record.payload)
    shard.keep(record.fragment, decision, ledger, None, record.norm)


def values_of(shard: Shard, index: int) -> list[bytes]:
    """All numbers of a fragment, to the bit."""
    values = shard.fragments[index].values
    return [] if values is None else [vector.numpy().tobytes() for vector in values.vectors.values()]


class CallsTarget(Target):
    """All handlers of both services."""

    name: ClassVar[str] = "calls"
    inputs: ClassVar[int] = 60_000
    errors = ()

    def __init__(self) -> None:
        torch.set_num_threads(1)
        use_kernels_for_small_fragments()
        self._loop = asyncio.new_event_loop()
        self._played = 0
        self._served = [self._loop.run_until_complete(_begun(config)) for config in CONFIGS]

    def seeds(self) -> Sequence[bytes]:
        """Honest calls, to every configuration, and to a shard without parameters."""
        seeds = []
        for name, messages in conversations():
            body = framed([message.SerializeToString() for message in messages])
            seeds += [bytes([_BY_NAME[name], number]) + body for number in range(len(CONFIGS))]
            if name != "Exchange":
                seeds.append(bytes([_BY_NAME[name] | _EMPTY_SHARD, 0]) + body)
        return seeds

    def mutated(self, rng: random.Random, data: bytes, other: bytes) -> bytes:
        """Message by message."""
        return mutated_conversation(rng, data, other)

    def run(self, data: bytes) -> str:
        """Make the call, sometimes with an honest worker beside it."""
        self._played += 1
        return self._loop.run_until_complete(self._call(data, beside=self._played % 8 == 0))

    async def _call(self, data: bytes, *, beside: bool) -> str:
        head, which = data[:2].ljust(2, b"\0")
        method, messages = METHODS[head % len(METHODS)], frames(data[2:])
        config = CONFIGS[which % len(CONFIGS)]
        is_own = bool(head & _EMPTY_SHARD) or method.name in ACTS
        if head & _EMPTY_SHARD:
            served = _Served(config, initialized=False)
        elif is_own:
            served = await _begun(config)
            served.reset()
        else:
            served = self._served[which % len(CONFIGS)]
            served.reset()
        try:
            honest = asyncio.create_task(_honest(served)) if beside and served.initialized and not is_own else None
            outcome = await asyncio.wait_for(_played(served, method, messages), PATIENCE_S)
            told = await asyncio.wait_for(honest, PATIENCE_S) if honest is not None else None
            await served.settle()
            (await served.admin.Status(admin_pb2.StatusRequest(), _Context())).SerializeToString()  # type: ignore[arg-type]
            if served.initialized:
                served.require_undisturbed()
            served.require_nothing_held()
            if told is not None and told != served.mirror.fragments[2].ledger.answered[HONEST.worker_id].bin:
                raise ViolationError("an honest worker was told of another bin")
        finally:
            if is_own:
                await served.engine.finish()
        return f"{method.name} {outcome}"

    def finish(self) -> None:
        """End the shards."""
        for served in self._served:
            self._loop.run_until_complete(served.engine.finish())
        self._loop.close()


async def _begun(config: ServerConfig) -> _Served:
    """A shard with parameters and two members, of whom the honest one has pushed."""
    served = _Served(config, initialized=True)
    upload = dict(conversations())["Initialize"]
    messages = [message.SerializeToString() for message in upload]
    await _played(served, METHODS[_BY_NAME["Initialize"]], messages)
    if not served.shard.initialized:
        raise ViolationError("an honest upload is refused")
    for worker in (HONEST, HOSTILE):
        served.shard.membership.join(served.engine.clock(), worker.worker_id, worker.incarnation)
    served.shard.initialization_id = INITIALIZATION
    await _honest(served)
    served.remember()
    return served


async def _honest(served: _Served) -> int:
    """One push of an honest worker, which must be answered with the fragment's newest values; the answer's bin."""
    answered = served.shard.fragments[2].ledger.answered.get(HONEST.worker_id)
    seq = 1 if answered is None else answered.seq + 1
    opening = pb.ExchangeRequest(open=pb.ExchangeOpen(worker=HONEST, downlink=pb.CODEC_FP32))
    pushed = push_message(2, seq, "fp32", SIZES[2])
    pushed.push.base_bin = served.shard.fragments[2].ledger.issuing_bin
    context = _Context()
    stream = _arriving(served, [message.SerializeToString() for message in (opening, pushed)])
    await served.service.Exchange(stream, context)  # type: ignore[arg-type]  # all of a context that it uses
    answers = [message.head.update for message in context.written if message.head.HasField("update")]
    if [answer.seq for answer in answers] != [seq] or answers[0].HasField("refusal"):
        raise ViolationError(f"an honest push is not answered, but {answers}")
    if answers[0].payload.crc32 != zlib.crc32(b"".join(bytes(message.data) for message in context.written)):
        raise ViolationError("an honest worker's update is damaged")
    return int(answers[0].bin)


async def _arriving(served: _Served, messages: list[bytes]) -> AsyncIterator[Bulk[pb.ExchangeRequest]]:
    """A stream's messages as gRPC hands them over; it ends once what they began is done."""
    split = splitter(pb.ExchangeRequest)
    for message in messages:
        yield split(message)
        await asyncio.sleep(0)
    await served.settle()


async def _uploaded(messages: list[bytes]) -> AsyncIterator[Bulk[pb.InitializeRequest]]:
    split = splitter(pb.InitializeRequest)
    for message in messages:
        yield split(message)
        await asyncio.sleep(0)


async def _played(served: _Served, method: Method, messages: list[bytes]) -> str:
    """Make a call; what came of it."""
    context: Any = _Context()
    handler: Any = getattr(served.admin if method.name in ADMIN else served.service, method.name)
    try:
        if method.name == "Exchange":
            request: Any = _arriving(served, messages)
        elif method.streams_in:
            request = _uploaded(messages)
        else:
            request = method.request.FromString(b"".join(messages))
    except DecodeError:
        return "unreadable"
    try:
        answer = await handler(request, context)
    except _AbortedError as error:
        return str(error)
    if answer is not None:
        answer.SerializeToString()
        return "answered"
    refused = any(message.head.update.HasField("refusal") for message in context.written if method.name == "Exchange")
    return f"{min(len(context.written), 4)} messages{', refused' if refused else ''}"
