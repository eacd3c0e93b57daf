"""The codecs against a slow reference written from their specification, their promises, and hostile payloads.

What only the sparse codec has is in `test_topk`.
"""

import math
import random
import re
import struct
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from paceline_wire.codecs import (
    BLOCK_ELEMENTS,
    CODEC_NAMES,
    Codec,
    Int8Codec,
    codec,
    codec_of_wire,
    decode,
    encode,
    payload_tensor,
    wire_value,
)
from paceline_wire.codecs.buffers import CHUNK_ELEMENTS
from paceline_wire.errors import CodecError, InvalidInputError
from paceline_wire.v1 import parameter_server_pb2 as pb
from support_core import ACCELERATOR, needs_gpu

FloatArray = npt.NDArray[np.float32]

BLOCKWISE = ("int8", "int4", "fp4")
LARGEST = float(np.finfo(np.float32).max)
SMALLEST_ABSMAX = 2.0**-119
SIZES = (0, 1, 2, 127, 128, 129, 255, 256, 257, 511, 512, 513, 700)
CHUNK_BORDERS = tuple(CHUNK_ELEMENTS * k + d for k, d in ((1, -1), (1, 0), (1, 1), (1, 257), (2, -257), (2, 0), (2, 1)))

# Examples are derived from the test, not from chance; a shared machine makes single calls slow now and then.
prop = settings(deadline=None, derandomize=True, max_examples=60)
each_codec = pytest.mark.parametrize("name", CODEC_NAMES)
each_dense = pytest.mark.parametrize("name", [name for name in CODEC_NAMES if not codec(name).sparse])
each_blockwise = pytest.mark.parametrize("name", BLOCKWISE)


# --- The reference: one element at a time, in numpy's float32 scalars, straight from the docstrings of the codecs.


def reference_encode(name: str, values: FloatArray) -> bytes:
    """Encode values as the docstrings say, element by element."""
    if name == "fp32":
        return b"".join(struct.pack("<f", x) for x in values)
    if name == "bf16":
        return b"".join(struct.pack("<H", _bf16_bits(x)) for x in values)
    scales, codes = b"", b""
    for at in range(0, len(values), BLOCK_ELEMENTS):
        block = [np.float32(x) for x in values[at : at + BLOCK_ELEMENTS]]
        block += [np.float32(0)] * (BLOCK_ELEMENTS - len(block))
        scale = _scale(name, max(abs(x) for x in block))
        step = _step(name, scale)
        inverse = np.float32(1) / step if step else np.float32(0)
        scales += struct.pack("<f", scale)
        codes += _code_bytes(name, [_code(name, float(x * inverse)) for x in block])
    return scales + codes


