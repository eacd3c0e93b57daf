"""How the server's numbers reach simulated workers: in a codec, whole or as the change since the last time."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from paceline_server.fragment import FragmentValues
from paceline_wire import codecs
from paceline_wire.codecs.base import Codec


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

    As from a real shard, what a worker fetches and its first answer are the values themselves in `codecs.whole_codec`,
    and changes are since that answer.

    Args:
        codec: How changes are written.
    """

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self._whole = WholeDownlink(codecs.codec("bf16"))
        self._held: dict[tuple[int, int], torch.Tensor] = {}

    def first(self, worker: int, fragment: int, values: FragmentValues) -> torch.Tensor:
        """The values; changes do not refer to them."""
        self._held.pop((worker, fragment), None)
        return self._whole.first(worker, fragment, values)

    def served(
        self, workers: Sequence[int], fragment: int, values: FragmentValues, *, with_momentum: bool
    ) -> Sequence[Served]:
        """What each worker holds after its change; the momentum behind it is no change. Worked out once for equals."""
        known: dict[int | None, Served] = {}
        served = []
        for worker in workers:
            held = self._held.get((worker, fragment))
            key = None if held is None else id(held)
            if key not in known:
                known[key] = self._served(held, fragment, values, with_momentum=with_momentum)
            self._held[worker, fragment] = known[key].values
            served.append(known[key])
        return served

    def _served(
        self, held: torch.Tensor | None, fragment: int, values: FragmentValues, *, with_momentum: bool
    ) -> Served:
        if held is None:
            return self._whole.served([0], fragment, values, with_momentum=with_momentum)[0]
        momentum = values.momentum if with_momentum else None
        payload, moved = codecs.difference(self._codec, values.published(), held, momentum)
        if momentum is not None:
            momentum = codecs.decode(self._codec, payload, 2 * values.num_elements)[values.num_elements :]
        return Served(moved, momentum, payload.numel())
