"""What every codec asks of the tensors it is given, and how it walks through them."""

from collections.abc import Iterator

import torch

from paceline_wire.codecs.base import BLOCK_ELEMENTS
from paceline_wire.errors import CodecError, InvalidInputError

CHUNK_ELEMENTS = 256 * 1024
"""Elements worked on at once, a multiple of BLOCK_ELEMENTS: 1 MiB of float32 temporaries stays in the cache, and the
Python glue is paid so seldom that it disappears (chunks of half this size take a fifth to a third longer)."""

_GPU_CHUNK_ELEMENTS = 16 * 1024 * 1024
"""The same on a GPU, where every operation on a chunk is a kernel to launch: a whole fragment, and temporaries of at
most 64 MiB."""


def chunk_elements(device: torch.device) -> int:
    """How many elements to work on at once on a device, a multiple of BLOCK_ELEMENTS."""
    return CHUNK_ELEMENTS if device.type == "cpu" else _GPU_CHUNK_ELEMENTS


def chunks(num_elements: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """Yield the bounds (first, last) of consecutive chunks of at most chunk_elements that cover num_elements."""
    most = chunk_elements(device)
    for first in range(0, num_elements, most):
        yield first, min(first + most, num_elements)


def typed_view(payload: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """See uint8 [n * size of dtype] as dtype [n], to be read only.

    A payload cut out of a message may start at any byte, which neither torch nor a GPU accepts for wider types; such
    ones are copied. Bytes are little-endian, as every machine is that torch runs on (`registry` refuses others).
    """
    if payload.storage_offset() % dtype.itemsize or payload.data_ptr() % dtype.itemsize or payload.stride(0) != 1:
        payload = payload.clone(memory_format=torch.contiguous_format)
    return payload.view(dtype)


def byte_view(tensor: torch.Tensor) -> torch.Tensor:
    """See the memory of a contiguous tensor [n] as uint8 [n * size of its dtype]."""
    # Tensors of no or one element may have any stride, which view refuses.
    return tensor.as_strided(tensor.shape, (1,)).view(torch.uint8)


def require_encodable(name: str, values: torch.Tensor, out: torch.Tensor, num_bytes: int) -> None:
    """Refuse arguments of `Codec.encode` that do not fit each other; num_bytes is what out must have.

    Raises:
        InvalidInputError: A type, shape or size is wrong; the message says which.
    """
    require_flat(name, "values", values, torch.float32)
    require_flat(name, "the target", out, torch.uint8)
    if out.numel() != num_bytes:
        raise InvalidInputError(
            f"{name}: the encoding of {values.numel()} elements needs {num_bytes} bytes, the target has {out.numel()}"
        )


def require_payload(name: str, payload: torch.Tensor, num_elements: int, num_bytes: int) -> None:
    """Refuse what cannot be the encoding of num_elements elements for its size alone; num_bytes is the right one.

    Raises:
        CodecError: The type, shape or size is wrong, or num_elements is negative.
    """
    if num_elements < 0:
        raise CodecError(f"{name}: {num_elements} elements cannot be encoded")
    if payload.dtype != torch.uint8 or payload.dim() != 1:
        raise CodecError(f"{name}: a payload is uint8 [n], not {payload.dtype} {list(payload.shape)}")
    if payload.numel() != num_bytes:
        raise CodecError(
            f"{name}: the encoding of {num_elements} elements has {num_bytes} bytes, this payload {payload.numel()}"
        )


def require_range(name: str, num_elements: int, start: int, out: torch.Tensor) -> None:
    """Refuse a range of `Codec.decode_range` that does not lie in num_elements or does not start with a block.

    Raises:
        CodecError: The range or its target is wrong; the message says how.
    """
    require_flat(name, "the target", out, torch.float32, CodecError)
    if start < 0 or start % BLOCK_ELEMENTS or start + out.numel() > num_elements:
        raise CodecError(
            f"{name}: elements {start} to {start + out.numel()} are not a range of {num_elements} "
            f"that starts at a multiple of {BLOCK_ELEMENTS}"
        )


def require_flat(
    name: str,
    what: str,
    tensor: torch.Tensor,
    dtype: torch.dtype,
    error: type[InvalidInputError] = InvalidInputError,
) -> None:
    """Refuse a tensor that is not contiguous dtype [n] without gradient.

    Raises:
        InvalidInputError: It is not; or the error that was given.
    """
    if tensor.dtype != dtype or tensor.dim() != 1 or not tensor.is_contiguous() or tensor.requires_grad:
        raise error(
            f"{name}: {what} must be contiguous {dtype} [n] without gradient, not {tensor.dtype} "
            f"{list(tensor.shape)} with strides {list(tensor.stride())}, requires_grad={tensor.requires_grad}"
        )