def reference_decode(name: str, payload: bytes, num_elements: int) -> FloatArray:
    """Decode a payload as the docstrings say, element by element."""
    if name == "fp32":
        return np.array(struct.unpack(f"<{num_elements}f", payload), np.float32)
    if name == "bf16":
        halves = struct.unpack(f"<{num_elements}H", payload)
        return np.array([struct.unpack("<f", struct.pack("<HH", 0, bits))[0] for bits in halves], np.float32)
    num_blocks = -(-num_elements // BLOCK_ELEMENTS)
    code_bytes = BLOCK_ELEMENTS if name == "int8" else BLOCK_ELEMENTS // 2
    scales, codes = struct.unpack(f"<{num_blocks}f", payload[: 4 * num_blocks]), payload[4 * num_blocks :]
    values = []
    for element in range(num_elements):
        block, at = divmod(element, BLOCK_ELEMENTS)
        byte = codes[block * code_bytes + at % code_bytes]
        bits = byte if name == "int8" else byte >> 4 if at >= code_bytes else byte & 15
        values.append(np.float32(_integer(name, bits)) * _step(name, np.float32(scales[block])))
    return np.array(values, np.float32)


def _bf16_bits(x: np.float32) -> int:
    (bits,) = struct.unpack("<I", struct.pack("<f", x))
    upper, lower = divmod(bits, 0x10000)
    return int(upper + (lower > 0x8000 or (lower == 0x8000 and upper % 2 == 1)))


def _scale(name: str, absmax: np.float32) -> np.float32:
    if absmax < SMALLEST_ABSMAX:
        return np.float32(0)
    if name == "fp4":
        return absmax
    quotient = absmax / np.float32(127 if name == "int8" else 7)
    (bits,) = struct.unpack("<I", struct.pack("<f", quotient))
    return np.float32(struct.unpack("<f", struct.pack("<I", bits - bits % 128))[0])


def _step(name: str, scale: np.float32) -> np.float32:
    return scale * np.float32(1 / 64) if name == "fp4" else scale


def _code(name: str, y: float) -> int:
    if name != "fp4":
        return round(y) % (256 if name == "int8" else 16)
    sign = 8 if math.copysign(1, y) < 0 else 0
    levels = [0, *(1 << m for m in range(7))]
    return sign + sum(abs(y) >= (below + above) / 2 for below, above in pairwise(levels))


def _integer(name: str, bits: int) -> int:
    if name == "int8":
        return bits - 256 if bits > 127 else bits
    if name == "int4":
        return bits - 16 if bits > 7 else bits
    magnitude = (0, 1, 2, 4, 8, 16, 32, 64)[bits % 8]
    return -magnitude if bits > 7 else magnitude


def _code_bytes(name: str, codes: list[int]) -> bytes:
    if name == "int8":
        return bytes(codes)
    half = BLOCK_ELEMENTS // 2
    return bytes(codes[j] | codes[j + half] << 4 for j in range(half))


# --- Inputs.


def finite_floats(largest: float = LARGEST) -> st.SearchStrategy[float]:
    """Draw float32 values up to a magnitude, subnormal ones too."""
    return st.floats(-largest, largest, width=32)


@st.composite
def float_arrays(draw: st.DrawFn, max_exponent: int = 126) -> FloatArray:
    """Draw finite values: of sizes around a block, all over the number line, or each block of one magnitude."""
    size = draw(st.sampled_from(SIZES))
    if draw(st.booleans()):
        return draw(
            hnp.arrays(np.float32, size, elements=finite_floats(min(2.0**max_exponent, LARGEST)), fill=st.just(0.0))
        )
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    exponents = generator.integers(-max_exponent - 10, max_exponent - 2, size=-(-size // BLOCK_ELEMENTS))
    magnitudes = np.repeat(np.ldexp(1.0, exponents), BLOCK_ELEMENTS)[:size]
    values: FloatArray = np.clip(generator.standard_normal(size) * magnitudes, -LARGEST, LARGEST).astype(np.float32)
    return values


def normal(size: int, seed: int = 0) -> torch.Tensor:
    """Return normally distributed values, the same for the same seed."""
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def roundtrip(name: str, values: torch.Tensor) -> torch.Tensor:
    """Encode, check and decode."""
    return decode(codec(name), encode(codec(name), values), values.numel())


def as_bytes(tensor: torch.Tensor) -> bytes:
    """Return a tensor's memory."""
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def with_scale(name: str, scale: float, codes: bytes = b"") -> bytes:
    """Return the payload of one block with this scale, and these first code bytes among zeros."""
    num_code_bytes = codec(name).encoded_bytes(1) - 4
    return struct.pack("<f", scale) + codes.ljust(num_code_bytes, b"\0")


# --- Layout and arithmetic.


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fp32", "0000803f 000000c0 0000003e 00000000"),
        ("bf16", "803f 00c0 003e 0000"),
        ("int8", "0002813c" + "40 81 08 00" + "00" * 252),  # 1.0, -2.0 and 0.125 of 2/127 = 0x3c810204
        ("int4", "0049923e" + "04 09 00 00" + "00" * 124),  # ... of 2/7 = 0x3e924925
        ("fp4", "00000040" + "06 0f 03 00" + "00" * 124),  # ... are 2^-1, -1 and 2^-4 of 2
    ],
)
def test_the_bytes_of_four_values_written_out_by_hand(name: str, expected: str) -> None:
    """The encoding of (1, -2, 1/8, 0) never changes."""
    payload = encode(codec(name), torch.tensor([1.0, -2.0, 0.125, 0.0]))
    assert bytes.fromhex(expected).hex(" ") == as_bytes(payload).hex(" ")


@each_dense
@prop
@given(values=float_arrays())
@example(values=np.full(257, LARGEST / 2, np.float32))
@example(values=np.linspace(-1, 1, 700).astype(np.float32))
@example(values=np.array([LARGEST * (1 - 2**-7), -1e38, 1.0], np.float32))
@example(values=np.array([SMALLEST_ABSMAX, -SMALLEST_ABSMAX / 3, 1e-45], np.float32))
@example(values=np.array([np.nextafter(np.float32(SMALLEST_ABSMAX), np.float32(0)), -1e-45, -0.0], np.float32))
@example(values=np.array([64, 48, 47.999996, 32, 24, 12, 6, 3, 1.5, 1.4999999, 0.5, 0.49999997, -0.5], np.float32))
def test_encoding_is_the_reference_encoding(name: str, values: FloatArray) -> None:
    """Every payload equals, byte for byte, what the specification gives element by element."""
    assert reference_encode(name, values) == as_bytes(encode(codec(name), torch.from_numpy(values)))


@each_dense
@prop
@given(size=st.sampled_from(SIZES), seed=st.integers(0, 2**32), exponent=st.integers(-149, 118))
def test_decoding_any_codes_is_the_reference_decoding(name: str, size: int, seed: int, exponent: int) -> None:
    """Arbitrary codes under any valid scale decode to what the specification says, the unused ones included."""
    generator = random.Random(seed)
    payload = bytearray(generator.randbytes(codec(name).encoded_bytes(size)))
    if name in BLOCKWISE:
        for block in range(-(-size // BLOCK_ELEMENTS)):
            struct.pack_into("<f", payload, 4 * block, math.ldexp(1 + generator.random(), exponent))
    else:
        sign_and_exponent_byte = range(codec(name).encoded_bytes(1) - 1, len(payload), codec(name).encoded_bytes(1))
        for at in sign_and_exponent_byte:
            payload[at] &= 0xBF  # an exponent below that of infinity
    expected = reference_decode(name, bytes(payload), size)
    assert expected.tobytes() == as_bytes(decode(codec(name), payload, size))


@each_dense
@pytest.mark.parametrize("size", [0, 1, 255, 256, 257, 4 * 1024 * 1024])
def test_sizes(name: str, size: int) -> None:
    """The encoded size is the documented function of the number of elements."""
    blocks = math.ceil(size / 256)
    expected = {"fp32": 4 * size, "bf16": 2 * size, "int8": 260 * blocks, "int4": 132 * blocks, "fp4": 132 * blocks}
    assert expected[name] == codec(name).encoded_bytes(size)


# --- Promises about values.


@prop
@given(values=float_arrays())
def test_fp32_is_bit_exact(values: FloatArray) -> None:
    """Every finite float32 comes back bit for bit, negative zeros and subnormal numbers too."""
    assert values.tobytes() == as_bytes(roundtrip("fp32", torch.from_numpy(values)))


@prop
@given(values=float_arrays())
def test_bf16_is_torch_bfloat16(values: FloatArray) -> None:
    """The error of bf16 is that of torch's own rounding to bfloat16."""
    tensor = torch.from_numpy(values)
    assert torch.equal(tensor.bfloat16().float(), roundtrip("bf16", tensor))


@pytest.mark.parametrize(("name", "steps"), [("int8", 127), ("int4", 7)])
@prop
@given(values=float_arrays(max_exponent=128))
@example(values=np.array([LARGEST, -LARGEST, LARGEST / 2, 1.0], np.float32))
@example(values=np.array([2 * SMALLEST_ABSMAX, SMALLEST_ABSMAX / 100], np.float32))
@example(values=np.array([1e-38, -1e-40], np.float32))
def test_integers_err_by_half_a_step(name: str, steps: int, values: FloatArray) -> None:
    """No value is off by more than half a step of its block, or by itself where the block is below 2^-119."""
    decoded = roundtrip(name, torch.from_numpy(values)).numpy().astype(np.float64)
    for at in range(0, len(values), BLOCK_ELEMENTS):
        block = values[at : at + BLOCK_ELEMENTS].astype(np.float64)
        error = np.abs(block - decoded[at : at + BLOCK_ELEMENTS]).max()
        absmax = np.abs(block).max()
        assert error <= (absmax if absmax < SMALLEST_ABSMAX else absmax / steps / 2 * (1 + 2**-13))


@prop
@given(values=float_arrays(max_exponent=128))
@example(values=np.array([LARGEST, -LARGEST / 2, LARGEST / 100], np.float32))
@example(values=np.array([SMALLEST_ABSMAX, SMALLEST_ABSMAX / 100], np.float32))
def test_fp4_takes_the_nearest_value(values: FloatArray) -> None:
    """No other value of the block's sixteen is nearer than the one chosen, up to rounding."""
    decoded = roundtrip("fp4", torch.from_numpy(values)).numpy().astype(np.float64)
    for at in range(0, len(values), BLOCK_ELEMENTS):
        block = values[at : at + BLOCK_ELEMENTS].astype(np.float64)
        absmax = np.abs(block).max()
        levels = np.array([0.0, *(2.0**-k for k in range(7))]) * (absmax if absmax >= SMALLEST_ABSMAX else 0)
        nearest = np.abs(np.abs(block)[:, None] - levels[None]).min(axis=1)
        assert np.all(np.abs(block - decoded[at : at + BLOCK_ELEMENTS]) <= nearest * (1 + 2**-20))


@each_codec
@prop
@given(values=float_arrays())
def test_decoded_values_are_kept_by_another_round(name: str, values: FloatArray) -> None:
    """Encoding decoded values loses nothing more, so passing values on through the codec is free."""
    once = roundtrip(name, torch.from_numpy(values))
    assert torch.equal(once, roundtrip(name, once))


@each_codec
@prop
@given(size=st.sampled_from(SIZES), seed=st.integers(0, 2**32), shift=st.integers(-100, 100))
def test_powers_of_two_pass_through(name: str, size: int, seed: int, shift: int) -> None:
    """Scaling by a power of two before encoding is the same as scaling after decoding, bit for bit."""
    values, factor = normal(size, seed), 2.0**shift
    assert torch.equal(roundtrip(name, values) * factor, roundtrip(name, values * factor))


@each_codec
@prop
@given(values=float_arrays())
def test_signs_pass_through(name: str, values: FloatArray) -> None:
    """Negating before encoding is the same as negating after decoding: no codec has a bias."""
    tensor = torch.from_numpy(values)
    assert torch.equal(-roundtrip(name, tensor), roundtrip(name, -tensor))


@each_blockwise
@pytest.mark.parametrize("largest", [0.0, 1e-45, 1e-38, SMALLEST_ABSMAX, 1.0, 2.0**121, 2.0**125, LARGEST])
def test_every_finite_magnitude_is_accepted(name: str, largest: float) -> None:
    """A finite block of any magnitude passes the check, and its largest value comes back within half a step."""
    values = torch.linspace(-1, 1, BLOCK_ELEMENTS).mul(largest)
    decoded = roundtrip(name, values)
    assert abs(float(decoded[0]) + largest) <= (largest / 14 if largest >= SMALLEST_ABSMAX else largest)


@each_blockwise
def test_blocks_do_not_touch_each_other(name: str) -> None:
    """A block encodes to the same bytes whatever its neighbours are, a broken one among them."""
    alone, neighbour = normal(BLOCK_ELEMENTS, 1), torch.full((BLOCK_ELEMENTS,), math.nan)
    code = codec(name)
    payload = encode(code, torch.cat([neighbour, alone, neighbour * 0 + 1e30]))
    code_bytes = code.encoded_bytes(1) - 4
    own = torch.cat([payload[4:8], payload[12 + code_bytes : 12 + 2 * code_bytes]])
    assert torch.equal(encode(code, alone), own)


# --- Ranges, chunks and buffers.


@each_codec
@pytest.mark.parametrize("size", [1, 256, 257, 1000, 1024])
def test_ranges_are_slices_of_the_whole(name: str, size: int) -> None:
    """Every range that starts with a block decodes to that slice of the whole, whatever its length."""
    payload = encode(codec(name), normal(size))
    whole = decode(codec(name), payload, size)
    for start in range(0, size + 1, BLOCK_ELEMENTS):
        for length in {0, 1, 100, 255, 256, 257, 512, 600, size - start}:
            if start + length <= size:
                out = torch.empty(length)
                codec(name).decode_range(payload, size, start, out)
                assert torch.equal(whole[start : start + length], out)


@each_codec
@pytest.mark.parametrize("size", CHUNK_BORDERS)
def test_chunk_borders_leave_no_trace(name: str, size: int) -> None:
    """Around multiples of the chunk, the whole is what its pieces of whole blocks are when coded by themselves."""
    values = normal(size)
    payload = encode(codec(name), values)
    whole = decode(codec(name), payload, size)
    pieces = [roundtrip(name, piece) for piece in torch.split(values, 96 * BLOCK_ELEMENTS)]
    assert torch.equal(torch.cat(pieces), whole)
    out = torch.empty(size - 3 * BLOCK_ELEMENTS)  # its chunks begin elsewhere
    codec(name).decode_range(payload, size, 3 * BLOCK_ELEMENTS, out)
    assert torch.equal(whole[3 * BLOCK_ELEMENTS :], out)


@each_codec
@pytest.mark.parametrize("offset", [1, 2, 3, 5])
def test_payloads_may_lie_at_any_byte(name: str, offset: int) -> None:
    """Encoding into, checking and decoding a slice of a larger buffer works at any offset, and stays inside it."""
    values = normal(1000)
    expected = encode(codec(name), values)
    buffer = torch.full((expected.numel() + 8,), 0xA5, dtype=torch.uint8)
    target = buffer[offset : offset + expected.numel()]
    codec(name).encode(values, target)
    assert torch.equal(expected, target)
    assert set(buffer[:offset].tolist() + buffer[offset + expected.numel() :].tolist()) == {0xA5}
    assert torch.equal(roundtrip(name, values), decode(codec(name), target, 1000))
    assert torch.equal(
        roundtrip(name, values), decode(codec(name), memoryview(bytes(buffer))[offset:][: len(target)], 1000)
    )


@each_codec
def test_the_input_is_not_changed(name: str) -> None:
    """Encoding leaves the values alone, and decoding the payload."""
    values = normal(1000)
    before = values.clone()
    payload = encode(codec(name), values)
    coded = payload.clone()
    decode(codec(name), payload, 1000)
    assert torch.equal(before, values)
    assert torch.equal(coded, payload)


@needs_gpu
@each_codec
@pytest.mark.parametrize("size", [257, CHUNK_ELEMENTS + 1])
def test_gpu_has_the_same_bits(name: str, size: int) -> None:
    """A GPU writes the same payload as the processor and reads the same values from it."""
    values = normal(size)
    payload = encode(codec(name), values.to(ACCELERATOR))
    assert torch.equal(encode(codec(name), values), payload.cpu())
    assert torch.equal(roundtrip(name, values), decode(codec(name), payload, size).cpu())


def test_writable_buffers_are_shared() -> None:
    """A bytearray, and a slice of one, becomes a tensor over the same memory."""
    buffer = bytearray(b"abcdef")
    tensor = payload_tensor(memoryview(buffer)[2:4])
    buffer[2] = 0xFF
    assert [0xFF, ord("d")] == tensor.tolist()


@pytest.mark.parametrize(
    "buffer", [b"abc", memoryview(b"abc"), memoryview(b"a-b-c")[::2], memoryview(bytearray(b"a-b-c"))[::2]]
)
def test_other_buffers_are_copied(buffer: bytes | memoryview) -> None:
    """Read-only or strided buffers become a tensor with memory of its own, without a warning."""
    tensor = payload_tensor(buffer)
    tensor.add_(1)
    assert as_bytes(tensor) == b"bcd"
    assert bytes(buffer) == b"abc"


@pytest.mark.parametrize("buffer", [b"", bytearray(), memoryview(b"")])
def test_empty_buffers_are_empty_tensors(buffer: bytes | bytearray | memoryview) -> None:
    """No bytes make a tensor of no elements."""
    assert payload_tensor(buffer).numel() == 0


# --- What must be refused.


@each_codec
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 255, 256, 299])
def test_values_that_are_not_finite_are_refused_at_the_check(name: str, bad: float, at: int) -> None:
    """Encoding infinities or NaN does not raise; the check refuses the payload, wherever they stand."""
    values = normal(300)
    values[at] = bad
    payload = encode(codec(name), values)
    with pytest.raises(CodecError, match=name):
        codec(name).check(payload, 300)


@each_blockwise
@pytest.mark.parametrize("bits", [0x7F800001, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF, 0x7FC00000])
def test_every_nan_is_refused(name: str, bits: int) -> None:
    """The NaNs whose mantissa lies in the bits that a scale drops are no exception."""
    values = torch.ones(300).view(torch.int32).fill_(bits - (bits >> 31 << 32)).view(torch.float32)
    with pytest.raises(CodecError, match="scale"):
        codec(name).check(encode(codec(name), values), 300)


def test_bf16_refuses_what_rounds_to_infinity() -> None:
    """The largest float32 is beyond bfloat16: no exception at encoding, refused at the check."""
    payload = encode(codec("bf16"), torch.tensor([LARGEST]))
    with pytest.raises(CodecError, match="infinite"):
        codec("bf16").check(payload, 1)


@each_blockwise
@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf, -1.0, -1e-45, -LARGEST])
def test_wrong_scales_are_refused_by_name(name: str, scale: float) -> None:
    """A scale that no encoder writes is refused with its block and value."""
    good = encode(codec(name), torch.ones(3 * BLOCK_ELEMENTS)).numpy().tobytes()
    payload = good[:4] + struct.pack("<f", scale) + good[8:]
    with pytest.raises(CodecError, match=re.escape(f"scale of block 1 is {np.float32(scale).item()} ")):
        decode(codec(name), payload, 3 * BLOCK_ELEMENTS)


