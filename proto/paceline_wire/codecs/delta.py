"""Sending values as differences: two sides hold the same reference, and a lossy difference moves both by the same.

The sender encodes Q(w - r) for its newest values w; then both sides set r to r + decode(Q(w - r)), by the same
operations on the same bytes. So the references are equal in every bit for ever, the receiver's values are its
reference, and what one difference loses is in the next one by itself, since that is taken from where the receiver
really is. It is error feedback without a residual, and nothing of it decays:

    sender = Reference(codec, initial)                  receiver = Reference(codec, initial)
    payload = sender.encode(w)          --- bytes --->  receiver.follow(payload)
    sender.values                    same bits          receiver.values

Every payload must be followed once and in order: whoever misses one starts again from the other's values in fp32.

Source: EF21, Richtarik et al., arXiv 2106.05203, algorithm 1 in its form for one sender; there it is gradients that are
approached. |w - r| stays bounded for every codec that is a contraction, as all lossy ones of this package are.
"""

import torch

from paceline_wire.codecs.base import Codec
from paceline_wire.codecs.moves import encode_move, follow_move
from paceline_wire.codecs.whole import payload_tensor


class Reference:
    """One side's copy of what both sides hold.

    Both sides have the same bits whatever their devices, as long as neither flushes subnormal numbers (torch does not
    unless told to).

    Args:
        codec: How differences are written.
        initial: What both sides begin with, contiguous float32 [n], finite; kept, not copied, and never changed.
    """

    def __init__(self, codec: Codec, initial: torch.Tensor) -> None:
        self._codec = codec
        self._values = initial

    @property
    def values(self) -> torch.Tensor:
        """The reference as it stands, float32 [n]. Moving on makes a new tensor: this one is never changed."""
        return self._values

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        """Move towards values (float32 [n]) as far as the codec can write it; return the payload that says so.

        Raises:
            InvalidInputError: values are of another shape or type.
            CodecError: The difference, or where it would lead, is not finite. The reference is as before.
        """
        moved = torch.empty_like(self._values)
        payload = encode_move(self._codec, values, self._values, moved)
        self._values = moved
        return payload

    def follow(self, payload: bytes | bytearray | memoryview | torch.Tensor) -> None:
        """Move as a payload of the other side's says.

        Raises:
            CodecError: It is no valid encoding of n elements, or leads to infinity. The reference is as before.
        """
        coded = payload if isinstance(payload, torch.Tensor) else payload_tensor(payload)
        moved = torch.empty_like(self._values)
        follow_move(self._codec, coded, self._values, moved)
        self._values = moved
