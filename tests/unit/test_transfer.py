"""Payloads in pieces: any cut gives the payload back, and whatever does not fit is refused with its own error."""

import zlib
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline_wire import codecs
from paceline_wire.errors import CodecError, DamagedPayloadError, InvalidInputError
from paceline_wire.transfer import (
    FIRST_PIECE_BYTES,
    MESSAGE_BYTES,
    Assembly,
    PieceSize,
    Receiver,
    payload_message,
    pieces,
)
from paceline_wire.v1 import parameter_server_pb2 as pb
from support_core import normal

prop = settings(deadline=None, derandomize=True, max_examples=60)
each_codec = pytest.mark.parametrize("name", codecs.CODEC_NAMES)
INT8 = codecs.codec("int8")


def encoded(name: str, num_elements: int, seed: int = 0) -> tuple[pb.Payload, torch.Tensor]:
    """An announcement and its payload."""
    payload = codecs.encode(codecs.codec(name), normal(num_elements, seed))
    return payload_message(codecs.codec(name), payload), payload


@each_codec
@prop
@given(num_elements=st.integers(0, 700), cuts=st.lists(st.integers(0, 4096), max_size=8))
def test_any_cut_gives_the_payload_back(name: str, num_elements: int, cuts: list[int]) -> None:
    """However the bytes are divided among messages, empty ones included, the last one completes the payload."""
    announced, payload = encoded(name, num_elements)
    data = bytes(payload.numpy())
    borders = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    receiver = Receiver()
    receiver.begin(announced, num_elements)
    finished = None
    for start, end in pairwise(borders):
        if finished is None:
            finished = receiver.add(data[start:end])
            assert (finished is not None) == (end == len(data))
    assert finished is not None
    assert finished.codec.name == name
    assert torch.equal(payload, finished.payload())


