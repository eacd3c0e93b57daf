"""fp32 between two places of one process: the same bits as the wire's, with a check that costs next to nothing."""

import torch

from paceline_wire import codecs
from paceline_wire.codecs.base import Codec
from paceline_wire.codecs.floats import Fp32Codec


class InProcessFp32(Fp32Codec):
    """fp32 whose check adds the elements up first: a finite sum says that all of them are finite."""

    def check(self, payload: torch.Tensor, num_elements: int) -> None:
        """Refuse a payload as fp32 does; a sum that overflowed, or a wrong size, is looked at again there."""
        if payload.numel() != self.encoded_bytes(num_elements) or not payload.view(torch.float32).sum().isfinite():
            super().check(payload, num_elements)


def codec_in_process(name: str) -> Codec:
    """The codec of that name, or what stands for it here.

    Raises:
        InvalidInputError: There is none.
    """
    return InProcessFp32() if name == "fp32" else codecs.codec(name)
