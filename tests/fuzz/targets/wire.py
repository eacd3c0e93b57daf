"""What comes over the wire below the calls: messages in parts, manifests, payloads in pieces."""

import random
import struct
from collections.abc import Sequence
from typing import ClassVar

from google.protobuf.message import DecodeError, Message

from fuzz.mutation import framed, frames, mutated_bytes, mutated_message
from fuzz.target import Target, ViolationError
from paceline_wire.bulk import Bulk, joined, splitter
from paceline_wire.errors import PacelineError
from paceline_wire.manifest import Manifest, TensorSpec
from paceline_wire.transfer import Receiver
from paceline_wire.v1 import parameter_server_pb2 as pb

BULK_KINDS: tuple[type[Message], ...] = (
    pb.ExchangeRequest,
    pb.ExchangeResponse,
    pb.InitializeRequest,
    pb.FetchResponse,
)
WORKER = pb.Worker(worker_id="a", incarnation=1)


def bulk_messages() -> list[tuple[int, bytes]]:
    """Honest messages with payload bytes, each with the number of its kind."""
    payload = pb.Payload(codec=pb.CODEC_FP32, num_bytes=16, crc32=1)
    data = bytes(range(16))
    push = pb.Push(fragment=1, seq=2, base_bin=3, payload=payload, inner_step_us=4, tokens=5, held_version=6)
    update = pb.Update(fragment=1, seq=2, bin=3, payload=payload, lr=0.7, momentum=0.9, version=1, difference_to=2)
    opening = pb.ExchangeOpen(worker=WORKER, downlink=pb.CODEC_INT8, report_received=True, stream=1)
    manifest = pb.Manifest(
        tensors=[pb.Tensor(name="x", shape=[2, 2], dtype=pb.DTYPE_FLOAT32, role=pb.ROLE_PARAMETER)],
        fragment_elements=256,
    )
    messages: list[tuple[int, Message]] = [
        (0, pb.ExchangeRequest(open=opening)),
        (0, pb.ExchangeRequest(push=push, data=data)),
        (0, pb.ExchangeRequest(data=data)),
        (1, pb.ExchangeResponse(update=update, data=data)),
        (1, pb.ExchangeResponse(received_bytes=99)),
        (2, pb.InitializeRequest(start=pb.InitializeStart(protocol_version=1, manifest=manifest, replaces=3))),
        (2, pb.InitializeRequest(fragment=pb.InitializeFragment(fragment=1, payload=payload), data=data)),
        (3, pb.FetchResponse(fragment=pb.FetchedFragment(fragment=1, bin=2, payload=payload), data=data)),
    ]
    return [(kind, message.SerializeToString()) for kind, message in messages]


class BulkTarget(Target):
    """`bulk.splitter` beside protobuf's own parser: both take the same messages, and find the same in them."""

    name: ClassVar[str] = "bulk"
    inputs: ClassVar[int] = 260_000
    errors = (DecodeError,)

    def __init__(self) -> None:
        self._split = [splitter(kind) for kind in BULK_KINDS]

    def seeds(self) -> Sequence[bytes]:
        """An honest message of each form, behind the number of its kind."""
        return [bytes([kind]) + data for kind, data in bulk_messages()]

    def mutated(self, rng: random.Random, data: bytes, other: bytes) -> bytes:
        """Field by field or byte by byte."""
        if not data or rng.random() < 0.5:
            return mutated_bytes(rng, data, other)
        kind = data[0] % len(BULK_KINDS)
        return data[:1] + mutated_message(rng, BULK_KINDS[kind], data[1:], other[1:])

    def run(self, data: bytes) -> str:
        """Split it both ways."""
        kind, message = (data[0] if data else 0) % len(BULK_KINDS), data[1:]
        expected: Message | None = BULK_KINDS[kind]()
        try:
            expected.ParseFromString(message) if expected is not None else None
        except DecodeError:
            expected = None
        try:
            head, found = self._split[kind](message)
        except DecodeError:
            if expected is not None:
                raise ViolationError("what protobuf reads is refused") from None
            raise
        if expected is None:
            raise ViolationError("what protobuf refuses is read")
        if getattr(head, "data"):  # noqa: B009  # the types that have it have no common base
            raise ViolationError("the head has data left")
        again = BULK_KINDS[kind]()
        again.ParseFromString(joined(Bulk(head, found)))
        # As bytes: a message with a number that is not one does not equal itself.
        if again.SerializeToString(deterministic=True) != expected.SerializeToString(deterministic=True):
            raise ViolationError("split and joined, the message is another")
        present = sorted(field.name for field, _ in head.ListFields())
        return f"{BULK_KINDS[kind].__name__} {','.join(present)} {'data' if found else ''}"


