"""Error feedback: what a codec lost of one message is added to the next, once the first is known to have arrived.

Nothing is kept here. `compensate` returns the message together with the residual that holds *if* the message is
applied; the caller replaces its residual by that one on acknowledgement, or drops it if the push was refused, and
sends the same payload again until it knows which. So a retry can neither lose nor double anything:

    residual = None
    encoded = compensate(codec, outer_gradient, residual)
    ... send encoded.payload until it is acknowledged or refused ...
    if acknowledged:
        residual = encoded.residual

A codec may carry less than the whole loss (`Codec.residual_decay`). The dense ones carry all of it, so over many
messages nothing is lost. The sparse topk carries 0.95: an element waits for many messages until it is among the
largest, and the decay bounds how much gathers meanwhile and how old it is, which serves as momentum kept on the worker
(SparseLoCo, arXiv 2508.15706). An element of constant x that is sent with every message number t, 2 t, 3 t ... then
arrives each time as x (1 - 0.95^t) / 0.05 instead of t x.

Source: Karimireddy et al., Error Feedback Fixes SignSGD, arXiv 1901.09847, algorithm 1, with the learning rate left
to the server.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from paceline_wire.codecs.base import Codec
from paceline_wire.codecs.buffers import chunk_elements, chunks
from paceline_wire.codecs.compiled import CompiledCodec
from paceline_wire.codecs.parts import Parts, difference_of
from paceline_wire.codecs.whole import encode
from paceline_wire.errors import CodecError, InvalidInputError


@dataclass(frozen=True, kw_only=True, eq=False)
class Encoded:
    """One fragment's message and what follows from it. Treat its tensors as read-only: some may be the caller's own."""

    codec: Codec
    """Has written it."""
    num_elements: int
    """Elements that it says: n."""
    payload: torch.Tensor
    """What is sent: uint8 [codec.encoded_bytes(n)]."""
    residual: torch.Tensor | None
    """What this message lacks, of which the next one carries its part: float32 [n], or None for nothing."""
    finite: bool
    """Whether the receiver can accept the payload; if not, residual is the one that was given."""

    def decode(self) -> torch.Tensor:
        """What the receiver will make of it (float32 [n], the caller's own); zeros if finite is False."""
        decoded = torch.zeros(self.num_elements, device=self.payload.device)
        if self.finite:
            self.codec.decode_range(self.payload, self.num_elements, 0, decoded)
        return decoded

    def decoded_pieces(self, num_elements: int) -> Iterator[tuple[slice, torch.Tensor]]:
        """What the receiver will make of the first so many elements, in pieces that fit a cache.

        Yields:
            Where a piece is, and its numbers (float32 [k]): the caller's own until the next piece is asked for.
        """
        device = self.payload.device
        scratch = torch.zeros(min(chunk_elements(device), num_elements), device=device)
        for first, end in chunks(num_elements, device):
            piece = scratch[: end - first]
            if self.finite:
                self.codec.decode_range(self.payload, self.num_elements, first, piece)
            else:
                piece.zero_()
            yield slice(first, end), piece


def compensate(
    codec: Codec,
    values: torch.Tensor | Parts,
    residual: torch.Tensor | None = None,
    *,
    minus: torch.Tensor | Parts | None = None,
) -> Encoded:
    """Encode values plus what the last acknowledged message lacked.

    With c = values - minus + residual_decay * residual, rounded to float32 after each operation: the new residual is
    c less what the payload decodes to, without rounding for every dense codec of this package and within 2^-24 of that
    for topk. A lossless codec leaves no residual; its payload decodes to c itself. Nothing that is given is changed.

    Args:
        codec: Writes the payload.
        values: The new message, contiguous float32 [n], in one tensor or in several, one behind the other. May be
            infinite or NaN, which gives `finite` = False.
        residual: The last acknowledged `Encoded.residual` of this fragment, float32 [n] on the same device.
        minus: Is subtracted from values first, float32 [n] on the same device, in one tensor or in several; None:
            nothing.

    Raises:
        InvalidInputError: values are not as said, or the residual or minus is of another shape.
    """
    added = [values] if isinstance(values, torch.Tensor) else values
    subtracted = [minus] if isinstance(minus, torch.Tensor) else minus or ()
    num_elements = sum(part.numel() for part in added)
    _require_alike("residual", () if residual is None else (residual,), added, num_elements)
    _require_alike("subtrahend", subtracted, added, num_elements)
    done = (
        codec.compensate(added, subtracted, residual)
        if isinstance(codec, CompiledCodec) and not codec.lossless
        else None
    )
    payload, lost = done or _compensated(codec, difference_of(added, subtracted), residual)
    try:
        codec.check(payload, num_elements)
    except CodecError:
        finite, lost = False, residual
    else:
        finite = True
    return Encoded(codec=codec, num_elements=num_elements, payload=payload, residual=lost, finite=finite)


def _require_alike(name: str, others: Parts, values: Parts, num_elements: int) -> None:
    """Refuse what does not belong to values.

    Raises:
        InvalidInputError: It has another size or type.
    """
    found = sum(other.numel() for other in others)
    if others and (found != num_elements or any(other.dtype != values[0].dtype for other in others)):
        raise InvalidInputError(
            f"the {name} {others[0].dtype} [{found}] does not belong to values {values[0].dtype} [{num_elements}]"
        )


def _compensated(
    codec: Codec, values: torch.Tensor, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The payload of values + decay * residual (float32 [n] each), and what it lacks of that (float32 [n] or None)."""
    compensated = values if residual is None else _sum(values, residual, codec.residual_decay)
    payload = encode(codec, compensated)
    if codec.lossless:
        return payload, None
    decoded = torch.empty_like(values)
    codec.decode_range(payload, values.numel(), 0, decoded)
    return payload, torch.sub(compensated, decoded, out=decoded)


def _sum(values: torch.Tensor, residual: torch.Tensor, decay: float) -> torch.Tensor:
    """Values + decay * residual (float32 [n] each). In two operations: one could be fused on some devices only."""
    if decay == 1:
        return values + residual
    return (residual * decay).add_(values)
