"""How the server's numbers reach simulated workers: in a codec, whole or as the change since the last time."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from paceline_server.fragment import FragmentValues
from paceline_wire import codecs
from paceline_wire.codecs.base import Codec
from paceline_wire.codecs.delta import Reference


class Served(NamedTuple):
    """A fragment as a worker decodes it; shared between workers, so not to be changed.

    Attributes:
        values: float32 [n].
        momentum: float32 [n]; None if it was not sent.
        num_bytes: Size of the encoding.
    """

    values: torch.Tensor
    momentum: torch.Tensor | None
    num_bytes: int


class Downlink(Protocol):
    """Writes answers."""

    def first(self, worker: int, fragment: int, values: FragmentValues) -> torch.Tensor:
        """What a worker that joins fetches, float32 [n]."""

    def served(
        self, workers: Sequence[int], fragment: int, values: FragmentValues, *, with_momentum: bool
    ) -> Sequence[Served]:
        """What workers are answered, one by one."""


class WholeDownlink:
    """The values themselves in a codec.

    Args:
        codec: How they are written.
    """

    def __init__(self, codec: Codec) -> None:
        self._codec = codec

    def first(self, worker: int, fragment: int, values: FragmentValues) -> torch.Tensor:
        """The values as the codec gives them back."""
        return self._through_codec(values.published())

    def served(
        self, workers: Sequence[int], fragment: int, values: FragmentValues, *, with_momentum: bool
    ) -> Sequence[Served]:
        """The values, and the momentum behind them, as the codec gives them back: the same for all."""
        if with_momentum:
            decoded = self._through_codec(torch.cat((values.published(), values.momentum)))
            numbers, momentum = decoded[: values.num_elements], decoded[values.num_elements :]
            return [Served(numbers, momentum, self._codec.encoded_bytes(decoded.numel()))] * len(workers)
        decoded = self._through_codec(values.published())
        return [Served(decoded, None, self._codec.encoded_bytes(values.num_elements))] * len(workers)

    def _through_codec(self, numbers: torch.Tensor) -> torch.Tensor:
        if self._codec.lossless:
            return numbers.clone()
        return codecs.decode(self._codec, codecs.encode(self._codec, numbers), numbers.numel())


class DeltaDownlink:
    """The change since what the worker holds, in a codec; what the codec loses is part of the next change.

    Args:
        codec: How changes are written.
    """

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self._held: dict[tuple[int, int], Reference] = {}

    def first(self, worker: int, fragment: int, values: FragmentValues) -> torch.Tensor:
        """The values in every bit: they are what changes refer to."""
        held = Reference(self._codec, values.published().clone())
        self._held[worker, fragment] = held
        return held.values

    def served(
        self, workers: Sequence[int], fragment: int, values: FragmentValues, *, with_momentum: bool
    ) -> Sequence[Served]:
        """What each worker holds after its change; the momentum is sent whole."""
        momentum = None
        if with_momentum:
            momentum = codecs.decode(self._codec, codecs.encode(self._codec, values.momentum), values.num_elements)
        return [self._changed(self._held[worker, fragment], values, momentum) for worker in workers]

    def _changed(self, held: Reference, values: FragmentValues, momentum: torch.Tensor | None) -> Served:
        num_bytes = held.encode(values.published()).numel()
        if momentum is not None:
            num_bytes += self._codec.encoded_bytes(values.num_elements)
        return Served(held.values, momentum, num_bytes)
