"""The codecs that write every number by itself: binary32 as it is, and bfloat16.

Layout, both: the elements one after the other, little-endian, without header or padding.
"""

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

_FP32_MAGNITUDE, _FP32_INFINITY = 0x7FFFFFFF, 0x7F800000
_BF16_MAGNITUDE, _BF16_INFINITY = 0x7FFF, 0x7F80


class Fp32Codec:
    """IEEE 754 binary32: 4 bytes an element, copied bit for bit."""

    name = "fp32"
    lossless = True
    sparse = False
    residual_decay = 1.0

    def encoded_bytes(self, num_elements: int) -> int:
        """Size in bytes of the encoding of that many elements."""
        return 4 * num_elements

    def encode(self, values: torch.Tensor, out: torch.Tensor) -> None:
        """Copy values (float32 [n]) to out (uint8 [4 n]).

        Raises:
            InvalidInputError: values and out do not fit each other.
        """
        require_encodable(self.name, values, out, self.encoded_bytes(values.numel()))
        out.copy_(byte_view(values))

    def check(self, payload: torch.Tensor, num_elements: int) -> None:
        """Refuse a payload (uint8 [any]) that is not the finite encoding of num_elements elements.

        Raises:
            CodecError: The size is wrong, or an element is infinite or NaN.
        """
        require_payload(self.name, payload, num_elements, self.encoded_bytes(num_elements))
        _require_finite(self.name, payload, torch.int32, _FP32_MAGNITUDE, _FP32_INFINITY)

    def decode_range(self, payload: torch.Tensor, num_elements: int, start: int, out: torch.Tensor) -> None:
        """Copy elements start, start + 1, ... of a payload (uint8 [4 n]) to out (float32 [m]).

        Raises:
            CodecError: The range or the payload's size does not fit num_elements.
        """
        require_payload(self.name, payload, num_elements, self.encoded_bytes(num_elements))
        require_range(self.name, num_elements, start, out)
        byte_view(out).copy_(payload[4 * start : 4 * (start + out.numel())])

    def block_squares(self, payload: torch.Tensor, num_elements: int) -> torch.Tensor:
        """The sum of the squares of each block's numbers (float64 [B]), as `squares` says.

        Raises:
            CodecError: The payload's size does not fit num_elements.
        """
        return squares_of_decoded(self, payload, num_elements)


class Bf16Codec:
    """bfloat16: the upper 2 bytes of each element's binary32, rounded to nearest, ties to even, as torch does it.

    Finite values from 2^128 - 2^119 on (3.396e38, 0.2 % below the largest float32) round to infinity, as they do in
    every bfloat16 arithmetic; `check` then refuses the payload.
    """

    name = "bf16"
    lossless = False
    sparse = False
    residual_decay = 1.0

    def encoded_bytes(self, num_elements: int) -> int:
        """Size in bytes of the encoding of that many elements."""
        return 2 * num_elements

    def encode(self, values: torch.Tensor, out: torch.Tensor) -> None:
        """Write values (float32 [n]) to out (uint8 [2 n]).

        Raises:
            InvalidInputError: values and out do not fit each other.
        """
        require_encodable(self.name, values, out, self.encoded_bytes(values.numel()))
        for first, last in chunks(values.numel(), values.device):
            out[2 * first : 2 * last].copy_(byte_view(values[first:last].to(torch.bfloat16)))

    def check(self, payload: torch.Tensor, num_elements: int) -> None:
        """Refuse a payload (uint8 [any]) that is not the finite encoding of num_elements elements.

        Raises:
            CodecError: The size is wrong, or an element is infinite or NaN.
        """
        require_payload(self.name, payload, num_elements, self.encoded_bytes(num_elements))
        _require_finite(self.name, payload, torch.int16, _BF16_MAGNITUDE, _BF16_INFINITY)

    def decode_range(self, payload: torch.Tensor, num_elements: int, start: int, out: torch.Tensor) -> None:
        """Widen elements start, start + 1, ... of a payload (uint8 [2 n]) into out (float32 [m]); this is exact.

        Raises:
            CodecError: The range or the payload's size does not fit num_elements.
        """
        require_payload(self.name, payload, num_elements, self.encoded_bytes(num_elements))
        require_range(self.name, num_elements, start, out)
        for first, last in chunks(out.numel(), out.device):
            coded = payload[2 * (start + first) : 2 * (start + last)]
            out[first:last].copy_(typed_view(coded, torch.bfloat16))

    def block_squares(self, payload: torch.Tensor, num_elements: int) -> torch.Tensor:
        """The sum of the squares of each block's numbers (float64 [B]), as `squares` says.

        Raises:
            CodecError: The payload's size does not fit num_elements.
        """
        return squares_of_decoded(self, payload, num_elements)


def _require_finite(name: str, payload: torch.Tensor, bits: torch.dtype, magnitude: int, infinity: int) -> None:
    """Refuse a payload of floats whose bits, seen as integers without their sign, reach those of infinity.

    Raises:
        CodecError: Some element is infinite or NaN.
    """
    if payload.numel() == 0:
        return
    peaks = [
        typed_view(payload[first * bits.itemsize : last * bits.itemsize], bits).bitwise_and(magnitude).amax()
        for first, last in chunks(payload.numel() // bits.itemsize, payload.device)
    ]
    # Compared once for all chunks: on a GPU every look at a number waits for the device.
    if int(torch.stack(peaks).amax()) >= infinity:
        raise CodecError(f"{name}: the payload has a value that is infinite or NaN")
