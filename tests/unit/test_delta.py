"""Values sent as differences: both sides' references stay equal in every bit, and near the values, for ever."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline_wire.codecs import CODEC_NAMES, Reference, codec, encode
from paceline_wire.errors import CodecError, InvalidInputError

LOSSY = tuple(name for name in CODEC_NAMES if not codec(name).lossless)
each_codec = pytest.mark.parametrize("name", CODEC_NAMES)
each_lossy = pytest.mark.parametrize("name", LOSSY)
prop = settings(deadline=None, derandomize=True, max_examples=40)


def normal(size: int, seed: int = 0) -> torch.Tensor:
    """Return normally distributed values, the same for the same seed."""
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def pair(name: str, initial: torch.Tensor) -> tuple[Reference, Reference]:
    """A sender's and a receiver's reference that begin alike, in memory of their own."""
    return Reference(codec(name), initial.clone()), Reference(codec(name), initial.clone())


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors are equal in every bit, the signs of zeros among them."""
    return torch.equal(left.view(torch.int32), right.view(torch.int32))


@each_codec
@prop
@given(
    size=st.sampled_from([0, 1, 63, 64, 65, 700, 4097]),
    seed=st.integers(0, 2**32),
    exponents=st.lists(st.integers(-140, 100), min_size=1, max_size=20),
)
def test_references_stay_equal_in_every_bit(name: str, size: int, seed: int, exponents: list[int]) -> None:
    """Whatever values follow one another, of any magnitude, both sides hold the same bits after each message."""
    sender, receiver = pair(name, normal(size, seed))
    for at, exponent in enumerate(exponents):
        payload = sender.encode(normal(size, seed + at + 1) * 2.0**exponent)
        receiver.follow(payload.numpy().tobytes())
        assert same_bits(sender.values, receiver.values)


@each_lossy
def test_the_error_does_not_accumulate(name: str) -> None:
    """While the values wander off, the reference stays as near to them late in the run as it was early on."""
    size = 256
    values = normal(size)
    sender, receiver = pair(name, torch.zeros(size))
    errors = []
    for at in range(1200):
        values = values + 0.1 * normal(size, at + 1)
        receiver.follow(sender.encode(values))
        errors.append(float((values - receiver.values).norm()))
    early, late = errors[200:700], errors[700:]
    assert max(late) < 1.5 * max(early)
    assert max(late) < 0.75 * float((values - normal(size)).norm())


@each_lossy
def test_differences_beat_whole_values_in_the_same_codec(name: str) -> None:
    """Near values that move little, the reference is nearer than the same codec brings the values themselves."""
    size = 4096
    values, (sender, receiver) = normal(size), pair(name, normal(size))
    for at in range(30):
        values = values + 1e-3 * normal(size, at + 1)
        receiver.follow(sender.encode(values))
    whole = Reference(codec(name), torch.zeros(size))
    whole.encode(values)
    assert float((values - receiver.values).norm()) < 0.1 * float((values - whole.values).norm())


@each_lossy
@settings(prop, max_examples=8)
@given(seed=st.integers(0, 2**32))
def test_values_that_stand_still_are_reached(name: str, seed: int) -> None:
    """Sent again and again, the same values are reached to the last few bits: what is lost comes with the next."""
    values = normal(128, seed)
    sender, _ = pair(name, normal(128, seed + 1))
    for _ in range(400):
        sender.encode(values)
    torch.testing.assert_close(sender.values, values, rtol=1e-6, atol=1e-6)


def test_a_lossless_codec_differs_by_rounding_only() -> None:
    """With fp32 the reference is the values but for the rounding of a difference and a sum."""
    values, (sender, receiver) = normal(1000), pair("fp32", normal(1000, 1))
    receiver.follow(sender.encode(values))
    torch.testing.assert_close(receiver.values, values, rtol=1e-6, atol=1e-6)


@each_codec
def test_tensors_once_handed_out_are_never_changed(name: str) -> None:
    """Neither the initial values, nor earlier references, nor the values to be sent change by moving on."""
    initial, values = normal(700), normal(700, 1)
    sender = Reference(codec(name), initial)
    assert sender.values is initial
    sender.encode(values)
    handed_out, before = sender.values, sender.values.clone()
    sender.encode(normal(700, 2))
    assert torch.equal(normal(700), initial)
    assert torch.equal(normal(700, 1), values)
    assert torch.equal(before, handed_out)


@each_codec
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_move_nobody(name: str, bad: float) -> None:
    """Such values are refused at the sender, whose reference stays; the next message is as if they had not been."""
    sender, receiver = pair(name, normal(300))
    values = normal(300, 1)
    values[7] = bad
    with pytest.raises(CodecError):
        sender.encode(values)
    assert torch.equal(normal(300), sender.values)
    receiver.follow(sender.encode(normal(300, 1)))
    assert same_bits(sender.values, receiver.values)


@each_codec
def test_a_difference_beyond_float32_moves_nobody(name: str) -> None:
    """Finite values whose difference is not, and differences that lead to infinity, are refused on either side."""
    reference = Reference(codec(name), torch.full((64,), 3e38))
    with pytest.raises(CodecError):
        reference.encode(torch.full((64,), -3e38))
    with pytest.raises(CodecError, match="beyond"):
        reference.follow(encode(codec(name), torch.full((64,), 3e38)))
    assert torch.equal(torch.full((64,), 3e38), reference.values)


@each_codec
def test_damaged_payloads_move_nobody(name: str) -> None:
    """A payload of another size is refused, and the reference can follow the whole one afterwards."""
    sender, receiver = pair(name, normal(300))
    payload = sender.encode(normal(300, 1))
    for damaged in (payload[:-1], payload[:0], torch.cat([payload, payload])):
        with pytest.raises(CodecError, match="bytes"):
            receiver.follow(damaged)
    assert torch.equal(normal(300), receiver.values)
    receiver.follow(payload)
    assert same_bits(sender.values, receiver.values)


@each_codec
@pytest.mark.parametrize("values", [torch.zeros(1), torch.zeros(301), torch.zeros(300, dtype=torch.float64)])
def test_foreign_values_are_refused(name: str, values: torch.Tensor) -> None:
    """Values of another fragment, told by their shape or type, are an error and are never broadcast."""
    with pytest.raises(InvalidInputError, match="do not belong to"):
        Reference(codec(name), normal(300)).encode(values)
