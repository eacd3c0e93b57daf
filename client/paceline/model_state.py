"""The live model as fragments: reading and changing parameters on their device without holding up the training thread.

On CUDA, copies to and from the host go through pinned memory on a stream of their own, so that neither the kernels that
train nor the thread that launches them wait for the bus.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from paceline_wire.manifest import Fragment


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A fragment's values on their way to the host.

    Attributes:
        values: float32 [n] on the host; complete only after `wait`.
        copied: The event after the copy; None if it is complete already.
    """

    values: torch.Tensor
    copied: "torch.cuda.Event | None" = None

    def wait(self) -> torch.Tensor:
        """The values, once they have arrived. Called beside the training thread."""
        if self.copied is not None:
            self.copied.synchronize()
        return self.values


@dataclass(frozen=True, eq=False)
class Staged:
    """Values on their way to the device.

    Attributes:
        values: float32 [n] where the model is.
        copied: The event that the training stream must wait for; None if there is nothing to wait for.
    """

    values: torch.Tensor
    copied: "torch.cuda.Event | None" = None

    def ready(self) -> torch.Tensor:
        """The values, for use on the current stream. Called on the training thread; does not wait."""
        if self.copied is not None:
            stream = torch.cuda.current_stream(self.values.device)
            stream.wait_event(self.copied)
            self.values.record_stream(stream)
        return self.values


class _Piece:
    """The part of one tensor that lies in a fragment."""

    def __init__(self, tensor: torch.Tensor, tensor_start: int, fragment_start: int, length: int) -> None:
        self._tensor = tensor
        self._inside = slice(tensor_start, tensor_start + length)
        self._outside = slice(fragment_start, fragment_start + length)

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

    Args:
        fragment: Its place in the plan.
        tensors: The model's tensors by name, detached.
    """

    def __init__(self, fragment: Fragment, tensors: Mapping[str, torch.Tensor]) -> None:
        self.num_elements = fragment.num_elements
        self.is_full_precision = fragment.dtype == "float32"
        self._dtype: torch.dtype = getattr(torch, fragment.dtype)
        self._pieces = [
            _Piece(tensors[segment.tensor], segment.tensor_start, segment.fragment_start, segment.length)
            for segment in fragment.segments
        ]
        self._device = tensors[fragment.segments[0].tensor].device
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None  # type: ignore[no-untyped-call]  # torch has no types here

    def read(self) -> Snapshot:
        """The values as they are now. Called on the training thread, which does not wait for the copy."""
        flat = torch.empty(self.num_elements, device=self._device)
        for piece in self._pieces:
            piece.read(flat)
        if self._stream is None:
            return Snapshot(flat.cpu())
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            values = torch.empty(self.num_elements, pin_memory=True)
            values.copy_(flat, non_blocking=True)
            flat.record_stream(self._stream)
            return Snapshot(values, self._stream.record_event())

    def stage(self, values: torch.Tensor) -> Staged:
        """Send values (float32 [n] on the host) towards the device. Called beside the training thread."""
        if self._stream is None:
            return Staged(values.to(self._device))
        with torch.cuda.stream(self._stream):
            on_device = values.pin_memory().to(self._device, non_blocking=True)
            return Staged(on_device, self._stream.record_event())

    def write(self, values: torch.Tensor) -> torch.Tensor:
        """Set the model to values (float32 [n] on the host); returns what it holds then, rounded to its dtype."""
        flat = values.to(self._device)
        for piece in self._pieces:
            piece.write(flat)
        return values if self.is_full_precision else values.to(self._dtype).float()

    def add(self, staged: Staged) -> None:
        """Shift the model by staged values, rounded to its dtype. Called on the training thread."""
        flat = staged.ready()
        for piece in self._pieces:
            piece.add(flat)
