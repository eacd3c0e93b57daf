"""The live model as fragments: reading and changing parameters in place, without holding up the training thread."""

from collections.abc import Mapping

import torch

from paceline.place import Handed, Place
from paceline_wire.codecs.parts import Parts
from paceline_wire.manifest import Fragment


class _Piece:
    """The part of one tensor that lies in a fragment."""

    def __init__(self, tensor: torch.Tensor, tensor_start: int, fragment_start: int, length: int) -> None:
        self._tensor = tensor
        self._inside = slice(tensor_start, tensor_start + length)
        self._outside = slice(fragment_start, fragment_start + length)

    def inside(self) -> torch.Tensor | None:
        """The part in the tensor's own memory; None if it is scattered there."""
        return self._tensor.view(-1)[self._inside] if self._tensor.is_contiguous() else None

    def read(self, flat: torch.Tensor) -> None:
        flat[self._outside].copy_(self._tensor.reshape(-1)[self._inside])

    def write(self, flat: torch.Tensor) -> None:
        values = self._tensor.reshape(-1)
        values[self._inside].copy_(flat[self._outside])
        self._put_back(values)

    def add(self, flat: torch.Tensor) -> None:
        values = self._tensor.reshape(-1)
        values[self._inside].add_(flat[self._outside].to(values.device))
        self._put_back(values)

    def _put_back(self, values: torch.Tensor) -> None:
        # reshape gives a view of a contiguous tensor, and a copy of any other (channels-last, transposed).
        if not self._tensor.is_contiguous():
            self._tensor.copy_(values.view(self._tensor.shape))


class FragmentState:
    """One fragment of the live model.

    Attributes:
        place: Where the exchange works on it.
        is_contiguous: Whether all its tensors are.

    Args:
        fragment: Its place in the plan.
        tensors: The model's tensors by name, detached.
        place: See above; None: where the model is.
    """

    def __init__(self, fragment: Fragment, tensors: Mapping[str, torch.Tensor], place: Place | None = None) -> None:
        self.num_elements = fragment.num_elements
        self.is_full_precision = fragment.dtype == "float32"
        self._dtype: torch.dtype = getattr(torch, fragment.dtype)
        self._pieces = [
            _Piece(tensors[segment.tensor], segment.tensor_start, segment.fragment_start, segment.length)
            for segment in fragment.segments
        ]
        self.is_contiguous = all(piece.inside() is not None for piece in self._pieces)
        self._device = device_of(fragment, tensors)
        self.place = place or Place(self._device)

    def read(self) -> Handed:
        """A copy of the values as they are now, at the place; the calling thread does not wait for it."""
        flat = torch.empty(self.num_elements, device=self._device)
        for piece in self._pieces:
            piece.read(flat)
        return self.place.from_model(flat)

    def lent(self) -> Parts:
        """The values, at the place, of a model that is lent: in the model's own memory if they are there in float32.

        Called on the exchange thread, within the place's stream.
        """
        inside = [piece.inside() for piece in self._pieces]
        if not self.is_full_precision or self.place.moves:
            return [self.read().take()]
        parts = [part for part in inside if part is not None]
        return parts if len(parts) == len(inside) else [self.read().take()]

    def write(self, values: torch.Tensor) -> Handed:
        """Set the model to values (float32 [n] at the place or on the host). Called where nobody else uses the model.

        Returns:
            What the model holds then, rounded to its dtype, at the place.
        """
        flat = values.to(self._device)
        for piece in self._pieces:
            piece.write(flat)
        held = values.to(self.place.device)
        return self.place.hand_over(held if self.is_full_precision else held.to(self._dtype).float())

    def add(self, shift: Handed) -> None:
        """Shift the model by values that are where it is, rounded to its dtype. Called on the training thread."""
        flat = shift.take()
        for piece in self._pieces:
            piece.add(flat)


def device_of(fragment: Fragment, tensors: Mapping[str, torch.Tensor]) -> torch.device:
    """Where a fragment of the model is: where its first tensor is."""
    return tensors[fragment.segments[0].tensor].device