class ManifestTarget(Target):
    """`Manifest.from_wire`, and the plan of what it takes: fragments hold each element once, none is too large."""

    name: ClassVar[str] = "manifest"
    inputs: ClassVar[int] = 120_000
    errors = (PacelineError, DecodeError)

    def seeds(self) -> Sequence[bytes]:
        """Manifests of a few tensors, of all dtypes and roles."""
        shapes = ((), (0,), (3,), (20, 30), (1000,))
        dtypes = ("float32", "bfloat16", "float16")
        specs = [
            TensorSpec(
                name=f"t{index}", shape=shape, dtype=dtypes[index % 3], role=("parameter", "averaged")[index % 2]
            )
            for index, shape in enumerate(shapes)
        ]
        manifests = [Manifest.of(specs[:count], size) for count, size in ((0, 256), (1, 256), (4, 512), (5, 1 << 24))]
        return [manifest.to_wire().SerializeToString() for manifest in manifests]

    def mutated(self, rng: random.Random, data: bytes, other: bytes) -> bytes:
        """Field by field."""
        return mutated_message(rng, pb.Manifest, data, other)

    def run(self, data: bytes) -> str:
        """Read it, cut it, and compare it with itself."""
        manifest = Manifest.from_wire(pb.Manifest.FromString(data))
        if Manifest.from_wire(manifest.to_wire()) != manifest or manifest.difference(manifest) is not None:
            raise ViolationError("written and read, the manifest is another")
        if manifest.num_elements > 1 << 22:
            return "too large to be cut here"
        fragments = manifest.fragments
        if sum(fragment.num_elements for fragment in fragments) != manifest.num_elements:
            raise ViolationError("the fragments do not hold each element once")
        for fragment in fragments:
            lengths = [segment.length for segment in fragment.segments]
            if sum(lengths) != fragment.num_elements or fragment.num_elements > manifest.fragment_elements:
                raise ViolationError(f"fragment {fragment.index} does not hold what it says")
        return f"{len(manifest.tensors)} tensors"


class TransferTarget(Target):
    """`Receiver`: announcements and pieces in any order; what is complete has the announced size and checksum."""

    name: ClassVar[str] = "transfer"
    inputs: ClassVar[int] = 100_000
    errors = (PacelineError, DecodeError)

    def seeds(self) -> Sequence[bytes]:
        """Two payloads in pieces; elements, then announcements (ending in 1) and pieces (ending in 0)."""
        data = struct.pack("<4f", 1.0, 2.0, 3.0, 4.0)
        announced = pb.Payload(codec=pb.CODEC_FP32, num_bytes=16).SerializeToString()
        return [b"\x04\x00" + framed([announced + b"\x01", data[:5] + b"\0", data[5:] + b"\0", announced + b"\x01"])]

    def mutated(self, rng: random.Random, data: bytes, other: bytes) -> bytes:
        """One message changed, left out, or sent twice."""
        messages = frames(data[2:])
        if not messages or rng.random() < 0.2:
            return mutated_bytes(rng, data, other)
        at = rng.randrange(len(messages))
        if rng.random() < 0.3:
            messages[at:at] = messages[at : at + rng.randrange(3)]
        else:
            body, kind = messages[at][:-1], messages[at][-1:]
            is_announcement = kind == b"\x01"
            body = mutated_message(rng, pb.Payload, body, other) if is_announcement else mutated_bytes(rng, body, other)
            messages[at] = body + kind
        return data[:2] + framed(messages)

    def run(self, data: bytes) -> str:
        """Let the messages arrive."""
        (num_elements,) = struct.unpack("<H", data[:2].ljust(2, b"\0"))
        receiver, complete = Receiver(), 0
        for message in frames(data[2:]):
            if message[-1:] == b"\x01":
                receiver.begin(pb.Payload.FromString(message[:-1]), num_elements)
                continue
            assembly = receiver.add(message[:-1])
            if assembly is None:
                continue
            complete += 1
            if assembly.payload().numel() != assembly.codec.encoded_bytes(num_elements):
                raise ViolationError("a complete payload has another size than its codec's")
        return f"{min(complete, 3)} complete"
