"""Payloads of any content: every codec, plain and compiled, and updates that are differences to what is held."""

import random
import struct
from collections.abc import Sequence
from typing import ClassVar

import torch

from fuzz.mutation import mutated_bytes, mutated_message
from fuzz.target import Target, ViolationError
from paceline.held import Held, follow
from paceline_server.guard import checked_norm
from paceline_wire import codecs
from paceline_wire.codecs import kernels, squares
from paceline_wire.codecs.base import BLOCK_ELEMENTS, Codec
from paceline_wire.codecs.compiled import CompiledCodec, MomentumStep
from paceline_wire.errors import CodecError, UnavailableError
from paceline_wire.v1 import parameter_server_pb2 as pb

_HEAD = struct.Struct("<BHBB")
_REPEATED = 1


def use_kernels_for_small_fragments() -> None:
    """Load the compiled loops, and let them have fragments of any size: the inputs are small."""
    kernels.load()
    kernels.LEAST_ELEMENTS = BLOCK_ELEMENTS


def stretched(data: bytes, size: int) -> bytes:
    """Bytes repeated until they have a size."""
    return (data * (size // len(data) + 1))[:size] if data else bytes(size)


class CodecTarget(Target):
    """Check, decode and apply: what is taken is finite, the same whole and in pieces, and by either implementation."""

    name: ClassVar[str] = "codecs"
    inputs: ClassVar[int] = 150_000
    errors = (CodecError,)

    def __init__(self) -> None:
        torch.set_num_threads(1)
        use_kernels_for_small_fragments()

    def seeds(self) -> Sequence[bytes]:
        """The encoding of a few hundred numbers in every codec, and one that is repeated to its size."""
        seeds = []
        for number, name in enumerate(codecs.CODEC_NAMES):
            for num_elements in (0, 1, 255, 600):
                values = torch.randn(num_elements, generator=torch.Generator().manual_seed(number))
                payload = codecs.encode(codecs.codec(name), values).numpy().tobytes()
                seeds.append(_HEAD.pack(number, num_elements, 0, 1) + payload)
            seeds.append(_HEAD.pack(number, 5000, _REPEATED, 3) + payload[:40])
        return seeds

    def mutated(self, rng: random.Random, data: bytes, other: bytes) -> bytes:
        """The head seldom, the payload in place mostly: another size is refused at once."""
        if len(data) <= _HEAD.size or rng.random() < 0.2:
            return mutated_bytes(rng, data, other)
        changed = bytearray(data)
        for _ in range(rng.choice((1, 2, 8))):
            at = rng.randrange(_HEAD.size, len(changed))
            kind = rng.randrange(3)
            if kind == 0:
                changed[at] ^= 1 << rng.randrange(8)
            elif kind == 1:
                extremes = (0x7F800000, 0xFF800000, 0x7FC00000, 0x7F7FFFFF, 1, 0x80000000, 0, 0xFFFFFFFF)
                changed[at : at + 4] = struct.pack("<I", rng.choice(extremes))[: len(changed) - at]
            else:
                changed[at] = rng.randrange(256)
        return bytes(changed)

    def run(self, data: bytes) -> str:
        """Check it, decode it, let it enter parameters."""
        number, num_elements, flags, offset = _HEAD.unpack(data[: _HEAD.size].ljust(_HEAD.size, b"\0"))
        codec = codecs.codec(codecs.CODEC_NAMES[number % len(codecs.CODEC_NAMES)])
        num_elements %= 8192
        raw = data[_HEAD.size :]
        if flags & _REPEATED:
            raw = stretched(raw, codec.encoded_bytes(num_elements))
        # At any offset, as it is cut out of a message.
        payload = codecs.payload_tensor(bytearray(offset % 5) + bytearray(raw))[offset % 5 :]
        codec.check(payload, num_elements)
        whole = torch.empty(num_elements)
        codec.decode_range(payload, num_elements, 0, whole)
        if not whole.isfinite().all():
            raise ViolationError(f"{codec.name}: a checked payload is not finite")
        self._compare(codec, payload, whole)
        return f"{codec.name} {min(num_elements // BLOCK_ELEMENTS, 3)} blocks"

    def _compare(self, codec: Codec, payload: torch.Tensor, whole: torch.Tensor) -> None:
        num_elements = whole.numel()
        start = BLOCK_ELEMENTS if num_elements > BLOCK_ELEMENTS else 0
        piece = torch.empty(num_elements - start)
        codec.decode_range(payload, num_elements, start, piece)
        if not _same(piece, whole[start:]):
            raise ViolationError(f"{codec.name}: a piece decodes otherwise than the whole")
        norm = checked_norm(codec, payload, num_elements)
        if not isinstance(codec, CompiledCodec):
            return
        plain = codec.plain
        plain.check(payload, num_elements)
        other = torch.empty(num_elements)
        plain.decode_range(payload, num_elements, 0, other)
        if not _same(other, whole) or squares.norm(plain, payload, num_elements) != norm:
            raise ViolationError(f"{codec.name}: compiled and plain do not agree")
        w, u = torch.ones(num_elements), torch.ones(num_elements)
        done = codec.step(payload, w, u, MomentumStep(before=[0.5], u_rate=0.0, w_rate=0.0, after=[]))
        if not (w[:done] == 0.5).all():
            raise ViolationError(f"{codec.name}: a push of no weight changed the parameters")


def _same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return torch.equal(left.view(torch.int32), right.view(torch.int32))


class DeltaTarget(Target):
    """`held.follow`: an update, whole or a difference, leads to finite values that are held, or to nothing."""

    name: ClassVar[str] = "delta"
    inputs: ClassVar[int] = 100_000
    errors = (CodecError, UnavailableError)

    def __init__(self) -> None:
        torch.set_num_threads(1)
        use_kernels_for_small_fragments()
        self._values = torch.linspace(-1.5e38, 1.5e38, 600)

    def seeds(self) -> Sequence[bytes]:
        """Updates in every codec, with momentum behind and without."""
        seeds = []
        for number, name in enumerate(codecs.CODEC_NAMES):
            for behind in (0, 600):
                payload = codecs.encode(codecs.codec(name), torch.ones(600 + behind) * 1e30).numpy().tobytes()
                for update in (pb.Update(version=2), pb.Update(version=2, difference_to=1), pb.Update(values_crc32=1)):
                    said = update.SerializeToString()
                    seeds.append(bytes([number, behind > 0, len(said)]) + said + payload)
        return seeds

    def mutated(self, rng: random.Random, data: bytes, other: bytes) -> bytes:
        """The announcement field by field, the payload byte by byte."""
        if len(data) < 3 or rng.random() < 0.1:
            return mutated_bytes(rng, data, other)
        said, payload = data[3 : 3 + data[2]], data[3 + data[2] :]
        if rng.random() < 0.3:
            changed = mutated_message(rng, pb.Update, said, b"")[:255]
            return data[:2] + bytes([len(changed)]) + changed + payload
        at = rng.randrange(len(payload) + 1)
        piece = rng.randbytes(rng.choice((1, 4, 16)))
        return data[: 3 + data[2]] + payload[:at] + piece + payload[at + len(piece) :]

    def run(self, data: bytes) -> str:
        """Follow it."""
        number, with_momentum, size = data[:3].ljust(3, b"\0")
        announced = pb.Update()
        try:
            announced.ParseFromString(data[3 : 3 + size])
        except Exception as error:
            raise CodecError("no message") from error
        codec = codecs.codec(codecs.CODEC_NAMES[number % len(codecs.CODEC_NAMES)])
        payload = codecs.payload_tensor(data[3 + size :])
        sizes = (600, 600 if with_momentum & 1 else 0)
        held, before = Held(values=self._values, version=1), self._values.clone()
        try:
            followed = follow(announced, codec, payload, sizes, held)
        finally:
            if not torch.equal(before, held.values):
                raise ViolationError("what was held has changed")
        if (followed.values.numel(), followed.behind.numel()) != sizes:
            raise ViolationError("an update led to values of another size")
        if not (followed.values.isfinite().all() and followed.behind.isfinite().all()):
            raise ViolationError("an update led to values that are not finite")
        return f"{codec.name} {announced.HasField('difference_to')} {followed.held is not None}"
