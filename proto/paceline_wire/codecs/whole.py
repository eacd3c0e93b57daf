"""Encoding and decoding a whole fragment at once, with buffers made here."""

import torch

from paceline_wire.codecs.base import Codec


def encode(codec: Codec, values: torch.Tensor) -> torch.Tensor:
    """Return the encoding (uint8 [codec.encoded_bytes(n)]) of values (contiguous float32 [n]), on their device.

    Values that are not finite do not raise: `Codec.check` refuses the payload.

    Raises:
        InvalidInputError: values are not as said.
    """
    payload = torch.empty(codec.encoded_bytes(values.numel()), dtype=torch.uint8, device=values.device)
    codec.encode(values, payload)
    return payload


def decode(codec: Codec, payload: bytes | bytearray | memoryview | torch.Tensor, num_elements: int) -> torch.Tensor:
    """Check a payload of any content and return its values (float32 [num_elements], all finite), on its device.

    A tensor payload is uint8 [any]. Memory is taken only once the payload has the right size.

    Raises:
        CodecError: The payload is not the finite encoding of num_elements elements.
    """
    coded = payload if isinstance(payload, torch.Tensor) else payload_tensor(payload)
    codec.check(coded, num_elements)
    values = torch.empty(num_elements, dtype=torch.float32, device=coded.device)
    codec.decode_range(coded, num_elements, 0, values)
    return values


def payload_tensor(buffer: bytes | bytearray | memoryview) -> torch.Tensor:
    """Return the bytes of a buffer as uint8 [n].

    A writable, contiguous buffer is shared, not copied: it must not change while the tensor is used (and a bytearray
    cannot be resized meanwhile). Others, such as bytes, are copied, since torch has no read-only tensors.
    """
    view = memoryview(buffer)
    if view.nbytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    if view.readonly or not view.c_contiguous:
        return torch.frombuffer(bytearray(view), dtype=torch.uint8)
    return torch.frombuffer(view, dtype=torch.uint8)
