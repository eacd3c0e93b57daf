"""Error feedback: nothing is lost over many messages, nothing is committed early, and nothing is raised."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline_wire.codecs import CODEC_NAMES, codec, compensate, decode, encode
from paceline_wire.errors import InvalidInputError

LOSSY = tuple(name for name in CODEC_NAMES if not codec(name).lossless)
each_codec = pytest.mark.parametrize("name", CODEC_NAMES)
each_lossy = pytest.mark.parametrize("name", LOSSY)
each_without_decay = pytest.mark.parametrize("name", [name for name in LOSSY if codec(name).residual_decay == 1])
prop = settings(deadline=None, derandomize=True, max_examples=40)


def normal(size: int, seed: int = 0) -> torch.Tensor:
    """Return normally distributed values, the same for the same seed."""
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def carried(name: str, values: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """What a message is to say: the values, and of the residual the part that the codec carries over."""
    return values + residual * codec(name).residual_decay


@each_codec
@prop
@given(size=st.integers(0, 700), seed=st.integers(0, 2**32), rounds=st.integers(1, 20))
def test_what_arrives_and_what_is_left_is_what_was_given(name: str, size: int, seed: int, rounds: int) -> None:
    """Over any number of messages, decoded values plus the residual add up to the inputs, up to float32 rounding.

    Where residuals decay, what decayed is missing, and nothing else.
    """
    given_sum, arrived_sum = np.zeros(size), np.zeros(size)
    rounding, residual = np.zeros(size), None
    for at in range(rounds):
        values = normal(size, seed + at)
        encoded = compensate(codec(name), values, residual)
        if residual is not None:
            rounding += np.abs(carried(name, values, residual).numpy()) * 2.0**-24  # half a unit in the last place
            if codec(name).residual_decay != 1:
                rounding += np.abs(residual.numpy()) * 2.0**-24
                given_sum -= residual.numpy().astype(np.float64) * (1 - codec(name).residual_decay)
        given_sum += values.numpy().astype(np.float64)
        arrived_sum += encoded.decode().numpy().astype(np.float64)
        residual = encoded.residual
    left = np.zeros(size) if residual is None else residual.numpy().astype(np.float64)
    assert np.all(np.abs(given_sum - arrived_sum - left) <= rounding * 1.01)


@each_lossy
@prop
@given(size=st.integers(1, 700), seed=st.integers(0, 2**32), exponent=st.integers(-140, 120))
def test_the_residual_is_exact(name: str, size: int, seed: int, exponent: int) -> None:
    """Decoded value plus residual is the compensated value bit for bit: only carrying the old residual over rounds.

    So are the values of one magnitude in topk, too; `test_topk` has the others.
    """
    values = normal(size, seed) * 2.0**exponent
    first = compensate(codec(name), values)
    assert first.residual is not None
    assert torch.equal(values, first.decode() + first.residual)
    second = compensate(codec(name), values, first.residual)
    assert second.residual is not None
    assert torch.equal(carried(name, values, first.residual), second.decode() + second.residual)


@each_without_decay
def test_small_values_arrive_in_time(name: str) -> None:
    """Values far below the codec's resolution arrive on average with feedback, and without it the error grows."""
    values = torch.full((256,), 0.0123)
    values[0] = 1.0
    residual, with_feedback, without, rounds = None, torch.zeros(256), torch.zeros(256), 200
    for _ in range(rounds):
        encoded = compensate(codec(name), values, residual)
        residual = encoded.residual
        with_feedback += encoded.decode()
        without += compensate(codec(name), values).decode()
    off = float((with_feedback / rounds - values).abs().max())
    assert off < 0.1 * float((without / rounds - values).abs().max())


@each_codec
def test_the_message_is_what_the_receiver_decodes(name: str) -> None:
    """The message decodes to what its payload does, whole and in pieces, and the payload is the compensated values'."""
    values, residual = normal(600_000), normal(600_000, 1) * 0.01
    encoded = compensate(codec(name), values, residual)
    assert encoded.finite
    assert torch.equal(encode(codec(name), carried(name, values, residual)), encoded.payload)
    arrived = decode(codec(name), encoded.payload, 600_000)
    assert torch.equal(arrived, encoded.decode())
    for num_elements in (600_000, 300_001):
        pieces = [(where, piece.clone()) for where, piece in encoded.decoded_pieces(num_elements)]
        assert len(pieces) > 1
        assert torch.equal(arrived[:num_elements], torch.cat([piece for _, piece in pieces]))
        assert all(torch.equal(arrived[where], piece) for where, piece in pieces)


