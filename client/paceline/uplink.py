"""One fragment's pushes on their way up: sequence numbers, and error feedback over pushes that may still be refused."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from paceline_wire.codecs.base import Codec
from paceline_wire.codecs.feedback import Encoded, compensate
from paceline_wire.codecs.parts import Parts


@dataclass(frozen=True, kw_only=True, eq=False)
class EncodedPush:
    """One encoded outer gradient.

    Attributes:
        seq: Counts the pushes to the fragment from 1.
        encoded: What is sent, and what the server will make of it.
    """

    seq: int
    encoded: Encoded


@dataclass(frozen=True, kw_only=True, eq=False)
class UplinkState:
    """What an uplink remembers; its tensors are read-only.

    Attributes:
        seq: The newest push that was encoded; 0: none.
        residual: What the codec owes of the pushes that were applied, float32 [n]; None: nothing.
        residuals_in_flight: What it will owe once a push in flight is applied, by seq.
    """

    seq: int = 0
    residual: torch.Tensor | None = None
    residuals_in_flight: Mapping[int, torch.Tensor | None] = field(default_factory=dict)

    def moved(self, move: Callable[[torch.Tensor], torch.Tensor]) -> "UplinkState":
        """The same, each tensor where move brings it."""
        return UplinkState(
            seq=self.seq,
            residual=None if self.residual is None else move(self.residual),
            residuals_in_flight=moved(self.residuals_in_flight, move),
        )


def moved(
    tensors: Mapping[int, torch.Tensor | None], move: Callable[[torch.Tensor], torch.Tensor]
) -> dict[int, torch.Tensor | None]:
    """Tensors by seq, each where move brings it."""
    return {seq: None if tensor is None else move(tensor) for seq, tensor in tensors.items()}


class Uplink:
    """Encodes one fragment's outer gradients; what the codec loses of one is added to the next.

    The loss counts only once the push is known to be applied. A push encoded while others are in flight builds on the
    newest of them, as if they will be: they all but always are.

    Args:
        codec: How pushes are written.
        error_feedback: False drops what the codec loses.
    """

    def __init__(self, codec: Codec, *, error_feedback: bool = True) -> None:
        self._codec = codec
        self._error_feedback = error_feedback
        self._residual: torch.Tensor | None = None
        self._residuals_in_flight: dict[int, torch.Tensor | None] = {}
        self._seq = 0

    def encode(self, values: torch.Tensor | Parts, minus: torch.Tensor | Parts | None = None) -> EncodedPush:
        """Encode an outer gradient, values - minus (float32 [n] each, in one tensor or several) or values alone.

        It counts as in flight from then on.
        """
        residual = self._residuals_in_flight.get(self._seq, self._residual)
        encoded = compensate(self._codec, values, residual, minus=minus)
        self._seq += 1
        self._residuals_in_flight[self._seq] = encoded.residual if self._error_feedback else None
        return EncodedPush(seq=self._seq, encoded=encoded)

    @property
    def state(self) -> UplinkState:
        """What it remembers at this moment."""
        return UplinkState(seq=self._seq, residual=self._residual, residuals_in_flight=dict(self._residuals_in_flight))

    def restore(self, state: UplinkState) -> None:
        """Go on from what an uplink to the same fragment remembered."""
        self._seq = state.seq
        self._residual = state.residual
        self._residuals_in_flight = dict(state.residuals_in_flight)

    def settle(self, seq: int, *, applied: bool) -> None:
        """Learn what became of a push."""
        residual = self._residuals_in_flight.pop(seq)
        if applied:
            self._residual = residual
