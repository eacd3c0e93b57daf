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

from dataclasses import dataclass

import torch

from paceline_wire.codecs.base import Codec
from paceline_wire.codecs.compiled import Compensated, CompiledCodec
from paceline_wire.codecs.whole import encode
from paceline_wire.errors import CodecError, InvalidInputError


@dataclass(frozen=True, kw_only=True, eq=False)
class Encoded:
    """One fragment's message and what follows from it. Treat its tensors as read-only: some may be the caller's own."""

    payload: torch.Tensor
    """What is sent: uint8 [codec.encoded_bytes(n)]."""
    decoded: torch.Tensor
    """What the receiver will make of it: float32 [n]; zeros if it will refuse the payload because finite is False."""
    residual: torch.Tensor | None
    """What this message lacks, of which the next one carries its part: float32 [n], or None for nothing."""
    finite: bool
    """Whether the receiver can accept the payload; if not, residual is the one that was given."""


def compensate(codec: Codec, values: torch.Tensor, residual: torch.Tensor | None = None) -> Encoded:
    """Encode values plus what the last acknowledged message lacked.

    With c = values + residual_decay * residual, rounded to float32 after each operation: `decoded` is what the payload
    decodes to, and the new residual is c - decoded, without rounding for every dense codec of this package and within
    2^-24 of decoded for topk. A lossless codec leaves no residual; its `decoded` is c itself. Nothing that is given is
    changed; no temporary is made of the size of values beyond what is returned.

    Args:
        codec: Writes the payload.
        values: The new message, contiguous float32 [n]. May be infinite or NaN, which gives `finite` = False.
        residual: The last acknowledged `Encoded.residual` of this fragment, float32 [n] on the same device.

    Raises:
        InvalidInputError: values are not as said, or the residual is of another shape.
    """
    if residual is not None and (residual.shape != values.shape or residual.dtype != values.dtype):
        raise InvalidInputError(
            f"the residual {residual.dtype} {list(residual.shape)} does not belong to "
            f"values {values.dtype} {list(values.shape)}"
        )
    if isinstance(codec, CompiledCodec) and not codec.lossless:
        done = codec.compensate(values, residual)
        if done is not None:
            return _encoded(codec, done, residual)
    compensated = values if residual is None else _sum(values, residual, codec.residual_decay)
    payload = encode(codec, compensated)
    try:
        codec.check(payload, values.numel())
    except CodecError:
        return Encoded(payload=payload, decoded=torch.zeros_like(values), residual=residual, finite=False)
    if codec.lossless:
        return Encoded(payload=payload, decoded=compensated, residual=None, finite=True)
    decoded = torch.empty_like(values)
    codec.decode_range(payload, values.numel(), 0, decoded)
    lost = values - decoded if residual is None else compensated.sub_(decoded)
    return Encoded(payload=payload, decoded=decoded, residual=lost, finite=True)


def _encoded(codec: Codec, done: Compensated, residual: torch.Tensor | None) -> Encoded:
    """What was done in one pass, if the receiver can accept it."""
    try:
        codec.check(done.payload, done.decoded.numel())
    except CodecError:
        return Encoded(payload=done.payload, decoded=done.decoded.zero_(), residual=residual, finite=False)
    return Encoded(payload=done.payload, decoded=done.decoded, residual=done.lost, finite=True)


def _sum(values: torch.Tensor, residual: torch.Tensor, decay: float) -> torch.Tensor:
    """Values + decay * residual (float32 [n] each). In two operations: one could be fused on some devices only."""
    if decay == 1:
        return values + residual
    return (residual * decay).add_(values)