@each_codec
@pytest.mark.parametrize("owed", [0.0, 0.01])
def test_a_difference_is_encoded_as_if_it_were_given(name: str, owed: float) -> None:
    """What is subtracted on the way gives the message of the difference, bit for bit."""
    start, end = normal(1000), normal(1000, 1)
    residual = normal(1000, 2) * owed if owed else None
    given, on_the_way = (
        compensate(codec(name), start - end, residual),
        compensate(codec(name), start, residual, minus=end),
    )
    assert torch.equal(given.payload, on_the_way.payload)
    assert (given.residual is None) == (on_the_way.residual is None)
    if given.residual is not None and on_the_way.residual is not None:
        assert torch.equal(given.residual, on_the_way.residual)


@each_codec
def test_nothing_given_is_changed(name: str) -> None:
    """Encoding again from the same values and residual, as after a refusal, gives the same bytes and residual."""
    values, residual = normal(1000), normal(1000, 1) * 0.01
    before = values.clone(), residual.clone()
    first, again = (compensate(codec(name), values, residual) for _ in range(2))
    assert torch.equal(before[0], values)
    assert torch.equal(before[1], residual)
    assert torch.equal(first.payload, again.payload)
    assert (first.residual is None) == (again.residual is None) == codec(name).lossless
    if first.residual is not None and again.residual is not None:
        assert torch.equal(first.residual, again.residual)
        assert first.residual.data_ptr() != residual.data_ptr()


@each_lossy
def test_a_refused_message_leaves_no_trace(name: str) -> None:
    """When a message's residual is dropped, the next ones are as if that message had never been made."""
    kept = compensate(codec(name), normal(600, 1)).residual
    compensate(codec(name), normal(600, 2), kept)  # refused: its residual is not taken over
    after_refusal = compensate(codec(name), normal(600, 3), kept)
    assert kept is not None
    never = compensate(codec(name), normal(600, 3), compensate(codec(name), normal(600, 1)).residual)
    assert torch.equal(never.payload, after_refusal.payload)


@each_codec
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_keep_the_old_residual(name: str, bad: float) -> None:
    """Infinities and NaN do not raise: the message says that it will be refused, and the residual stays."""
    values, residual = normal(600), normal(600, 1)
    values[300] = bad
    encoded = compensate(codec(name), values, residual)
    assert not encoded.finite
    assert encoded.residual is residual
    assert torch.equal(torch.zeros(600), encoded.decode())
    assert [piece.tolist() for _, piece in encoded.decoded_pieces(600)] == [[0.0] * 600]
    assert codec(name).encoded_bytes(600) == encoded.payload.numel()


@each_codec
def test_a_sum_that_overflows_keeps_the_old_residual(name: str) -> None:
    """Finite values whose sum with the residual is not are treated like values that are not finite."""
    huge = torch.full((10,), 3e38)
    encoded = compensate(codec(name), huge, huge)
    assert not encoded.finite
    assert encoded.residual is huge


def test_a_lossless_codec_pays_the_residual_off() -> None:
    """fp32 leaves no residual, passes values through, and delivers a residual that another codec left."""
    values, residual = normal(600), normal(600, 1)
    plain, paid = compensate(codec("fp32"), values), compensate(codec("fp32"), values, residual)
    assert plain.residual is None
    assert paid.residual is None
    assert torch.equal(values, plain.decode())
    assert torch.equal(values + residual, paid.decode())


@each_codec
@pytest.mark.parametrize("residual", [torch.zeros(1), torch.zeros(601), torch.zeros(600, dtype=torch.float64)])
def test_a_foreign_residual_is_refused(name: str, residual: torch.Tensor) -> None:
    """A residual of another fragment, told by its shape or type, is an error and is never broadcast."""
    with pytest.raises(InvalidInputError, match="residual"):
        compensate(codec(name), normal(600), residual)
