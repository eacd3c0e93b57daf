"""Payloads in pieces: cutting an encoding into messages and putting it together again, with its checksum."""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from paceline_wire import codecs
from paceline_wire.checksum import crc32
from paceline_wire.codecs.base import Codec
from paceline_wire.errors import CodecError, DamagedPayloadError, InvalidInputError
from paceline_wire.v1 import parameter_server_pb2 as pb

MESSAGE_BYTES = 1024 * 1024
"""Payload bytes in a message. gRPC streams are fastest at 1-2 MiB: smaller ones cost calls, larger ones copies."""

FIRST_PIECE_BYTES = 64 * 1024
"""Payload bytes in a stream's first message: what a link of 16 KiB/s carries in 4 seconds. They grow from there."""

SMALLEST_PIECE_BYTES = 16 * 1024
"""Payload bytes in a message on the slowest links."""

_LONG_WRITE_S, _SHORT_WRITE_S = 1.0, 0.25


class Outgoing(NamedTuple):
    """An encoding that is ready to be sent.

    Attributes:
        announced: What the peer is told of it first.
        payload: Its bytes (uint8 [n]).
    """

    announced: pb.Payload
    payload: torch.Tensor


def outgoing(codec: Codec, payload: torch.Tensor) -> Outgoing:
    """Make an encoding (uint8 [n]) ready to be sent. Reads it all for the checksum: call it beside the event loop."""
    return Outgoing(payload_message(codec, payload), payload)


def payload_message(codec: Codec, payload: torch.Tensor) -> pb.Payload:
    """Announce an encoding (uint8 [n]), with its checksum."""
    return pb.Payload(codec=codecs.wire_value(codec), num_bytes=payload.numel(), crc32=crc32(payload.numpy().data))


class PieceSize:
    """How large the messages of a stream are: as large as is fast, and small enough that a slow link shows progress.

    Whoever waits for the peer judges by messages that arrive, so one must not take long. A size that took longer than a
    second is halved, one that took less than a quarter is doubled.
    """

    def __init__(self) -> None:
        self.num_bytes = FIRST_PIECE_BYTES

    def cut(self, payload: torch.Tensor) -> Iterator[memoryview]:
        """A payload in pieces (see `pieces`) as large as the size is then, but for the first, which is small.

        So a peer on a slow link sees soon that a payload comes, whatever the link seemed to take before.
        """
        first_bytes = min(FIRST_PIECE_BYTES, self.num_bytes)
        yield from pieces(payload[:first_bytes])
        if payload.numel() > first_bytes:
            yield from pieces(payload[first_bytes:], self)

    def observe(self, took_s: float) -> None:
        """Note how many seconds a message of this size took."""
        if took_s > _LONG_WRITE_S:
            self.num_bytes = max(self.num_bytes // 2, SMALLEST_PIECE_BYTES)
        elif took_s < _SHORT_WRITE_S:
            self.num_bytes = min(self.num_bytes * 2, MESSAGE_BYTES)


def pieces(payload: torch.Tensor, size: PieceSize | None = None) -> Iterator[memoryview]:
    """The payload (uint8 [n]) in order, in views of at most MESSAGE_BYTES; one of no bytes if it is empty.

    Args:
        payload: The bytes.
        size: How large each piece is when it is asked for; None: MESSAGE_BYTES.
    """
    view = payload.numpy().data
    start = 0
    while start < max(len(view), 1):
        num_bytes = MESSAGE_BYTES if size is None else size.num_bytes
        yield view[start : start + num_bytes]
        start += num_bytes


class Assembly:
    """One announced payload while its bytes arrive.

    Args:
        announced: What the peer announced.
        num_elements: Elements that it must encode.

    Raises:
        CodecError: The codec is unknown, or the announced size is not the codec's size for num_elements.
    """

    def __init__(self, announced: pb.Payload, num_elements: int) -> None:
        self.codec = codecs.codec_of_wire(announced.codec)
        expected = _expected_bytes(announced, num_elements)
        self._crc32 = announced.crc32 if announced.HasField("crc32") else None
        self._buffer = torch.empty(expected, dtype=torch.uint8)
        self._view = self._buffer.numpy().data
        self._filled = 0
        self._received_crc32 = 0

    def add(self, data: bytes | memoryview) -> None:
        """Take the next bytes.

        Raises:
            InvalidInputError: More bytes came than were announced.
        """
        end = self._filled + len(data)
        if end > len(self._view):
            raise InvalidInputError(f"{end} bytes came for a payload announced with {len(self._view)}")
        self._view[self._filled : end] = data
        self._filled = end
        # Message by message: the bytes are in the cache, and the event loop is not held up for a whole payload.
        self._received_crc32 = crc32(data, self._received_crc32)

    @property
    def complete(self) -> bool:
        """Whether all announced bytes have come."""
        return self._filled == len(self._view)

    def payload(self) -> torch.Tensor:
        """The whole encoding (uint8 [n]), once complete.

        Raises:
            DamagedPayloadError: The checksum does not fit.
        """
        if self._crc32 is not None and self._received_crc32 != self._crc32:
            raise DamagedPayloadError("the payload's CRC-32 is not the announced one: it was damaged on the way")
        return self._buffer


def _expected_bytes(announced: pb.Payload, num_elements: int) -> int:
    """The announced size, which must be the codec's for num_elements."""
    codec = codecs.codec_of_wire(announced.codec)
    expected = codec.encoded_bytes(num_elements)
    if announced.num_bytes != expected:
        raise CodecError(
            f"a payload of {announced.num_bytes} bytes was announced; "
            f"{num_elements} elements in {codec.name} are {expected} bytes"
        )
    return expected


class Receiver:
    """Payloads as they arrive on one stream, one after the other."""

    def __init__(self) -> None:
        self._current: Assembly | None = None

    def required_bytes(self, announced: pb.Payload, num_elements: int) -> int:
        """Bytes that `begin` will take for a payload, for whoever must have room for them first.

        Raises:
            InvalidInputError: The payload before is not complete.
            CodecError: See Assembly.
        """
        if self._current is not None:
            raise InvalidInputError("a payload was announced before the one before it was complete")
        return _expected_bytes(announced, num_elements)

    def begin(self, announced: pb.Payload, num_elements: int) -> None:
        """Expect a new payload, and take memory for it.

        Raises:
            InvalidInputError: The payload before is not complete.
            CodecError: See Assembly.
        """
        self.required_bytes(announced, num_elements)
        self._current = Assembly(announced, num_elements)

    def add(self, data: bytes | memoryview) -> Assembly | None:
        """Take the bytes of one message; the payload's assembly once it is complete, else None.

        Raises:
            InvalidInputError: No payload is expected, or too many bytes came.
        """
        if self._current is None:
            raise InvalidInputError("payload bytes came before any payload was announced")
        self._current.add(data)
        if not self._current.complete:
            return None
        finished, self._current = self._current, None
        return finished
