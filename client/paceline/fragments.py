"""Between a model's named tensors and the flat fragments that are exchanged."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

from paceline_wire.codecs.moves import write_copies
from paceline_wire.codecs.parts import whole
from paceline_wire.errors import InvalidInputError, ManifestMismatchError
from paceline_wire.manifest import Fragment, Manifest, TensorSpec

_DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def exchanged(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors that are exchanged, detached: tied ones once, under their first name; integer ones not at all.

    Args:
        tensors: By name, any shapes, on any device.

    Raises:
        InvalidInputError: A tensor has a dtype that can neither be exchanged nor is local.
    """
    found: dict[str, torch.Tensor] = {}
    seen: set[tuple[object, ...]] = set()
    for name, tensor in tensors.items():
        if not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        if tensor.dtype not in _DTYPE_NAMES:
            raise InvalidInputError(
                f"tensor {name!r} is {tensor.dtype}; only {', '.join(_DTYPE_NAMES.values())} can be exchanged: "
                "convert it, or freeze it to leave it out"
            )
        identity = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() and identity in seen:
            continue
        seen.add(identity)
        found[name] = tensor.detach()
    return found


def manifest_of(tensors: Mapping[str, torch.Tensor], averaged: Collection[str], fragment_elements: int) -> Manifest:
    """The manifest of exchanged tensors.

    Args:
        tensors: As `exchanged` returns them.
        averaged: Names of those that are averaged without momentum.
        fragment_elements: The largest fragment.

    Raises:
        InvalidInputError: The manifest's rules are broken; the text says which tensor and why.
    """
    return Manifest.of(
        (
            TensorSpec(
                name=name,
                shape=tuple(tensor.shape),
                dtype=_DTYPE_NAMES[tensor.dtype],
                role="averaged" if name in averaged else "parameter",
            )
            for name, tensor in tensors.items()
        ),
        fragment_elements,
    )


def require_values(manifest: Manifest, tensors: Mapping[str, torch.Tensor]) -> None:
    """Make sure that tensors has exactly the manifest's names and shapes; dtypes may differ.

    Raises:
        ManifestMismatchError: It has not; the text names the first tensor that differs.
    """
    for spec in manifest.tensors:
        tensor = tensors.get(spec.name)
        if tensor is None:
            raise ManifestMismatchError(f"tensor {spec.name!r} of the run is missing from what was given")
        if tuple(tensor.shape) != spec.shape:
            raise ManifestMismatchError(
                f"tensor {spec.name!r} has shape {list(tensor.shape)}; in the run it has {list(spec.shape)}"
            )
    unknown = tensors.keys() - {spec.name for spec in manifest.tensors}
    if unknown:
        raise ManifestMismatchError(f"the run has no tensor {min(unknown)!r}")


def gather(fragment: Fragment, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """A fragment's values, contiguous float32 [n] on the host; a view of the tensor where it is one such piece."""
    return whole(parts_of(fragment, tensors))


def parts_of(fragment: Fragment, tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """A fragment's values in parts, one behind the other, together float32 [n] on the host; views where they can be."""
    return [
        tensors[segment.tensor]
        .detach()
        .reshape(-1)[segment.tensor_start : segment.tensor_start + segment.length]
        .to(device="cpu", dtype=torch.float32)
        .contiguous()
        for segment in fragment.segments
    ]


def scatter(fragment: Fragment, values: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a fragment's values (float32 [n]) to contiguous tensors."""
    write_copies(values, Destination(fragment=fragment, tensors=tensors).parts)


@dataclass(frozen=True, kw_only=True, eq=False)
class Destination:
    """Where a fragment's newest values are to be written.

    Attributes:
        fragment: The fragment.
        tensors: Contiguous float32 tensors on the host, by name; nobody uses them meanwhile.
    """

    fragment: Fragment
    tensors: Mapping[str, torch.Tensor]

    @property
    def parts(self) -> list[torch.Tensor]:
        """The parts of the tensors that have the values, in order: float32 [any] each, together [n]."""
        return [
            self.tensors[segment.tensor].view(-1)[segment.tensor_start : segment.tensor_start + segment.length]
            for segment in self.fragment.segments
        ]


def empty_tensors(manifest: Manifest) -> dict[str, torch.Tensor]:
    """Uninitialized float32 tensors of the manifest's names and shapes, on the host."""
    return {spec.name: torch.empty(spec.shape) for spec in manifest.tensors}
