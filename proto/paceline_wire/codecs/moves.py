"""Differences that move both sides of a link alike: written from where one's reference is, and followed by the other's.

The two functions change a reference r by the same operations on the same bytes, each rounded once to float32:

    sender:    d = w - r, encoded        both:    r = decoded(d) + r

They are what `delta` is made of, for whoever keeps references in memory of their own, in one pass over it.
"""

from collections.abc import Sequence

import torch

from paceline_wire.codecs.base import Codec
from paceline_wire.codecs.compiled import CompiledCodec
from paceline_wire.codecs.whole import encode
from paceline_wire.errors import CodecError, InvalidInputError


def encode_move(
    codec: Codec, values: torch.Tensor, reference: torch.Tensor, moved: torch.Tensor | None = None
) -> torch.Tensor:
    """Move a reference towards values as far as the codec can write it; returns the payload that says so.

    Args:
        codec: Writes the difference.
        values: Where to go, contiguous float32 [n].
        reference: Where both sides are, contiguous float32 [n].
        moved: Where both sides are afterwards is written here, float32 [n]; None: to reference itself.

    Raises:
        InvalidInputError: values or moved are of another shape or type than reference.
        CodecError: The difference, or where it would lead, is not finite. What was written to moved is of no use, and
            the other side must not be sent anything.
    """
    moved = reference if moved is None else moved
    _require_alike(values, reference)
    _require_alike(moved, reference)
    if isinstance(codec, CompiledCodec):
        coded = codec.encode_move(values, reference, moved)
        if coded is not None:
            payload, finite = coded
            if not finite:
                codec.check(payload, values.numel())
                raise _beyond(codec)
            return payload
    payload = encode(codec, values - reference)
    follow_move(codec, payload, reference, moved)
    return payload


def follow_move(
    codec: Codec,
    payload: torch.Tensor,
    reference: torch.Tensor,
    moved: torch.Tensor | None = None,
    copies: Sequence[torch.Tensor] = (),
) -> None:
    """Move as a payload of the other side's says.

    Args:
        codec: How it is written.
        payload: uint8 [any].
        reference: Where both sides are, contiguous float32 [n].
        moved: Where both sides are afterwards is written here, float32 [n]; None: to reference itself.
        copies: It is written here as well, on the way: contiguous float32 [any] each, one behind the other n elements.

    Raises:
        InvalidInputError: moved is of another shape or type than reference, or copies are not n elements.
        CodecError: The payload is no valid encoding of n elements (nothing is written then), or it leads to infinity
            (what was written is of no use then).
    """
    moved = reference if moved is None else moved
    _require_alike(moved, reference)
    if copies and sum(copy.numel() for copy in copies) != reference.numel():
        raise InvalidInputError(f"copies of {[copy.numel() for copy in copies]} elements are not {reference.numel()}")
    num_elements = reference.numel()
    codec.check(payload, num_elements)
    finite = codec.follow_move(payload, reference, moved, copies) if isinstance(codec, CompiledCodec) else None
    if finite is None:
        decoded = torch.empty_like(reference)
        codec.decode_range(payload, num_elements, 0, decoded)
        finite_sum(codec, decoded, reference, moved)
        write_copies(moved, copies)
    elif not finite:
        raise _beyond(codec)


def write_copies(values: torch.Tensor, copies: Sequence[torch.Tensor]) -> None:
    """Write values (float32 [n]) to copies ([any] each), one behind the other; none of them: nowhere."""
    start = 0
    for copy in copies:
        copy.copy_(values[start : start + copy.numel()])
        start += copy.numel()


def finite_sum(codec: Codec, decoded: torch.Tensor, reference: torch.Tensor, moved: torch.Tensor) -> None:
    """Write decoded + reference (float32 [n] each) to moved (float32 [n]), which may be one of them.

    Raises:
        CodecError: A sum is not finite.
    """
    torch.add(decoded, reference, out=moved)
    # aminmax takes a tenth of the time of isfinite().all(), which makes a tensor of booleans first.
    if moved.numel() and not all(bool(extreme.isfinite()) for extreme in torch.aminmax(moved)):
        raise _beyond(codec)


def _require_alike(tensor: torch.Tensor, reference: torch.Tensor) -> None:
    if tensor.shape != reference.shape or tensor.dtype != reference.dtype:
        raise InvalidInputError(
            f"values {tensor.dtype} {list(tensor.shape)} do not belong to "
            f"a reference {reference.dtype} {list(reference.shape)}"
        )


def _beyond(codec: Codec) -> CodecError:
    return CodecError(f"{codec.name}: the difference leads beyond the largest float32")