@pytest.mark.parametrize("num_bytes", [0, 1, MESSAGE_BYTES - 1, MESSAGE_BYTES, MESSAGE_BYTES + 1, 3 * MESSAGE_BYTES])
def test_pieces_are_the_payload_in_order(num_bytes: int) -> None:
    """Pieces have the size of a message, but for the last; an empty payload is one empty piece."""
    payload = torch.arange(num_bytes, dtype=torch.int32).to(torch.uint8)
    cut = list(pieces(payload))
    assert b"".join(cut) == bytes(payload.numpy())
    assert len(cut) == max(1, -(-num_bytes // MESSAGE_BYTES))
    assert all(len(piece) == MESSAGE_BYTES for piece in cut[:-1])


@pytest.mark.parametrize("num_bytes", [0, 1, FIRST_PIECE_BYTES, FIRST_PIECE_BYTES + 1, 3 * MESSAGE_BYTES])
def test_a_payload_begins_with_a_small_piece_whatever_was_learnt(num_bytes: int) -> None:
    """The first piece is small and the others as large as the size is then; together they are the payload."""
    payload = torch.arange(num_bytes, dtype=torch.int32).to(torch.uint8)
    size = PieceSize()
    for _ in range(10):
        size.observe(0.0)
    cut = list(size.cut(payload))
    assert b"".join(cut) == bytes(payload.numpy())
    assert len(cut[0]) == min(num_bytes, FIRST_PIECE_BYTES)
    assert len(cut) == 1 + -(-max(0, num_bytes - FIRST_PIECE_BYTES) // MESSAGE_BYTES)


@each_codec
def test_an_announcement_says_codec_size_and_checksum(name: str) -> None:
    """The message names the codec, the payload's bytes, and zlib's CRC-32 of them."""
    announced, payload = encoded(name, 500)
    assert codecs.codec_of_wire(announced.codec).name == name
    assert announced.num_bytes == payload.numel()
    assert announced.crc32 == zlib.crc32(bytes(payload.numpy()))


@each_codec
@pytest.mark.parametrize("num_bytes", [-1, 1, None])
def test_a_size_that_is_not_the_codecs_is_refused(name: str, num_bytes: int | None) -> None:
    """A payload announced with another size than its elements have is refused before memory is taken."""
    announced, payload = encoded(name, 500)
    announced.num_bytes = 2**63 if num_bytes is None else payload.numel() + num_bytes
    with pytest.raises(CodecError, match="500 elements"):
        Assembly(announced, 500)


@pytest.mark.parametrize("number", [pb.CODEC_UNSPECIFIED, 77])
def test_an_unknown_codec_is_refused(number: int) -> None:
    """Codec numbers that stand for nothing are refused."""
    with pytest.raises(CodecError, match="codec"):
        Assembly(pb.Payload(codec=number, num_bytes=4), 1)  # type: ignore[arg-type]  # numbers of a newer peer


@prop
@given(position=st.integers(0, 10**9), flip=st.integers(1, 255))
def test_a_changed_byte_is_damage(position: int, flip: int) -> None:
    """Any byte that changed on the way makes the checksum fail, with the error that says: send it again."""
    announced, payload = encoded("int8", 500)
    data = bytearray(payload.numpy())
    data[position % len(data)] ^= flip
    assembly = Assembly(announced, 500)
    assembly.add(bytes(data))
    assert assembly.complete
    with pytest.raises(DamagedPayloadError, match="CRC-32") as raised:
        assembly.payload()
    assert raised.value.retryable


def test_without_a_checksum_nothing_is_compared() -> None:
    """A peer that announces no checksum is believed; 0 is a checksum like any other."""
    announced, payload = encoded("int8", 500)
    for crc32 in (None, 0):
        message = pb.Payload(codec=announced.codec, num_bytes=announced.num_bytes, crc32=crc32)
        assembly = Assembly(message, 500)
        assembly.add(bytes(payload.numpy()))
        if crc32 is None:
            assert torch.equal(payload, assembly.payload())
        else:
            with pytest.raises(DamagedPayloadError):
                assembly.payload()


@pytest.mark.parametrize("before", [0, 1, -1])
def test_more_bytes_than_announced_are_refused(before: int) -> None:
    """One byte too many is refused, whether it comes with the last ones or all at once."""
    announced, payload = encoded("int8", 500)
    data = bytes(payload.numpy())
    assembly = Assembly(announced, 500)
    assembly.add(data[:before])
    with pytest.raises(InvalidInputError, match=f"announced with {len(data)}"):
        assembly.add(data[before:] + b"x")
    assert not assembly.complete


def test_payloads_do_not_interleave() -> None:
    """A payload announced before the one before it is complete is refused; afterwards it is not."""
    announced, payload = encoded("int8", 500)
    receiver = Receiver()
    receiver.begin(announced, 500)
    receiver.add(bytes(payload.numpy())[:-1])
    with pytest.raises(InvalidInputError, match="complete"):
        receiver.begin(announced, 500)
    assert receiver.add(bytes(payload.numpy())[-1:]) is not None
    receiver.begin(announced, 500)


@pytest.mark.parametrize("data", [b"", b"x"])
def test_bytes_without_an_announcement_are_refused(data: bytes) -> None:
    """Bytes belong to a payload: none may come before the first, nor between two."""
    receiver = Receiver()
    with pytest.raises(InvalidInputError, match="before any payload"):
        receiver.add(data)
    announced, payload = encoded("int8", 500)
    receiver.begin(announced, 500)
    receiver.add(bytes(payload.numpy()))
    with pytest.raises(InvalidInputError, match="before any payload"):
        receiver.add(data)


def test_payloads_follow_each_other() -> None:
    """A stream carries payload after payload, each complete when its own bytes have come, and each kept apart."""
    receiver, arrived, sent = Receiver(), [], []
    for seed in range(3):
        announced, payload = encoded("fp32", 10 * (seed + 1), seed)
        receiver.begin(announced, 10 * (seed + 1))
        finished = receiver.add(bytes(payload.numpy()))
        assert finished is not None
        arrived.append(finished.payload())
        sent.append(payload)
    assert all(torch.equal(expected, actual) for expected, actual in zip(sent, arrived, strict=True))


def test_a_refused_announcement_leaves_the_receiver_as_it_was() -> None:
    """After an announcement that was refused, a good one is taken."""
    receiver = Receiver()
    announced, payload = encoded("int8", 500)
    with pytest.raises(CodecError):
        receiver.begin(announced, 501 + 256)
    receiver.begin(announced, 500)
    assert receiver.add(bytes(payload.numpy())) is not None
