"""The codecs that share a scale among blocks of 256 elements: int8, int4 and fp4 (E3M0).

Layout of the encoding of n elements, all three; B = ceil(n / 256) blocks, the last one padded with zeros:

    4 B bytes     the scales of all blocks, float32, little-endian
    256 B bytes   (int8) the codes in order, one signed byte each, -127..127
    128 B bytes   (int4, fp4) the codes in two planes: byte j of a block, 0 <= j < 128, has element j in its low
                  nibble and element j + 128 in its high nibble, so that neither side ever interleaves

A code stands for an integer v: itself (int8), the nibble in two's complement, -7..7 (int4), or for a nibble of sign s
and 3 bits m (fp4) the integer (-1)^s 2^(m-1), 0 for m = 0. Decoders also accept the most negative code of int8 and
int4, which encoders never write.

Arithmetic. Every operation below is one float32 operation, rounded to nearest even, so that any implementation that
does the same operations has the same bits. `rint` rounds to an integer, ties to even.

    absmax = max |x| over the block
    scale  = 0                                                if absmax < 2^-119, else:
             absmax / 127, its low 7 mantissa bits cleared    (int8)
             absmax / 7, its low 7 mantissa bits cleared      (int4)
             absmax                                           (fp4)
    step   = scale                                            (int8, int4)
             scale * 2^-6                                     (fp4)
    y      = x * (1 / step)                                   1 / step is rounded, then the product is
             x * 0                                            if scale = 0
    v      = rint(y)                                          (int8, int4)
             the nearest of 0, +-1, +-2, +-4 ... +-64         (fp4) half way, the greater in magnitude; s is y's sign
    value  = v * step                                         v is an integer: fp4's negative zero decodes to +0

What follows from it:

- v * step is exact for every encoder's payload: v has at most 7 significant bits and step at most 17, or v is a power
  of two (fp4). Hence encoding decoded values gives the same payload again (fp4: but for the sign of zeros), and a fused
  multiply-add could not change a bit.
- y is at most 127 (1 + 2^-15), so rint(y) is never above 127 and needs no clamp; likewise 7 and 64.
- |x - value| <= step / 2 (fp4: half the gap that x lies in), up to 2^-14 of it, since y is x / step within 2^-22 of
  itself. In a block below 2^-119 it is |x|: there step would leave the normal numbers. Everywhere else scale, step and
  its inverse are normal, so machines that flush subnormal numbers agree with those that do not.
- x - value is exact in float32: value is 0 or within a factor of 2 of x. Error feedback loses nothing.
- An infinity or NaN in a block makes its scale infinite or NaN; the codes of such a block are unspecified.
"""

import math
from abc import ABC, abstractmethod

import torch

from paceline_wire.codecs.base import BLOCK_ELEMENTS
from paceline_wire.codecs.buffers import (
    byte_view,
    chunk_elements,
    chunks,
    require_encodable,
    require_payload,
    require_range,
    typed_view,
)
from paceline_wire.codecs.nibbles import pack_nibbles, unpack_nibbles
from paceline_wire.errors import CodecError

_SCALE_BYTES = 4
_SMALLEST_ABSMAX = 2.0**-119
_SCALE_MASK = ~0x7F
_LARGEST_FLOAT32 = (2 - 2**-23) * 2.0**127

# Shapes: B blocks of E = BLOCK_ELEMENTS elements, or of C code bytes; a chunk has at most chunk_elements / E blocks.


