"""Sending values as differences: two sides hold the same reference, and a lossy difference moves both by the same.

The sender encodes Q(w - r) for its newest values w; then both sides set r to r + decode(Q(w - r)), by the same
operations on the same bytes. So the references are equal in every bit for ever, the receiver's values are its
reference, and what one difference loses is in the next one by itself, since that is taken from where the receiver
really is. It is error feedback without a residual, and nothing of it decays:

    sender = Reference(codec, initial)                  receiver = Reference(codec, initial)
    payload = sender.encode(w)          --- bytes --->  receiver.follow(payload)
    sender.values                    same bits          receiver.values

Every payload must be followed once and in order: whoever misses one starts again from the other's values, written whole
in a codec that both decode alike.

`moves` is the arithmetic, in one pass over memory where the kernels are there.

Source: EF21, Richtarik et al., arXiv 2106.05203, algorithm 1 in its form for one sender; there it is gradients that are
approached. |w - r| stays bounded for every codec that is a contraction, as all lossy ones of this package are.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

import torch

from paceline_wire.codecs.base import Codec
from paceline_wire.codecs.moves import encode_move, finite_sum, follow_move, write_copies
from paceline_wire.codecs.registry import codec
from paceline_wire.codecs.whole import encode, payload_tensor

DIFFERENCE_CODECS: Final = ("int8", "int4")
"""Names of the codecs in which updates are differences; in the others they are the values themselves."""


def whole_codec(downlink: Codec) -> Codec:
    """How values are written whole where updates are written in downlink: for a fetch, or where nothing is held yet.

    bf16 where updates are differences: what it loses is in the first of them.
    """
    return codec("bf16") if downlink.name in DIFFERENCE_CODECS else downlink


class Difference(NamedTuple):
    """A difference that is ready to be sent.

    Attributes:
        payload: Its bytes, uint8 [m].
        moved: What both sides hold once it is followed, float32 [n].
    """

    payload: torch.Tensor
    moved: torch.Tensor


def difference(
    codec: Codec,
    values: torch.Tensor,
    held: torch.Tensor,
    behind: torch.Tensor | None = None,
    moved: torch.Tensor | None = None,
) -> Difference:
    """Move from what both sides hold towards values, as far as the codec can write it.

    Args:
        codec: How the difference is written.
        values: The newest values, float32 [n].
        held: What both sides hold, float32 [n]; not changed.
        behind: Numbers that are written whole behind the difference, in the same payload, float32 [m]; None: none.
        moved: Where to write what both sides hold then, float32 [n], not held itself; None: to memory of its own.

    Raises:
        CodecError: The difference, or where it would lead, is not finite.
    """
    moved = torch.empty_like(held) if moved is None else moved
    if behind is None:
        return Difference(encode_move(codec, values, held, moved), moved)
    numbers = torch.cat((values - held, behind))
    payload, num_elements = encode(codec, numbers), numbers.numel()
    del numbers  # before as much is taken again for what it leads to
    codec.check(payload, num_elements)
    codec.decode_range(payload, num_elements, 0, moved)
    finite_sum(codec, moved, held, moved)
    return Difference(payload, moved)


def followed(
    codec: Codec,
    payload: bytes | bytearray | memoryview | torch.Tensor,
    num_elements: int,
    held: torch.Tensor,
    *,
    in_place: bool = False,
    copies: Sequence[torch.Tensor] = (),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where a difference of the other side's leads.

    Args:
        codec: How it is written.
        payload: Its bytes.
        num_elements: Elements that it encodes: those of held, and what is written behind them.
        held: What both sides hold, float32 [n]; not changed, but for in_place.
        in_place: Whether held may be changed to what they hold then; if this raises, it is of no use.
        copies: What they hold then is written here as well, see `follow_move`.

    Returns:
        What they hold then (float32 [n]), and what is behind the difference (float32 [num_elements - n]).

    Raises:
        CodecError: It is no valid encoding of num_elements elements, or leads to infinity.
    """
    coded = payload if isinstance(payload, torch.Tensor) else payload_tensor(payload)
    if num_elements == held.numel():
        moved = held if in_place else torch.empty_like(held)
        follow_move(codec, coded, held, moved, copies)
        return moved, moved[num_elements:]
    codec.check(coded, num_elements)
    decoded = torch.empty(num_elements, dtype=torch.float32, device=coded.device)
    codec.decode_range(coded, num_elements, 0, decoded)
    moved = decoded[: held.numel()]
    finite_sum(codec, moved, held, moved)
    write_copies(moved, copies)
    return moved, decoded[held.numel() :]


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
        payload, self._values = difference(self._codec, values, self._values)
        return payload

    def follow(self, payload: bytes | bytearray | memoryview | torch.Tensor) -> None:
        """Move as a payload of the other side's says.

        Raises:
            CodecError: It is no valid encoding of n elements, or leads to infinity. The reference is as before.
        """
        self._values, _ = followed(self._codec, payload, self._values.numel(), self._values)
