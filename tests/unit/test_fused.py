"""The passes that a GPU makes over a whole fragment: the plain codecs' bits, by operations and compiled."""

import shutil
from typing import NoReturn

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline_wire.codecs import fused
from paceline_wire.codecs.base import BLOCK_ELEMENTS
from paceline_wire.codecs.blockwise import BlockwiseCodec, Fp4Codec, Int4Codec, Int8Codec
from paceline_wire.codecs.feedback import compensate
from paceline_wire.codecs.moves import follow_move
from paceline_wire.codecs.whole import encode
from paceline_wire.errors import InvalidInputError
from support_core import DEVICES, normal

prop = settings(deadline=None, derandomize=True, max_examples=60)
each_device = pytest.mark.parametrize("device", DEVICES)
each_codec = pytest.mark.parametrize("codec", [Int8Codec(), Int4Codec(), Fp4Codec()], ids=lambda codec: codec.name)
sizes = st.integers(0, 3 * BLOCK_ELEMENTS) | st.sampled_from([256, 512, 65536, 65537])
magnitudes = st.sampled_from([0.0, 1e-40, 2.0**-119, 1e-20, 1.0, 1e20])


def drawn(size: int, seed: int, magnitude: float) -> torch.Tensor:
    """Numbers of a magnitude, some of them exactly 0."""
    return normal(size, seed) * magnitude * (normal(size, seed + 1) > -1)


@each_device
@each_codec
@prop
@given(size=sizes, seed=st.integers(0, 99), magnitude=magnitudes, has_minus=st.booleans(), has_residual=st.booleans())
def test_encoding_has_the_plain_codecs_bits(
    device: str, codec: BlockwiseCodec, size: int, seed: int, magnitude: float, has_minus: bool, has_residual: bool
) -> None:
    """The payload is the plain codec's, and what it lacks, too, whatever is subtracted and added first."""
    values = drawn(size, seed, magnitude)
    minus = drawn(size, seed + 10, magnitude) if has_minus else None
    residual = drawn(size, seed + 20, magnitude / 100) if has_residual else None
    expected = compensate(codec, values, residual, minus=minus)
    payload, lost = fused.compensate(
        codec,
        values.to(device),
        None if minus is None else minus.to(device),
        None if residual is None else residual.to(device),
    )
    assert torch.equal(expected.payload, payload.cpu())
    assert expected.residual is not None
    assert torch.equal(expected.residual, lost.cpu())


@each_device
@each_codec
@prop
@given(size=sizes, seed=st.integers(0, 99), magnitude=magnitudes, in_place=st.booleans())
def test_following_leads_to_the_plain_codecs_bits(
    device: str, codec: BlockwiseCodec, size: int, seed: int, magnitude: float, in_place: bool
) -> None:
    """A difference moves what is held to the same values, in memory of their own or in place."""
    payload, held = encode(codec, drawn(size, seed, magnitude)), drawn(size, seed + 10, 1.0)
    expected = torch.empty_like(held)
    follow_move(codec, payload, held, expected)
    reference = held.to(device, copy=True)
    moved = reference if in_place else torch.empty_like(reference)
    assert fused.follow_move(codec, payload.to(device), reference, moved)
    assert torch.equal(expected, moved.cpu())


@each_device
@each_codec
def test_what_is_not_finite_is_told(device: str, codec: BlockwiseCodec) -> None:
    """A value that is not finite makes a payload that the codec refuses, and a sum beyond float32 is told."""
    values = normal(600, 1).to(device)
    values[300] = float("nan")
    payload, _ = fused.compensate(codec, values, None, None)
    assert not compensate(codec, values.cpu()).finite
    assert not torch.isfinite(codec.split(payload, 600)[0].view(torch.float32)).all()
    huge = torch.full((256,), 3e38)
    doubled = torch.empty(256, device=device)
    assert not fused.follow_move(codec, encode(codec, huge).to(device), huge.to(device), doubled)


@each_device
@each_codec
def test_unfit_values_are_refused(device: str, codec: BlockwiseCodec) -> None:
    """What is not float32 [n] is refused as the plain codec refuses it."""
    with pytest.raises(InvalidInputError, match="values must be contiguous"):
        fused.compensate(codec, torch.zeros(256, dtype=torch.float64, device=device), None, None)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # torch's own, of what its compiler imports
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for the processor with g++")
def test_compiled_passes_have_the_same_bits() -> None:
    """Torch compiles every pass in one piece, for any number of blocks, and the bits stay."""
    passes = fused.compiled(torch.device("cpu"))
    codec, values, minus = Int4Codec(), normal(300 * 256, 1).view(300, 256), normal(300 * 256, 2).view(300, 256)
    blocks, absmax = passes.combined(values, minus, None)
    assert torch.equal(values - minus, blocks)
    scales, inverses = codec.factors(absmax)
    codes, lost = passes.quantized(codec, blocks, inverses, codec.steps(scales))
    payload, expected = fused.compensate(codec, values.reshape(-1), minus.reshape(-1), None)
    assert torch.equal(codec.split(payload, 300 * 256)[1], codes)
    assert torch.equal(expected, lost.reshape(-1))


def test_passes_that_fail_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a compiler raises in the midst of an exchange is logged, and the operations do the same from then on."""
    device, values = torch.device("cpu"), normal(512, 1)

    def fails(*_: object) -> NoReturn:
        raise RuntimeError("recompile limit")

    given: list[fused._Passes] = []

    def passes(*_: object) -> fused._Passes:
        given.append(fused._compiled.get(device, fused._OPERATIONS))
        return given[-1]

    broken = fused._Passes(fails, fails, fails)
    monkeypatch.setitem(fused._compiled, device, broken)
    monkeypatch.setattr(fused, "_passes", passes)
    expected = compensate(Int8Codec(), values)
    for _ in range(2):
        payload, _ = fused.compensate(Int8Codec(), values, None, None)
        assert torch.equal(expected.payload, payload)
    assert device not in fused._compiled
    monkeypatch.setitem(fused._compiled, device, broken)
    moved = torch.empty_like(values)
    assert fused.follow_move(Int8Codec(), expected.payload, values, moved)
    assert torch.equal(values + expected.decode(), moved)
    assert given == [broken, fused._OPERATIONS, broken]


def test_few_elements_do_not_begin_to_compile() -> None:
    """On the processor, and for small fragments on any device, the operations are used, and nothing is loaded."""
    begun = set(fused._begun)
    assert fused._passes(torch.device("cpu"), 1 << 24) is fused._OPERATIONS
    assert fused._passes(torch.device("meta"), fused.LEAST_BLOCKS * BLOCK_ELEMENTS - 1) is fused._OPERATIONS
    assert fused._begun == begun


def test_passes_that_differ_in_a_bit_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled passes are tried first: one that rounds otherwise is refused, and the operations go on."""

    def compiled_otherwise(function: object, **_options: object) -> object:
        def changed(*arguments: object) -> object:
            result = function(*arguments)  # type: ignore[operator]  # any of the passes
            return result + 1e-7 if isinstance(result, torch.Tensor) else result

        return changed

    monkeypatch.setattr(torch, "compile", compiled_otherwise)
    with pytest.raises(RuntimeError, match="other bits"):
        fused.compiled(torch.device("cpu"))
