"""Values that lie in several tensors one behind the other, for passes that work on whole blocks in one piece."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from paceline_wire.codecs.base import BLOCK_ELEMENTS
from paceline_wire.codecs.kernels import LEAST_ELEMENTS

Parts: TypeAlias = Sequence[torch.Tensor]
"""Flat float32 tensors, which together are the values [n] of a fragment in order."""


@dataclass(frozen=True, eq=False)
class Run:
    """Some of the values, from a block's first one to a block's last one, or to the last of all.

    Attributes:
        first: The first of them.
        end: Behind the last.
        pieces: Where they lie, in order.
    """

    first: int
    end: int
    pieces: Parts

    @property
    def inside(self) -> torch.Tensor | None:
        """They themselves, if they lie in one tensor: float32 [end - first]."""
        return self.pieces[0] if len(self.pieces) == 1 else None

    def read(self) -> torch.Tensor:
        """They themselves, or a copy in one piece."""
        return whole(self.pieces)

    def write(self, values: torch.Tensor, first: int) -> None:
        """Set them to values (float32 [end - first]), from the number first on."""
        start = 0
        for piece in self.pieces:
            skipped = min(max(first - start, 0), piece.numel())
            piece[skipped:].copy_(values[start + skipped : start + piece.numel()])
            start += piece.numel()


def runs(parts: Parts) -> list[Run]:
    """Cut values into runs: long ones inside each part, and what lies between them.

    Args:
        parts: The values, at least one tensor.
    """
    found: list[Run] = []
    between: list[torch.Tensor] = []
    done = start = 0
    for part in parts:
        end = start + part.numel()
        first, last = -(-start // BLOCK_ELEMENTS) * BLOCK_ELEMENTS, end // BLOCK_ELEMENTS * BLOCK_ELEMENTS
        if last - first < LEAST_ELEMENTS:
            between.append(part)
        else:
            if first > done:
                found.append(Run(done, first, [*between, part[: first - start]] if first > start else between))
            found.append(Run(first, last, [part[first - start : last - start]]))
            between, done = [part[last - start :]] if end > last else [], last
        start = end
    if between:
        found.append(Run(done, start, between))
    return found


def whole(parts: Parts) -> torch.Tensor:
    """The values in one piece (float32 [n]): the part itself if there is one, else a copy."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def difference_of(values: Parts, minus: Parts) -> torch.Tensor:
    """Values less minus (no tensors: nothing) in one piece, float32 [n]."""
    return whole(values) - whole(minus) if minus else whole(values)