class BlockwiseCodec(ABC):
    """What the three have in common; they differ in scale, rounding and the bits of a code."""

    name: str
    lossless = False
    sparse = False
    residual_decay = 1.0
    _code_bits: int
    _largest_integer: int
    """The largest magnitude of an integer v that any code stands for."""
    _step_of_scale: float
    """The factor, a power of two, from a block's scale to its step."""

    @abstractmethod
    def _scales(self, absmax: torch.Tensor) -> torch.Tensor:
        """The scales (float32 [B]) of blocks from their largest magnitudes (float32 [B], may be returned itself)."""

    @abstractmethod
    def _round(self, quotients: torch.Tensor) -> torch.Tensor:
        """Codes (int8 [B, E], or numbers that convert to it exactly) of y (float32 [B, E], may be overwritten)."""

    def encoded_bytes(self, num_elements: int) -> int:
        """Size in bytes of the encoding of that many elements."""
        return _num_blocks(num_elements) * (_SCALE_BYTES + self._code_bytes)

    def encode(self, values: torch.Tensor, out: torch.Tensor) -> None:
        """Write the encoding of values (float32 [n]) to out (uint8 [encoded_bytes(n)]).

        Raises:
            InvalidInputError: values and out do not fit each other.
        """
        num_elements = values.numel()
        require_encodable(self.name, values, out, self.encoded_bytes(num_elements))
        out_scales, out_codes = self.split(out, num_elements)  # uint8 [4 B], int8 [B, C]
        scratch = values.new_empty(_num_blocks(min(num_elements, chunk_elements(values.device))), BLOCK_ELEMENTS)
        for first, last in chunks(num_elements, values.device):
            blocks = blocks_of(values[first:last])  # [B, E]
            at, end = first // BLOCK_ELEMENTS, first // BLOCK_ELEMENTS + blocks.shape[0]
            scales = self._encode_blocks(blocks, out_codes[at:end], scratch[: blocks.shape[0]])
            out_scales[at * _SCALE_BYTES : end * _SCALE_BYTES].copy_(byte_view(scales))

    def check(self, payload: torch.Tensor, num_elements: int) -> None:
        """Refuse a payload (uint8 [any]) that is not the finite encoding of num_elements elements.

        Scales are finite and not negative: no encoder writes others. Where a scale is so large that some code could
        still overflow, the codes are looked at too; every value that then can be decoded is finite.

        Raises:
            CodecError: The size is wrong, or a scale or a decoded value is not as it must be.
        """
        require_payload(self.name, payload, num_elements, self.encoded_bytes(num_elements))
        if num_elements == 0:
            return
        scales = typed_view(self.split(payload, num_elements)[0], torch.float32)
        # NaN passes through aminmax, and no comparison holds for it.
        lowest, highest = torch.stack(torch.aminmax(scales)).tolist()
        if not (lowest >= 0 and highest < math.inf):
            self._refuse_scales(scales)
        if highest * self._step_of_scale * self._largest_integer > _LARGEST_FLOAT32:
            self._check_values(payload, num_elements)

    def decode_range(self, payload: torch.Tensor, num_elements: int, start: int, out: torch.Tensor) -> None:
        """Decode elements start, start + 1, ... of a checked payload into out (float32 [m], start + m <= n).

        Raises:
            CodecError: The range or the payload's size does not fit num_elements.
        """
        require_payload(self.name, payload, num_elements, self.encoded_bytes(num_elements))
        require_range(self.name, num_elements, start, out)
        scale_bytes, codes = self.split(payload, num_elements)  # uint8 [4 B], int8 [B, C]
        for first, last in chunks(out.numel(), out.device):
            at, end = (start + first) // BLOCK_ELEMENTS, _num_blocks(start + last)
            scales = typed_view(scale_bytes[at * _SCALE_BYTES : end * _SCALE_BYTES], torch.float32)
            self._decode_blocks(scales, codes[at:end], out[first:last])

    def block_squares(self, payload: torch.Tensor, num_elements: int) -> torch.Tensor:
        """The sum of the squares of each block's numbers (float64 [B]): that of the integers, times the step's square.

        Raises:
            CodecError: The payload's size does not fit num_elements.
        """
        require_payload(self.name, payload, num_elements, self.encoded_bytes(num_elements))
        scale_bytes, codes = self.split(payload, num_elements)
        sums = torch.empty(codes.shape[0], dtype=torch.float64, device=payload.device)
        for first, last in chunks(num_elements, payload.device):
            at, end = first // BLOCK_ELEMENTS, _num_blocks(last)
            integers = self.integers(unpack_nibbles(codes[at:end]) if self.packed else codes[at:end]).to(torch.int32)
            integers.view(-1)[last - first :] = 0  # whatever a last block has behind the last element
            torch.sum(integers.square_(), dim=1, dtype=torch.float64, out=sums[at:end])
        return sums.mul_(self.steps(typed_view(scale_bytes, torch.float32)).double().square_())

    # --- The steps of which passes over whole fragments are made (`fused`).

    @property
    def packed(self) -> bool:
        """Whether a byte has two codes."""
        return self._code_bits == 4

    def split(self, payload: torch.Tensor, num_elements: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The scales' bytes (uint8 [4 B]) and the code bytes (int8 [B, C]) of a payload of the right size."""
        num_scale_bytes = _num_blocks(num_elements) * _SCALE_BYTES
        codes = payload[num_scale_bytes:].view(torch.int8).view(-1, self._code_bytes)
        return payload[:num_scale_bytes], codes

    def factors(self, absmax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The scales, and 1 / step or 0 (float32 [B] each), of blocks from their largest magnitudes (float32 [B])."""
        zero = absmax < _SMALLEST_ABSMAX
        scales = self._scales(absmax).masked_fill_(zero, 0.0)
        return scales, self.steps(scales).reciprocal_().masked_fill_(zero, 0.0)

    def steps(self, scales: torch.Tensor) -> torch.Tensor:
        """The steps (float32 [B], memory of their own) of blocks with these scales (float32 [B])."""
        return scales * self._step_of_scale

    def codes(self, quotients: torch.Tensor) -> torch.Tensor:
        """Codes (int8 [B, E]) of y (float32 [B, E], may be overwritten)."""
        return self._round(quotients).to(torch.int8)

    def integers(self, codes: torch.Tensor) -> torch.Tensor:
        """The integers v (int8 [B, E]) that codes (int8 [B, E], sign-extended) stand for."""
        return codes

    @property
    def _code_bytes(self) -> int:
        return BLOCK_ELEMENTS * self._code_bits // 8

    def _encode_blocks(self, blocks: torch.Tensor, out: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
        """Write the code bytes of blocks (float32 [B, E]) to out (int8 [B, C]); return their scales (float32 [B])."""
        scales, inverses = self.factors(torch.abs(blocks, out=scratch).amax(dim=1))
        codes = self._round(torch.mul(blocks, inverses[:, None], out=scratch))
        if self.packed:
            pack_nibbles(codes.to(torch.int8), out)
        else:
            out.copy_(codes)
        return scales

    def _decode_blocks(self, scales: torch.Tensor, codes: torch.Tensor, out: torch.Tensor) -> None:
        """Decode blocks from scales (float32 [B]) and code bytes (int8 [B, C]) into out (float32 [at most B E])."""
        integers = self.integers(unpack_nibbles(codes) if self.packed else codes)
        steps = self.steps(scales)[:, None]
        if out.numel() == integers.numel():
            torch.mul(integers, steps, out=out.view(-1, BLOCK_ELEMENTS))
        else:
            out.copy_(torch.mul(integers, steps).view(-1)[: out.numel()])

    def _refuse_scales(self, scales: torch.Tensor) -> None:
        wrong = torch.logical_not((scales >= 0) & (scales < math.inf)).nonzero()
        block = int(wrong[0])
        raise CodecError(
            f"{self.name}: some values are not finite, or the payload is damaged: the scale of block {block} is "
            f"{float(scales[block])} ({wrong.numel()} of {scales.numel()} are wrong), and scales are never negative, "
            "infinite or NaN"
        )

    def _check_values(self, payload: torch.Tensor, num_elements: int) -> None:
        scratch = torch.empty(min(num_elements, chunk_elements(payload.device)), device=payload.device)
        for first, last in chunks(num_elements, payload.device):
            values = scratch[: last - first]
            self.decode_range(payload, num_elements, first, values)
            if not bool(values.isfinite().all()):
                raise CodecError(f"{self.name}: the payload has a value beyond the largest float32")


class Int8Codec(BlockwiseCodec):
    """Signed bytes: steps of 1/127 of the block's largest magnitude; 260 bytes per 256 elements."""

    name = "int8"
    _code_bits = 8
    _largest_integer = 128
    _step_of_scale = 1.0

    def _scales(self, absmax: torch.Tensor) -> torch.Tensor:
        return _short_quotient(absmax, 127.0)

    def _round(self, quotients: torch.Tensor) -> torch.Tensor:
        return quotients.round_()


class Int4Codec(BlockwiseCodec):
    """4-bit integers: steps of 1/7 of the block's largest magnitude; 132 bytes per 256 elements."""

    name = "int4"
    _code_bits = 4
    _largest_integer = 8
    _step_of_scale = 1.0

    def _scales(self, absmax: torch.Tensor) -> torch.Tensor:
        return _short_quotient(absmax, 7.0)

    def _round(self, quotients: torch.Tensor) -> torch.Tensor:
        return quotients.round_()


class Fp4Codec(BlockwiseCodec):
    """4-bit floats E3M0: 0, 1/64, 1/32 ... 1 of the block's largest magnitude, signed; 132 bytes per 256 elements."""

    name = "fp4"
    _code_bits = 4
    _largest_integer = 64
    _step_of_scale = 2.0**-6

    def _scales(self, absmax: torch.Tensor) -> torch.Tensor:
        return absmax

    def _round(self, quotients: torch.Tensor) -> torch.Tensor:
        # The 10 uppermost bits of y are its sign and a number h that is 252 at 0.5 and grows by 1 at every 1.5 2^k and
        # every 2^k. All midpoints are 1.5 2^k but the lowest, 0.5. So y rounds to 2^(m-1) where h - 251 is 2 m or
        # 2 m + 1, and to 1 already where it is 1.
        upper = quotients.view(torch.int32).bitwise_right_shift_(22).to(torch.int16)
        signs = upper.bitwise_right_shift(9).to(torch.int8)  # 0 or -1
        # Clamped to 251..266, which int8 holds modulo 256 as -5..10.
        halves = upper.bitwise_and_(0x1FF).clamp_(251, 266).to(torch.int8).add_(5)
        magnitudes = torch.maximum(halves.bitwise_right_shift(1), halves.clamp_(max=1))
        return magnitudes.sub_(signs, alpha=8)

    def integers(self, codes: torch.Tensor) -> torch.Tensor:
        """The powers of two, signed, and 0 (int8 [B, E]) that codes (int8 [B, E], sign-extended) stand for."""
        signs = codes.bitwise_right_shift(3)  # 0 or -1: codes are sign-extended
        powers = torch.bitwise_left_shift(1, codes.bitwise_and(7)).view(torch.uint8)  # up to 128
        magnitudes = powers.bitwise_right_shift_(1).view(torch.int8)
        return magnitudes.bitwise_xor_(signs).sub_(signs)  # -v is ~v + 1


def _num_blocks(num_elements: int) -> int:
    return -(-num_elements // BLOCK_ELEMENTS)


def blocks_of(values: torch.Tensor) -> torch.Tensor:
    """Values (float32 [n]) as blocks (float32 [B, E]): a view, or a copy padded with zeros if the last is not full."""
    missing = -values.numel() % BLOCK_ELEMENTS
    if missing:
        values = torch.nn.functional.pad(values, (0, missing))
    return values.view(-1, BLOCK_ELEMENTS)


def _short_quotient(absmax: torch.Tensor, divisor: float) -> torch.Tensor:
    """Divide absmax (float32 [B]) and clear the quotient's low 7 mantissa bits; infinity and NaN stay not finite."""
    # By a tensor: dividing by a number, torch on a GPU multiplies by its rounded inverse.
    quotients = absmax / torch.full_like(absmax, divisor)
    quotients.view(torch.int32).bitwise_and_(_SCALE_MASK)
    return quotients