@pytest.mark.parametrize(
    ("name", "scale", "codes"),
    [
        ("int8", LARGEST / 127, b"\x80"),
        ("int8", LARGEST, b"\2"),
        ("int4", LARGEST / 7, b"\x08"),
        ("int4", LARGEST, b"\x20"),
    ],
)
def test_values_beyond_float32_are_refused(name: str, scale: float, codes: bytes) -> None:
    """A finite scale that overflows with some code present is refused, and accepted without that code."""
    with pytest.raises(CodecError, match="beyond"):
        decode(codec(name), with_scale(name, scale, codes), BLOCK_ELEMENTS)
    assert decode(codec(name), with_scale(name, scale, b"\1"), BLOCK_ELEMENTS).isfinite().all()


@each_codec
def test_other_sizes_are_refused(name: str) -> None:
    """A payload that is too short, too long, or of another number of blocks is refused, and says the right size."""
    payload = as_bytes(encode(codec(name), normal(300)))
    for wrong in (b"", payload[:-1], payload + b"\0", payload[: len(payload) // 2], payload * 2):
        with pytest.raises(CodecError, match=f"has {len(payload)} bytes"):
            decode(codec(name), wrong, 300)


@each_codec
@pytest.mark.parametrize("num_elements", [-1, -256, 10**15, 2**64 - 1])
def test_absurd_counts_are_refused_before_memory_is_taken(name: str, num_elements: int) -> None:
    """A number of elements that the payload cannot have is an error, not an allocation."""
    with pytest.raises(CodecError):
        decode(codec(name), b"", num_elements)


@each_codec
@pytest.mark.parametrize(("start", "length"), [(-256, 1), (1, 1), (255, 1), (256, 257), (768, 1), (0, 513)])
def test_ranges_outside_are_refused(name: str, start: int, length: int) -> None:
    """A range that does not start with a block, or leaves the elements, is refused."""
    payload = encode(codec(name), normal(512))
    with pytest.raises(CodecError, match="range"):
        codec(name).decode_range(payload, 512, start, torch.empty(length))


@each_codec
def test_wrong_tensors_are_refused(name: str) -> None:
    """Tensors of another type, shape, layout or size raise the family's error, never torch's."""
    code, values = codec(name), normal(256)
    payload = encode(code, values)
    for bad in (values.double(), values.view(16, 16), values[::2], values.clone().requires_grad_()):
        with pytest.raises(InvalidInputError):
            encode(code, bad)
        with pytest.raises(CodecError):
            code.decode_range(payload, 256, 0, bad)
    for out in (payload[1:], payload.view(torch.int8), torch.empty(2 * len(payload), dtype=torch.uint8)[::2]):
        with pytest.raises(InvalidInputError):
            code.encode(values, out)
    for wrong in (payload.view(torch.int8), payload[None], payload.float()):
        with pytest.raises(CodecError):
            code.check(wrong, 256)
        with pytest.raises(CodecError):
            decode(code, wrong, 256)


@each_codec
def test_any_bytes_decode_to_finite_values_or_are_refused(name: str) -> None:
    """Decoding returns finite values or raises CodecError, nothing else, over thousands of damaged payloads."""
    generator = random.Random(f"fuzz {name}")
    outcomes = {"decoded": 0, "refused": 0}
    valid = {size: as_bytes(encode(codec(name), normal(size) * 1e3)) for size in (1, 256, 300, 700)}
    for _ in range(4000):
        size = generator.choice([*valid, generator.randrange(1000)])
        payload = _damaged(generator, codec(name), size, valid.get(size))
        try:
            values = decode(codec(name), payload, size)
        except CodecError:
            outcomes["refused"] += 1
        else:
            outcomes["decoded"] += 1
            assert (size,) == values.shape
            assert math.isfinite(float(values.abs().sum(dtype=torch.float64)))
    assert min(outcomes.values()) > 400, outcomes


def _damaged(generator: random.Random, codec: Codec, size: int, valid: bytes | None) -> bytes:
    """Return random bytes, or a valid payload with its size changed, its bits flipped, or numbers written over it."""
    payload = bytearray(valid or generator.randbytes(codec.encoded_bytes(size)))
    for _ in range(generator.randrange(3)):
        at = generator.randrange(len(payload) + 1)
        match generator.randrange(5):
            case 0:
                del payload[at : at + generator.randrange(1, 9)]
            case 1:
                payload[at:at] = generator.randbytes(generator.randrange(1, 9))
            case 2 if at < len(payload):
                payload[at] ^= 1 << generator.randrange(8)
            case 3 if len(payload) >= 4:
                number = generator.choice([math.nan, math.inf, -1.0, -0.0, 1e-45, LARGEST, LARGEST / 127, LARGEST / 7])
                struct.pack_into("<f", payload, min(at // 4 * 4, len(payload) - 4), number)
            case _:
                payload[at:] = generator.randbytes(len(payload) - at)
    return bytes(payload)


# --- Names.


def test_names_and_wire_values_match_the_protocol() -> None:
    """Every codec of the protocol is in the registry and the other way round, under the same name."""
    protocol = {name: value for name, value in pb.Codec.items() if value != pb.CODEC_UNSPECIFIED}
    assert protocol == {f"CODEC_{name.upper()}": wire_value(codec(name)) for name in CODEC_NAMES}
    assert [codec(name) for name in CODEC_NAMES] == [codec_of_wire(wire_value(codec(name))) for name in CODEC_NAMES]
    assert list(CODEC_NAMES) == [codec(name).name for name in CODEC_NAMES]


@pytest.mark.parametrize(
    ("name", "hint"), [("int3", "did you mean int"), ("bf61", "bf16"), ("zstd", "fp32, bf16, int8")]
)
def test_unknown_names_are_refused_with_the_nearest(name: str, hint: str) -> None:
    """A name that no codec has raises an error that says which ones there are."""
    with pytest.raises(InvalidInputError, match=f"{name}.*{hint}"):
        codec(name)


@pytest.mark.parametrize("value", [0, -1, 7, 1000])
def test_unknown_wire_values_are_refused(value: int) -> None:
    """A number that stands for no codec is an error of the payload."""
    with pytest.raises(CodecError, match="codec"):
        codec_of_wire(value)


def test_a_codec_unknown_to_the_protocol_has_no_wire_value() -> None:
    """A codec that the protocol does not list cannot be sent."""

    class Other(Int8Codec):
        name = "other"

    with pytest.raises(InvalidInputError, match="other"):
        wire_value(Other())
