"""The sparse codec topk: the 64 largest of every 4096 elements, at 0.0205 bytes an element, for pushes.

Source: SparseLoCo, arXiv 2508.15706, which keeps the largest in magnitude of every chunk, writes them in 2 bits, and
carries the rest over with a decay of 0.95. How places and values are written here is this package's own.

Layout of the encoding of n elements, in B = ceil(n / 4096) blocks of which K = ceil(n / 64) elements are kept: 64 of a
full block, ceil(m / 64) of a last one of m elements. Kept elements are in ascending order of their places.

    4 B bytes       each block's two magnitudes, low and high, each the upper 2 bytes of a float32, little-endian
    K bytes         the places, a byte each, see below
    ceil(K / 4)     the codes, 2 bits each, from the lowest bits up; what is left of the last byte is 0

A code's lower bit says which magnitude, 1 for high; its upper bit is 1 for minus. Elements that are not kept are +0.
Decoders do not look at what is left of the last byte.

Places are in Elias-Fano form: for the kept element number i, counted from 0, at place p, 0 <= p < n, byte i has
p mod 64 in its 6 lower bits. The 2 upper bits of all bytes, lower one first, are a row of 2 K bits in which bit
floor(p / 64) + i is set for every kept element. Hence p = 64 (o - i) + p mod 64, where o is the position of the row's
set bit number i. As every full block has 64 of its own 4096 elements, byte 64 b begins block b, and any run of blocks
reads by itself. That is 8 bits for a place; plain ones take 12, and no code for all choices of 64 below 7.4 on average.

Arithmetic of a block of m elements, k kept. It is float64 until said otherwise, each operation rounded to nearest even:

    kept   = the k elements with the greatest |x|; of equal ones, those that come first
    a      = |x| of the kept ones in descending order, 0 where below 2^-119
    A_s    = the sum of the first s of a, S_s = that of the others; both by doubling: in turn for d = 1, 2, 4 ... < k,
             every sum takes the one d places before it (after it) in
    h_s    = A_s / s,  l_s = S_s / (k - s), 0 for s = k
    s      = the one, 1 <= s <= k, with the greatest A_s h_s + S_s l_s; of equal ones, the least
    high, low = h_s and l_s, rounded to float32, 0 where below 2^-119, their low 16 mantissa bits cleared
    code   = high where |x| >= low / 2 + high / 2 (float32), else low; minus where x has its sign bit set

What follows from it:

- The two magnitudes are, before their bits are cleared, those with the least squared error that any two could have.
  Over the kept ones of 4096 numbers this error is, as a share of their sum of squares:

                                        normal    Laplace    Student, 3 degrees   10 normal, the others 0
      max, max / 3                      0.133     0.127      0.66                 2.4
      s, s / 3, s of least squares      0.0120    0.0338     0.13                 0.55
      s, r s, r best for each column    0.0040    0.0121     0.13                 0.36
      these two                         0.0037    0.0111     0.053                0.15

- Encoding is a contraction: |x - value|^2, summed over a block, is never above the sum of x^2, and below it where any
  |x| is 2^-119 or more. Error feedback needs that; with max and max / 3 one outlier is enough to break it.
- Encoding decoded values gives the same values again. Negating passes through, and so does scaling by a power of two
  that takes nothing across 2^-119.
- x - value is exact in float32, but where |x| is below half of low, and then it is within 2^-24 of low.
- An infinity or NaN is kept before all other elements and makes high infinite or NaN; the rest of such a block is
  unspecified. Finite values never overflow, since clearing bits rounds towards 0.
"""

from collections.abc import Iterator

import torch

from paceline_wire.codecs.buffers import (
    byte_view,
    chunks,
    require_encodable,
    require_payload,
    require_range,
    typed_view,
)
from paceline_wire.codecs.squares import squares_of_decoded
from paceline_wire.errors import CodecError

TOPK_BLOCK_ELEMENTS = 4096
"""Elements that compete for being kept, and share two magnitudes."""
ELEMENTS_PER_KEPT = 64
"""One element is kept of this many. A power of two: it says how many bits of a place lie in the lower part."""

_KEPT_OF_BLOCK = TOPK_BLOCK_ELEMENTS // ELEMENTS_PER_KEPT
_PLACE_BITS = TOPK_BLOCK_ELEMENTS.bit_length() - 1
_LOW_PLACE_BITS = ELEMENTS_PER_KEPT.bit_length() - 1
_LEVEL_BYTES = 4
_CODES_PER_BYTE = 4
_SMALLEST_MAGNITUDE = 2.0**-119
_FLOAT32_MAGNITUDE = 0x7FFFFFFF
_LEVEL_INFINITY = 0x7F80

