"""The sparse codec topk: its bytes against a slow reference, what it keeps, how well, and what must be refused."""

import math
import random
import struct
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from paceline_wire.codecs import BLOCK_ELEMENTS, Codec, TopkCodec, codec, codec_of_wire, compensate, decode, encode
from paceline_wire.codecs.buffers import CHUNK_ELEMENTS
from paceline_wire.codecs.topk import TOPK_BLOCK_ELEMENTS
from paceline_wire.errors import CodecError, InvalidInputError
from paceline_wire.v1 import parameter_server_pb2 as pb

FloatArray = npt.NDArray[np.float32]

BLOCK = TOPK_BLOCK_ELEMENTS
LARGEST = float(np.finfo(np.float32).max)
SMALLEST = 2.0**-119
SIZES = (0, 1, 63, 64, 65, 128, 4095, 4096, 4097, 4160, 4161, 9000)
TOPK = codec("topk")

prop = settings(deadline=None, derandomize=True, max_examples=60)
each_size = pytest.mark.parametrize("size", SIZES)


# --- The reference: one element at a time, straight from the docstring of the codec.


def reference_encode(values: FloatArray) -> bytes:
    """Encode values as the docstring says, element by element."""
    levels, places, codes = b"", [], []
    for at in range(0, len(values), BLOCK):
        block = values[at : at + BLOCK]
        kept = sorted(sorted(range(len(block)), key=lambda place: (-abs(block[place]), place))[: num_kept(len(block))])
        low, high = _levels(sorted((float(abs(block[place])) for place in kept), reverse=True))
        levels += struct.pack("<f", low)[2:] + struct.pack("<f", high)[2:]
        middle = np.float32(low / 2) + np.float32(high / 2)
        for place in kept:
            places.append(at + place)
            codes.append(int(abs(block[place]) >= middle) + 2 * int(np.signbit(block[place])))
    return levels + _place_bytes(places) + _code_bytes(codes)


