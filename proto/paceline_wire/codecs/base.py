"""The codec interface: pure functions between flat float32 values and the bytes that stand for them.

A codec is stateless and works on one fragment's values at a time. Everything is a contiguous 1-d tensor without
gradient: values are float32, payloads are uint8, and both sides of a call are on one device. Nothing here allocates the
caller's results, so buffers can be pinned, pooled, or slices of larger ones, payloads at any byte offset; a faster
implementation replaces a codec by this interface bit for bit, as `compiled` does (`tests/unit/test_codecs.py` is the
conformance suite).
"""

from typing import Protocol

import torch

BLOCK_ELEMENTS = 256
"""Elements that share a scale in the blockwise codecs. In all codecs, ranges given to `decode_range` start at multiples
of it."""


class Codec(Protocol):
    """One way of writing numbers as bytes."""

    @property
    def name(self) -> str:
        """The codec's name in configurations, such as "int8"."""

    @property
    def lossless(self) -> bool:
        """Whether decoding gives back every finite float32 bit for bit (then error feedback has nothing to carry)."""

    @property
    def sparse(self) -> bool:
        """Whether all but a few elements decode to 0.

        Such a codec is for what another message makes up for: pushes with error feedback, and differences between
        values (`delta`). Parameters themselves MUST NOT be written in it.
        """

    @property
    def residual_decay(self) -> float:
        """The part, above 0 and up to 1, of what a push lost that error feedback adds to the next one."""

    def encoded_bytes(self, num_elements: int) -> int:
        """Size in bytes of the encoding of that many elements."""

    def encode(self, values: torch.Tensor, out: torch.Tensor) -> None:
        """Write the encoding of values (float32 [n]) to out (uint8 [encoded_bytes(n)]).

        Values that are not finite never raise: they give a payload that `check` refuses, since the shard, not the
        worker, decides about them. Values that are finite give one that `check` accepts (bf16: below 2^128 - 2^119).

        Raises:
            InvalidInputError: values or out are not as said. The message says which.
        """

    def check(self, payload: torch.Tensor, num_elements: int) -> None:
        """Refuse a payload (uint8 [any]) that is not the finite encoding of num_elements elements.

        Raises:
            CodecError: The size is wrong or some value would not be finite. The message says which.
        """

    def decode_range(self, payload: torch.Tensor, num_elements: int, start: int, out: torch.Tensor) -> None:
        """Decode elements start, start + 1, ... of a checked payload into out (float32 [m], start + m <= n).

        start must be a multiple of BLOCK_ELEMENTS. This lets a caller decode in pieces that stay in the cache. The
        payload must have passed `check`; any content is then safe.

        Raises:
            CodecError: The range or the payload's size does not fit num_elements.
        """

    def block_squares(self, payload: torch.Tensor, num_elements: int) -> torch.Tensor:
        """The sum of the squares of each block's numbers, float64 [ceil(n / BLOCK_ELEMENTS)], as `squares` says.

        The payload must have passed `check`; one of fp32 or bf16 need not have, and then has sums that are not finite.

        Raises:
            CodecError: The payload's size does not fit num_elements.
        """