# Shapes: B blocks of which k elements each are kept, K = B k in all; a chunk has at most chunk_elements / 4096 blocks.


class TopkCodec:
    """The largest 64 of every 4096 elements in 2 bits each: 84 bytes per 4096 elements. For pushes only."""

    name = "topk"
    lossless = False
    sparse = True
    residual_decay = 0.95

    def encoded_bytes(self, num_elements: int) -> int:
        """Size in bytes of the encoding of that many elements."""
        num_kept = _num_kept(num_elements)
        return _num_blocks(num_elements) * _LEVEL_BYTES + num_kept + _num_code_bytes(num_kept)

    def encode(self, values: torch.Tensor, out: torch.Tensor) -> None:
        """Write the encoding of values (float32 [n]) to out (uint8 [encoded_bytes(n)]).

        Raises:
            InvalidInputError: values and out do not fit each other.
        """
        num_elements = values.numel()
        require_encodable(self.name, values, out, self.encoded_bytes(num_elements))
        out_levels, out_places, out_codes = _split(out, num_elements)
        for first, last in _strips(num_elements, values.device):
            blocks = values[first:last].view(-1, min(last - first, TOPK_BLOCK_ELEMENTS))
            descending, places = _largest(blocks, _num_kept(blocks.shape[1]))
            levels = _levels(descending)
            codes = _codes(blocks.gather(1, places), levels)
            out_levels[_LEVEL_BYTES * _num_blocks(first) : _LEVEL_BYTES * _num_blocks(last)].copy_(_level_bytes(levels))
            out_places[_num_kept(first) : _num_kept(last)].copy_(_place_bytes(places))
            out_codes[_num_code_bytes(_num_kept(first)) : _num_code_bytes(_num_kept(last))].copy_(_code_bytes(codes))

    def check(self, payload: torch.Tensor, num_elements: int) -> None:
        """Refuse a payload (uint8 [any]) that is not the finite encoding of num_elements elements.

        Magnitudes are finite and in order; places ascend, and every block has as many as it must, within itself.

        Raises:
            CodecError: The size, a magnitude or a place is wrong.
        """
        require_payload(self.name, payload, num_elements, self.encoded_bytes(num_elements))
        if num_elements == 0:
            return
        level_bytes, place_bytes, _ = _split(payload, num_elements)
        self._check_levels(typed_view(level_bytes, torch.int16).view(-1, 2))
        self._check_places(place_bytes, num_elements)

    def decode_range(self, payload: torch.Tensor, num_elements: int, start: int, out: torch.Tensor) -> None:
        """Decode elements start, start + 1, ... of a checked payload into out (float32 [m], start + m <= n).

        Raises:
            CodecError: The range or the payload's size does not fit num_elements.
        """
        require_payload(self.name, payload, num_elements, self.encoded_bytes(num_elements))
        require_range(self.name, num_elements, start, out)
        level_bytes, place_bytes, code_bytes = _split(payload, num_elements)
        # The blocks that the range touches, and what is kept of them.
        at, end = start // TOPK_BLOCK_ELEMENTS, _num_blocks(start + out.numel())
        place_bytes = place_bytes[at * _KEPT_OF_BLOCK : end * _KEPT_OF_BLOCK]
        code_bytes = code_bytes[_num_code_bytes(at * _KEPT_OF_BLOCK) : _num_code_bytes(end * _KEPT_OF_BLOCK)]
        levels = typed_view(level_bytes[at * _LEVEL_BYTES : end * _LEVEL_BYTES], torch.bfloat16).float()
        places = _places(place_bytes, _marks(place_bytes)).sub_(start - at * TOPK_BLOCK_ELEMENTS)
        inside = (places >= 0) & (places < out.numel())
        out.zero_()
        out[places[inside]] = _values(levels, code_bytes, place_bytes.numel())[inside]

    def block_squares(self, payload: torch.Tensor, num_elements: int) -> torch.Tensor:
        """The sum of the squares of each 256 numbers (float64 [ceil(n / 256)]), as `squares` says.

        Raises:
            CodecError: The payload's size does not fit num_elements.
        """
        return squares_of_decoded(self, payload, num_elements)

    def _check_levels(self, levels: torch.Tensor) -> None:
        """Refuse magnitudes (the upper bits of low and high, int16 [B, 2]) that no encoder writes.

        Raises:
            CodecError: Some magnitude is negative, infinite or NaN, or a block's low one is above its high one.
        """
        low, high = levels.unbind(1)
        # As integers, floats that are not negative have their own order, and negative ones are below 0.
        wrong = ((low < 0) | (low > high) | (high >= _LEVEL_INFINITY)).nonzero()
        if wrong.numel():
            block = int(wrong[0])
            shown = " and ".join(f"{level}" for level in levels[block].clone().view(torch.bfloat16).tolist())
            raise CodecError(
                f"{self.name}: some values are not finite, or the payload is damaged: the magnitudes of block {block} "
                f"are {shown} ({wrong.numel()} of {levels.shape[0]} blocks are wrong), and magnitudes are in ascending "
                "order and never negative, infinite or NaN"
            )

    def _check_places(self, place_bytes: torch.Tensor, num_elements: int) -> None:
        """Refuse places (uint8 [K]) that do not ascend, or do not give every block as many as it must have.

        Raises:
            CodecError: The places are not those of any encoding of num_elements elements.
        """
        num_kept, marks = place_bytes.numel(), _marks(place_bytes)
        if marks.numel() != num_kept:
            raise CodecError(f"{self.name}: the payload is damaged: it has {marks.numel()} places of {num_kept}")
        places = _places(place_bytes, marks)
        blocks = torch.arange(num_kept, device=places.device).div_(_KEPT_OF_BLOCK, rounding_mode="floor")
        stray = (places >> _PLACE_BITS != blocks) | (places >= num_elements)
        stray[1:] |= places[1:] <= places[:-1]
        wrong = stray.nonzero()
        if wrong.numel():
            at = int(wrong[0])
            raise CodecError(
                f"{self.name}: the payload is damaged: kept element {at} is at place {int(places[at])}, which is not "
                f"behind the one before it in block {at // _KEPT_OF_BLOCK} of {num_elements} elements"
            )


