"""The L2 norm of an encoding, defined to the bit, so that every implementation says the same of a push.

All of it is float64, each operation rounded to nearest even. The sum of squares of a block of 256 elements, zeros
behind the last one, is

    (the sum of v^2, an exact integer) * step^2     for int8, int4 and fp4, with v and step as `blockwise` has them
    what `sums_of_squares` says of x                for the others

and those of the blocks are summed by halves: zeros are put behind them up to a power of two, and then the upper half is
added to the lower one until one is left. The norm is its square root.
"""

import math

import numpy as np
import torch

from paceline_wire.codecs.base import BLOCK_ELEMENTS, Codec
from paceline_wire.codecs.buffers import chunk_elements, chunks

_LANES = 16


def norm(codec: Codec, payload: torch.Tensor, num_elements: int) -> float:
    """The norm of a payload (uint8 [codec.encoded_bytes(num_elements)]) that has passed `codec.check`, on the CPU.

    One of fp32 or bf16 need not have passed: its norm is finite if and only if all its numbers are. Squares of
    float32's numbers neither overflow nor vanish.

    Raises:
        CodecError: The payload's size is wrong.
    """
    sums = codec.block_squares(payload, num_elements).numpy()
    if num_elements == 0:
        return 0.0
    # In numpy, whose calls cost a tenth of torch's: the last of these numbers are few.
    padded = np.zeros(1 << (len(sums) - 1).bit_length())
    padded[: len(sums)] = sums
    while len(padded) > 1:
        half = len(padded) // 2
        padded = padded[:half] + padded[half:]
    return math.sqrt(padded[0])


def squares_of_decoded(codec: Codec, payload: torch.Tensor, num_elements: int) -> torch.Tensor:
    """The sum of the squares of each block's numbers (float64 [B]), which are decoded piece by piece.

    Raises:
        CodecError: The payload's size is wrong.
    """
    sums = torch.empty(-(-num_elements // BLOCK_ELEMENTS), dtype=torch.float64, device=payload.device)
    scratch = torch.empty(min(num_elements, chunk_elements(payload.device)), device=payload.device)
    codec.decode_range(payload, num_elements, 0, scratch[:0])
    for first, last in chunks(num_elements, payload.device):
        values = scratch[: last - first]
        codec.decode_range(payload, num_elements, first, values)
        sums[first // BLOCK_ELEMENTS : -(-last // BLOCK_ELEMENTS)] = sums_of_squares(values)
    return sums


def sums_of_squares(values: torch.Tensor) -> torch.Tensor:
    """The sum of the squares of each block (float64 [B]) of values (float32 [n]).

    A block's squares are 16 rows of 16: the rows are summed from the first to the last, then what is left by halves.
    """
    squares = torch.nn.functional.pad(values, (0, -values.numel() % BLOCK_ELEMENTS)).double().square_()
    rows = squares.view(-1, BLOCK_ELEMENTS // _LANES, _LANES)
    sums = rows[:, 0].clone()
    for row in range(1, rows.shape[1]):
        sums.add_(rows[:, row])
    while sums.shape[1] > 1:
        half = sums.shape[1] // 2
        sums = sums[:, :half] + sums[:, half:]
    return sums[:, 0]