def reference_decode(payload: bytes, num_elements: int) -> FloatArray:
    """Decode a payload as the docstring says, element by element."""
    num_blocks, kept = math.ceil(num_elements / BLOCK), num_kept(num_elements)
    places, codes = payload[4 * num_blocks : 4 * num_blocks + kept], payload[4 * num_blocks + kept :]
    row = [place >> bit & 1 for place in places for bit in (6, 7)]
    set_bits = [position for position, bit in enumerate(row) if bit]
    values = np.zeros(num_elements, np.float32)
    for i, (position, place) in enumerate(zip(set_bits, places, strict=True)):
        code = codes[i // 4] >> 2 * (i % 4) & 3
        upper_bytes = payload[4 * (i // 64) + 2 * (code & 1) :][:2]
        (magnitude,) = struct.unpack("<f", b"\0\0" + upper_bytes)
        values[64 * (position - i) + place % 64] = -magnitude if code & 2 else magnitude
    return values


def num_kept(num_elements: int) -> int:
    """How many of that many elements are kept."""
    return math.ceil(num_elements / 64)


def _levels(descending: list[float]) -> tuple[float, float]:
    a = [x if x >= SMALLEST else 0.0 for x in descending]
    k = len(a)
    above, below = _sums_by_doubling(a), [*_sums_by_doubling(a[::-1])[::-1][1:], 0.0]
    high, low = [above[s - 1] / s for s in range(1, k + 1)], [below[s - 1] / max(k - s, 1) for s in range(1, k + 1)]
    scores = [above[at] * high[at] + below[at] * low[at] for at in range(k)]
    best = scores.index(max(scores))
    return _short(low[best]), _short(high[best])


def _sums_by_doubling(terms: list[float]) -> list[float]:
    distance = 1
    while distance < len(terms):
        terms = [term + terms[at - distance] if at >= distance else term for at, term in enumerate(terms)]
        distance *= 2
    return terms


def _short(mean: float) -> float:
    rounded = float(np.float32(mean))
    upper = struct.pack("<f", rounded if rounded >= SMALLEST else 0.0)[2:]
    return float(struct.unpack("<f", b"\0\0" + upper)[0])


def _place_bytes(places: list[int]) -> bytes:
    row = [0] * (2 * len(places))
    for i, place in enumerate(places):
        row[place // 64 + i] = 1
    return bytes(place % 64 + 64 * row[2 * i] + 128 * row[2 * i + 1] for i, place in enumerate(places))


def _code_bytes(codes: list[int]) -> bytes:
    padded = codes + [0] * (-len(codes) % 4)
    return bytes(sum(padded[at + j] << 2 * j for j in range(4)) for at in range(0, len(padded), 4))


# --- Inputs.


@st.composite
def float_arrays(draw: st.DrawFn) -> FloatArray:
    """Draw finite values: anything, many equal ones, few that are not 0, or of a bell or a long-tailed curve."""
    size = draw(st.sampled_from(SIZES))
    kind = draw(st.sampled_from(["anything", "equal", "few", "normal", "tailed"]))
    if kind == "anything":
        return draw(hnp.arrays(np.float32, size, elements=st.floats(-LARGEST, LARGEST, width=32), fill=st.just(0.0)))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    if kind == "equal":
        return generator.integers(-3, 4, size).astype(np.float32)
    normal = generator.standard_normal(size) * 2.0 ** draw(st.integers(-130, 100))
    if kind == "few":
        normal[generator.random(size) < 0.99] = 0.0
    if kind == "tailed":
        normal *= np.ldexp(1.0, generator.integers(-40, 20, size))
    return normal.astype(np.float32)


def normal(size: int, seed: int = 0) -> torch.Tensor:
    """Return normally distributed values, the same for the same seed."""
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def roundtrip(values: torch.Tensor) -> torch.Tensor:
    """Encode, check and decode."""
    return decode(TOPK, encode(TOPK, values), values.numel())


def as_bytes(tensor: torch.Tensor) -> bytes:
    """Return a tensor's memory."""
    return tensor.numpy().tobytes()


def blocks_of(values: FloatArray) -> list[slice]:
    """Return where each block of values lies."""
    return [slice(at, at + BLOCK) for at in range(0, len(values), BLOCK)]


# --- Layout and arithmetic.


def test_the_bytes_of_some_values_written_out_by_hand() -> None:
    """The encoding of 130 values, three of which are not 0, never changes."""
    values = torch.zeros(130)
    values[3], values[70], values[129] = -1.0, 4.0, 1.5
    # low is 1.25 = 0x3fa0, high 4.0 = 0x4080. Places 3 = 0 * 64 + 3, 70 = 1 * 64 + 6 and 129 = 2 * 64 + 1 set the bits
    # 0 + 0, 1 + 1 and 2 + 2 of the row: 10 10 10. The codes are 2, 1 and 0.
    assert bytes.fromhex("a03f 8040" + "43 46 41" + "06").hex(" ") == as_bytes(encode(TOPK, values)).hex(" ")


@prop
@given(values=float_arrays())
@example(values=np.full(4097, LARGEST, np.float32))
@example(values=np.array([SMALLEST, *[SMALLEST / 3] * 99, 1e-45], np.float32))
@example(values=np.array([-0.0, 0.0] * 50, np.float32))
def test_encoding_is_the_reference_encoding(values: FloatArray) -> None:
    """Every payload equals, byte for byte, what the specification gives element by element."""
    assert reference_encode(values) == as_bytes(encode(TOPK, torch.from_numpy(values)))


@prop
@given(size=st.sampled_from(SIZES), seed=st.integers(0, 2**32))
def test_decoding_any_valid_payload_is_the_reference_decoding(size: int, seed: int) -> None:
    """Any magnitudes in order, any ascending places and any codes decode to what the specification says."""
    generator = random.Random(seed)
    levels, places = b"", []
    for at in range(0, size, BLOCK):
        low, high = sorted(generator.uniform(0, 2.0 ** generator.randrange(-120, 120)) for _ in range(2))
        levels += struct.pack("<f", low)[2:] + struct.pack("<f", high)[2:]
        block = range(at, min(at + BLOCK, size))
        places += sorted(generator.sample(block, num_kept(len(block))))
    payload = levels + _place_bytes(places) + generator.randbytes(math.ceil(len(places) / 4))
    assert reference_decode(payload, size).tobytes() == as_bytes(decode(TOPK, payload, size))


@pytest.mark.parametrize(
    ("size", "expected"),
    [(0, 0), (1, 6), (63, 6), (64, 6), (65, 7), (4095, 84), (4096, 84), (4097, 90), (4 * 1024 * 1024, 86016)],
)
def test_sizes(size: int, expected: int) -> None:
    """The size is that of the magnitudes, a byte for each place and 2 bits for each code, from the count alone."""
    assert expected == TOPK.encoded_bytes(size) == encode(TOPK, normal(size)).numel()


def test_large_fragments_take_less_than_a_fortieth_of_a_byte_per_element() -> None:
    """Four million elements stay well below the 0.03 bytes an element that the codec is meant for."""
    assert TOPK.encoded_bytes(4 * 1024 * 1024) < 4 * 1024 * 1024 / 40


# --- What is kept, and how well.


@each_size
def test_exactly_as_many_are_kept_as_the_size_says(size: int) -> None:
    """Of values that are all different and not 0, one of 64 comes back in every block, rounded up."""
    decoded = roundtrip(normal(size)).numpy()
    counts = [int(np.count_nonzero(decoded[block])) for block in blocks_of(decoded)]
    assert [num_kept(len(decoded[block])) for block in blocks_of(decoded)] == counts


@prop
@given(values=float_arrays())
def test_the_largest_are_kept(values: FloatArray) -> None:
    """No element that is left out of a block is larger than one of the block that comes back."""
    decoded = roundtrip(torch.from_numpy(values)).numpy()
    for block in blocks_of(values):
        kept = decoded[block] != 0
        if kept.any() and not kept.all():
            assert np.abs(values[block][kept]).min() >= np.partition(np.abs(values[block]), -kept.sum())[-kept.sum()]


@pytest.mark.parametrize("size", [64, 65, 1000, 4096, 4097, 8192])
@pytest.mark.parametrize("value", [1.0, -2.5])
def test_of_equal_elements_the_first_are_kept(size: int, value: float) -> None:
    """Where all are equal, those that come first in each block come back, and exactly."""
    decoded = roundtrip(torch.full((size,), value))
    expected = torch.zeros(size)
    for block in blocks_of(expected.numpy()):
        expected[block.start : block.start + num_kept(min(block.stop, size) - block.start)] = value
    assert torch.equal(expected, decoded)


def test_equal_elements_at_the_border_are_kept_in_order() -> None:
    """Larger ones are kept wherever they stand, and of the equal ones that compete for the rest, the first."""
    values = torch.ones(BLOCK)
    values[-60:] = 2.0
    decoded = roundtrip(values)
    assert [0, 1, 2, 3, *range(BLOCK - 60, BLOCK)] == decoded.nonzero().flatten().tolist()
    assert torch.equal(values * (decoded != 0), decoded)


@each_size
def test_zeros_stay_zeros(size: int) -> None:
    """Nothing comes of nothing, and the payload is accepted."""
    assert torch.equal(torch.zeros(size), roundtrip(torch.zeros(size)))


def test_few_values_do_not_leak_into_the_zeros() -> None:
    """Where the values that are not 0 have one magnitude, kept zeros come back as zeros."""
    values = torch.zeros(BLOCK)
    values[100:110] = torch.tensor([3.0, -3.0] * 5)
    assert torch.equal(values, roundtrip(values))


@prop
@given(values=float_arrays())
def test_a_round_trip_is_a_contraction(values: FloatArray) -> None:
    """In no block is the squared error above the sum of squares, and it is below it where anything counts."""
    decoded = roundtrip(torch.from_numpy(values)).numpy().astype(np.float64)
    for block in blocks_of(values):
        squares = np.square(values[block].astype(np.float64)).sum()
        error = np.square(values[block] - decoded[block]).sum()
        assert error < squares if np.abs(values[block]).max(initial=0.0) >= SMALLEST else error == squares


@prop
@given(values=float_arrays())
def test_no_other_two_magnitudes_are_much_better(values: FloatArray) -> None:
    """What is kept errs by the least squares that any two magnitudes could have, but for clearing their bits."""
    decoded = roundtrip(torch.from_numpy(values)).numpy().astype(np.float64)
    for block in blocks_of(values):
        magnitudes, k = np.abs(values[block].astype(np.float64)), num_kept(len(values[block]))
        largest = np.sort(magnitudes)[::-1][:k]
        if largest[0] < SMALLEST:
            continue
        least = min(
            sum(np.square(part - part.mean()).sum() for part in (largest[:s], largest[s:]) if len(part))
            for s in range(1, k + 1)
        )
        left_out = np.square(np.sort(magnitudes)[::-1][k:]).sum()
        error = np.square(values[block] - decoded[block]).sum()
        allowed = 2.0**-14 * np.square(largest).sum() + k * SMALLEST**2
        assert error - left_out <= least + allowed + 1e-12 * error


def test_error_of_normal_values() -> None:
    """Over the kept ones of normal values, two magnitudes err by the share of squares that the docstring says."""
    values = normal(200 * BLOCK)
    decoded = roundtrip(values)
    kept = values[decoded != 0]
    share = float(((kept - decoded[decoded != 0]) ** 2).sum() / (kept**2).sum())
    assert share == pytest.approx(0.0037, abs=0.0002)


@prop
@given(values=float_arrays())
def test_decoded_values_are_kept_by_another_round(values: FloatArray) -> None:
    """Encoding decoded values loses nothing more."""
    once = roundtrip(torch.from_numpy(values))
    assert torch.equal(once, roundtrip(once))


@prop
@given(size=st.sampled_from(SIZES), seed=st.integers(0, 2**32), shift=st.integers(-100, 100))
def test_powers_of_two_pass_through(size: int, seed: int, shift: int) -> None:
    """Scaling by a power of two before encoding is the same as scaling after decoding, bit for bit."""
    values, factor = normal(size, seed), 2.0**shift
    assert torch.equal(roundtrip(values) * factor, roundtrip(values * factor))


@prop
@given(values=float_arrays())
def test_signs_pass_through(values: FloatArray) -> None:
    """Negating before encoding is the same as negating after decoding, zeros that are kept among them."""
    tensor = torch.from_numpy(values)
    assert torch.equal(-roundtrip(tensor), roundtrip(-tensor))


# --- Ranges.


@prop
@given(
    size=st.sampled_from(SIZES),
    seed=st.integers(0, 2**32),
    start=st.integers(0, 40),
    length=st.integers(0, 9000),
)
def test_ranges_are_slices_of_the_whole(size: int, seed: int, start: int, length: int) -> None:
    """A range that starts within one block and ends within another decodes to that slice of the whole."""
    start = min(start * BLOCK_ELEMENTS, size // BLOCK_ELEMENTS * BLOCK_ELEMENTS)
    payload = encode(TOPK, normal(size, seed))
    out = torch.full((min(length, size - start),), math.nan)
    TOPK.decode_range(payload, size, start, out)
    assert torch.equal(decode(TOPK, payload, size)[start : start + out.numel()], out)


def test_pieces_of_a_fragment_are_the_whole() -> None:
    """Decoding in the pieces that the server works on gives the whole, the last one being shorter."""
    size = 2 * CHUNK_ELEMENTS + 5000
    payload = encode(TOPK, normal(size))
    pieces = []
    for start in range(0, size, CHUNK_ELEMENTS):
        pieces.append(torch.empty(min(CHUNK_ELEMENTS, size - start)))
        TOPK.decode_range(payload, size, start, pieces[-1])
    assert torch.equal(decode(TOPK, payload, size), torch.cat(pieces))


# --- Error feedback.


class WithoutDecay(TopkCodec):
    """The codec as it would be if all of a residual were carried over."""

    residual_decay = 1.0


def arrived_after(code: Codec, values: torch.Tensor, rounds: int) -> torch.Tensor:
    """Send the same values many times with error feedback; return the sum of what arrived."""
    arrived, residual = torch.zeros(values.shape, dtype=torch.float64), None
    for _ in range(rounds):
        encoded = compensate(code, values, residual)
        arrived, residual = arrived + encoded.decode(), encoded.residual
    return arrived


@pytest.mark.parametrize("size", [64, 1000, 4097])
def test_without_decay_the_sum_of_what_arrives_approaches_the_sum_of_what_was_given(size: int) -> None:
    """What is missing after many pushes does not grow with their number: every element's turn comes."""
    values = normal(size)
    missing = [float((rounds * values - arrived_after(WithoutDecay(), values, rounds)).norm()) for rounds in (300, 600)]
    assert missing[1] < 1.1 * missing[0]
    assert missing[1] < 0.15 * 600 * float(values.norm())


def test_decay_gives_a_value_that_waits_the_share_that_the_docstring_says() -> None:
    """Equal values take turns of 64 pushes, after each of which they arrive as the decayed sum of what waited."""
    rounds = 20 * 64
    arrived = arrived_after(TOPK, torch.ones(BLOCK), rounds)
    per_turn = (1 - 0.95**64) / 0.05
    assert float(arrived.mean()) / rounds * 64 == pytest.approx(per_turn, rel=0.1)


@prop
@given(values=float_arrays())
def test_the_residual_is_exact_but_for_values_far_below_their_magnitude(values: FloatArray) -> None:
    """What arrives and what is left is what was given: exactly, or to 2^-24 of a magnitude that is twice as large."""
    tensor = torch.from_numpy(values)
    encoded = compensate(TOPK, tensor)
    assert encoded.residual is not None
    off = (encoded.decode().double() + encoded.residual.double() - tensor.double()).abs()
    rounded = tensor.abs() < encoded.decode().abs() / 2
    assert torch.all(off <= torch.where(rounded, encoded.decode().abs().double() * 2.0**-24, 0.0))


# --- What must be refused.


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 63, 4095, 4096, 4999])
@pytest.mark.parametrize("num_bad", [1, 100])
def test_values_that_are_not_finite_are_refused_at_the_check(bad: float, at: int, num_bad: int) -> None:
    """Encoding infinities or NaN does not raise; the check refuses the payload and says that they are not finite."""
    values = normal(5000)
    values[at : at + num_bad] = bad
    payload = encode(TOPK, values)
    with pytest.raises(CodecError, match=f"block {at // BLOCK} are .*infinite or NaN"):
        TOPK.check(payload, 5000)


def test_infinities_of_both_signs_are_refused() -> None:
    """They do not cancel."""
    with pytest.raises(CodecError, match="infinite or NaN"):
        roundtrip(torch.tensor([math.inf, -math.inf] * 100))


def test_every_finite_magnitude_is_accepted() -> None:
    """Values up to the largest float32 stay finite."""
    values = torch.full((BLOCK,), LARGEST)
    decoded = roundtrip(values)
    assert float(decoded[0]) == pytest.approx(LARGEST, rel=2.0**-7)
    assert math.isfinite(float(decoded.double().sum()))


@pytest.mark.parametrize(
    ("low", "high"),
    [
        (0.0, math.inf),
        (0.0, math.nan),
        (math.nan, 1.0),
        (math.inf, math.inf),
        (-1.0, 1.0),
        (-0.0, 1.0),
        (-2.0, -1.0),
        (2.0, 1.0),
    ],
)
def test_wrong_magnitudes_are_refused(low: float, high: float) -> None:
    """Magnitudes that no encoder writes are refused, with their block."""
    payload = bytearray(as_bytes(encode(TOPK, normal(3 * BLOCK))))
    payload[4:8] = struct.pack("<f", low)[2:] + struct.pack("<f", high)[2:]
    with pytest.raises(CodecError, match="magnitudes of block 1 are "):
        TOPK.check(torch.frombuffer(payload, dtype=torch.uint8), 3 * BLOCK)


def with_places(places: list[int], size: int) -> bytes:
    """Return a payload with these places, which may be wrong."""
    sound = as_bytes(encode(TOPK, normal(size)))
    at = 4 * math.ceil(size / BLOCK)
    return sound[:at] + _place_bytes(places) + sound[at + len(places) :]


FIRST, SECOND = list(range(64)), list(range(BLOCK, BLOCK + 64))


@pytest.mark.parametrize(
    ("places", "size"),
    [
        ([*FIRST[:-1], 62, *SECOND], 2 * BLOCK),
        ([1, 0, *FIRST[2:], *SECOND], 2 * BLOCK),
        ([*FIRST, BLOCK - 1, *SECOND[1:]], 2 * BLOCK),
        ([*FIRST[:-1], BLOCK, *SECOND[1:], BLOCK + 64], 2 * BLOCK),
        ([*FIRST, BLOCK + 5], BLOCK + 5),
        ([7], 7),
    ],
    ids=["twice", "descending", "65 of a block", "63 of a block", "behind the end", "behind the end of few"],
)
def test_wrong_places_are_refused(places: list[int], size: int) -> None:
    """Places that do not ascend, leave their block or leave the elements are refused, and which one is said."""
    with pytest.raises(CodecError, match=r"kept element \d+ is at place"):
        decode(TOPK, with_places(places, size), size)


@pytest.mark.parametrize(("at", "byte"), [(0, 0x00), (63, 0x80)])
def test_too_few_or_many_places_are_refused(at: int, byte: int) -> None:
    """A row with another number of set bits than there are kept elements is refused."""
    payload = bytearray(as_bytes(encode(TOPK, torch.ones(BLOCK))))
    payload[4 + at] = byte
    with pytest.raises(CodecError, match="places of 64"):
        decode(TOPK, payload, BLOCK)


def test_every_flipped_bit_is_decoded_or_refused() -> None:
    """Whichever bit of a payload changes, there are finite values at valid places, or an error of the payload."""
    size = BLOCK + 200
    payload, outcomes = as_bytes(encode(TOPK, normal(size))), {"decoded": 0, "refused": 0}
    for at in range(8 * len(payload)):
        damaged = bytearray(payload)
        damaged[at // 8] ^= 1 << at % 8
        try:
            values = decode(TOPK, damaged, size)
        except CodecError:
            outcomes["refused"] += 1
        else:
            outcomes["decoded"] += 1
            assert bool(values.isfinite().all())
            assert reference_decode(bytes(damaged), size).tobytes() == as_bytes(values)
    assert outcomes["refused"] >= 2 * (64 + 4), outcomes  # a mark that is set or missing never goes unseen


@prop
@given(size=st.sampled_from(SIZES), data=st.data())
def test_any_bytes_of_the_right_size_decode_or_are_refused(size: int, data: st.DataObject) -> None:
    """Bytes that nobody encoded are refused, or are what the reference makes of them."""
    length = TOPK.encoded_bytes(size)
    payload = data.draw(st.binary(min_size=length, max_size=length))
    try:
        values = decode(TOPK, payload, size)
    except CodecError:
        return
    assert reference_decode(payload, size).tobytes() == as_bytes(values)


@each_size
def test_truncated_payloads_are_refused(size: int) -> None:
    """A payload that lacks bytes, or has some too many, is refused by check and by decode_range."""
    payload = encode(TOPK, normal(size))
    wrong = [torch.cat([payload, payload.new_zeros(1)]), *(payload[:cut] for cut in range(0, len(payload), 7))]
    for damaged in wrong:
        with pytest.raises(CodecError, match=f"has {len(payload)} bytes"):
            TOPK.check(damaged, size)
        with pytest.raises(CodecError, match=f"has {len(payload)} bytes"):
            TOPK.decode_range(damaged, size, 0, torch.empty(size))


# --- What it is for.


def test_it_is_the_only_sparse_codec_and_the_only_one_that_decays() -> None:
    """Only topk is marked as sparse and has a decay, SparseLoCo's; and it has its number in the protocol."""
    assert codec_of_wire(pb.CODEC_TOPK) is TOPK
    assert TOPK.sparse
    assert TOPK.residual_decay == 0.95
    for name in ("fp32", "bf16", "int8", "int4", "fp4"):
        assert not codec(name).sparse
        assert codec(name).residual_decay == 1.0


def test_sizes_grow_with_the_number_of_elements() -> None:
    """More elements never take fewer bytes, so a limit for the largest fragment holds for all."""
    assert all(TOPK.encoded_bytes(n) <= TOPK.encoded_bytes(m) for n, m in pairwise(range(9000)))


def test_a_wrong_target_is_refused() -> None:
    """A target that does not have the encoding's size is the caller's mistake."""
    with pytest.raises(InvalidInputError, match="needs 84 bytes"):
        TOPK.encode(normal(BLOCK), torch.empty(83, dtype=torch.uint8))