# --- Sizes and parts.


def _num_blocks(num_elements: int) -> int:
    return -(-num_elements // TOPK_BLOCK_ELEMENTS)


def _num_kept(num_elements: int) -> int:
    return -(-num_elements // ELEMENTS_PER_KEPT)


def _num_code_bytes(num_kept: int) -> int:
    return -(-num_kept // _CODES_PER_BYTE)


def _split(payload: torch.Tensor, num_elements: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The magnitudes (uint8 [4 B]), places (uint8 [K]) and codes (uint8 [ceil(K / 4)]) of a payload of that size."""
    at = _num_blocks(num_elements) * _LEVEL_BYTES
    end = at + _num_kept(num_elements)
    return payload[:at], payload[at:end], payload[end:]


def _strips(num_elements: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """Yield the bounds of consecutive chunks of full blocks, and then of the last block if it is not full."""
    full = num_elements - num_elements % TOPK_BLOCK_ELEMENTS
    yield from chunks(full, device)
    if full < num_elements:
        yield full, num_elements


# --- Encoding.


def _largest(blocks: torch.Tensor, num_kept: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the largest of each block (float32 [B, m]).

    Returns:
        Their magnitudes in descending order (float32 [B, k]) and their places in ascending order (int64 [B, k]).
    """
    last_place = TOPK_BLOCK_ELEMENTS - 1
    # A magnitude's bits order it, NaN above infinity; with the place below them no two are equal, so that no order of
    # topk's own shows.
    magnitudes = blocks.view(torch.int32).bitwise_and(_FLOAT32_MAGNITUDE).to(torch.int64)
    from_behind = torch.arange(last_place, last_place - blocks.shape[1], -1, device=blocks.device)
    keys = magnitudes.bitwise_left_shift_(_PLACE_BITS).bitwise_or_(from_behind)
    largest = keys.topk(num_kept, dim=1).values
    places = torch.sub(last_place, largest.bitwise_and(last_place)).sort(dim=1).values
    return largest.bitwise_right_shift_(_PLACE_BITS).to(torch.int32).view(torch.float32), places


def _levels(descending: torch.Tensor) -> torch.Tensor:
    """The magnitudes low and high (float32 [B, 2]) that stand best for magnitudes (float32 [B, k], descending)."""
    num_kept = descending.shape[1]
    magnitudes = descending.double().masked_fill_(descending < _SMALLEST_MAGNITUDE, 0.0)
    above = _running_sums(magnitudes)
    # S_s is the sum from place s on; there is none for s = k.
    below = torch.nn.functional.pad(_running_sums(magnitudes.flip(1)).flip(1)[:, 1:], (0, 1))
    num_above = torch.arange(1, num_kept + 1, dtype=torch.float64, device=descending.device)
    high = above / num_above
    low = below / (num_kept - num_above).clamp_(min=1)
    split = (above * high).add_(below * low).argmax(dim=1, keepdim=True)
    levels = torch.cat([low.gather(1, split), high.gather(1, split)], dim=1).float()
    levels.masked_fill_(levels < _SMALLEST_MAGNITUDE, 0.0)
    levels.view(torch.int32).bitwise_and_(~0xFFFF)
    return levels


def _running_sums(terms: torch.Tensor) -> torch.Tensor:
    """Sums of terms (float64 [B, k]) from the first to each. By doubling: cumsum's order depends on the device."""
    distance = 1
    while distance < terms.shape[1]:
        terms = torch.cat([terms[:, :distance], terms[:, distance:] + terms[:, :-distance]], dim=1)
        distance *= 2
    return terms


def _codes(kept: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Codes (uint8 [B, k]) of kept elements (float32 [B, k]) under magnitudes (float32 [B, 2])."""
    halves = levels * 0.5
    is_high, is_minus = kept.abs() >= halves[:, :1] + halves[:, 1:], kept.signbit()
    return is_high.to(torch.uint8).add_(is_minus, alpha=2)


def _level_bytes(levels: torch.Tensor) -> torch.Tensor:
    """Write magnitudes (float32 [B, 2], low 16 bits clear) as uint8 [4 B]."""
    return byte_view(levels.view(torch.int32).bitwise_right_shift(16).to(torch.int16).flatten())


def _place_bytes(places: torch.Tensor) -> torch.Tensor:
    """Write ascending places (int64 [B, k], each counted in its block) as uint8 [B k]."""
    num_kept = places.shape[1]
    row = torch.zeros(places.shape[0], 2 * num_kept, dtype=torch.uint8, device=places.device)
    marks = places.bitwise_right_shift(_LOW_PLACE_BITS).add_(torch.arange(num_kept, device=places.device))
    row.scatter_(1, marks, 1)
    pairs = row.view(-1, 2)
    lower = places.bitwise_and(ELEMENTS_PER_KEPT - 1).to(torch.uint8).flatten()
    return lower.add_(pairs[:, 0], alpha=64).add_(pairs[:, 1], alpha=128)


def _code_bytes(codes: torch.Tensor) -> torch.Tensor:
    """Write codes (uint8 [B, k]) as uint8 [ceil(B k / 4)]."""
    padded = torch.nn.functional.pad(codes.flatten(), (0, -codes.numel() % _CODES_PER_BYTE))
    return padded.view(-1, _CODES_PER_BYTE).bitwise_left_shift(_code_shifts(codes)).sum(dim=1, dtype=torch.uint8)


# --- Decoding.


def _marks(place_bytes: torch.Tensor) -> torch.Tensor:
    """The positions (int64 [any], ascending) of the bits that are set in the row of 2 K bits of places (uint8 [K])."""
    row = torch.stack([place_bytes.bitwise_and(0x40), place_bytes.bitwise_and(0x80)], dim=1)
    return row.flatten().nonzero().squeeze(1)


def _places(place_bytes: torch.Tensor, marks: torch.Tensor) -> torch.Tensor:
    """The places (int64 [K]) that bytes (uint8 [K]) and their marks (int64 [K]) stand for."""
    coarse = marks - torch.arange(place_bytes.numel(), device=marks.device)
    return coarse.bitwise_left_shift_(_LOW_PLACE_BITS).add_(place_bytes.bitwise_and(ELEMENTS_PER_KEPT - 1))


def _values(levels: torch.Tensor, code_bytes: torch.Tensor, num_kept: int) -> torch.Tensor:
    """The values (float32 [K]) of codes (uint8 [ceil(K / 4)]) under their blocks' magnitudes (float32 [2 B])."""
    codes = code_bytes[:, None].bitwise_right_shift(_code_shifts(code_bytes)).flatten()[:num_kept]
    blocks = torch.arange(num_kept, device=codes.device).div_(_KEPT_OF_BLOCK, rounding_mode="floor")
    magnitudes = levels[blocks.mul_(2).add_(codes.bitwise_and(1))]
    return torch.where(codes.bitwise_and(2) != 0, -magnitudes, magnitudes)


def _code_shifts(like: torch.Tensor) -> torch.Tensor:
    """How far each of a byte's codes lies from its lowest bit: uint8 [4], on the device of another tensor."""
    return torch.arange(0, 8, 8 // _CODES_PER_BYTE, dtype=torch.uint8, device=like.device)
