"""Where the exchange works on a worker's numbers: on the host, or on the model's device in a stream of its own.

Training launches its kernels on one stream of a GPU; the exchange copies, encodes and decodes on another, so that
neither waits for the other but where one needs what the other has written. What crosses between them crosses as
`Handed`. All that the exchange does on a device goes over one stream, whichever thread asks for it, so nothing has to
be handed over within the exchange.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Final

import torch


@dataclass(frozen=True, eq=False)
class Handed:
    """Values on their way from who writes them to who uses them.

    Attributes:
        values: float32 [n]; complete only for who has taken them.
        written: Comes once they are complete; None: they are.
    """

    values: torch.Tensor
    written: torch.Event | None = None

    def take(self) -> torch.Tensor:
        """The values: on a device for use on the current stream, which waits; on the host the caller waits."""
        if self.written is None:
            return self.values
        if self.values.device.type == "cpu":
            self.written.synchronize()
            return self.values
        stream = _streams_of(self.values.device).current_stream(self.values.device)
        stream.wait_event(self.written)
        self.values.record_stream(stream)
        return self.values


class Place:
    """Where the exchange works on a fragment.

    Attributes:
        device: Where it keeps, encodes and decodes numbers.
        moves: Whether that is elsewhere than where the model is.

    Args:
        model_device: Where the model is.
        on_host: Work on the host all the same; what comes and goes is copied through pinned memory.
    """

    def __init__(self, model_device: torch.device, *, on_host: bool = False) -> None:
        self.device = torch.device("cpu") if on_host else model_device
        self._model_device = model_device
        self.moves = self.device != model_device
        self._stream: torch.Stream | None = None
        if _has_streams(model_device):
            self._stream = _streams_of(model_device).Stream(model_device)

    def stream(self) -> AbstractContextManager[object]:
        """What the calling thread asks of the device within this context goes over the exchange's stream."""
        if self._stream is None:
            return nullcontext()
        context: AbstractContextManager[object] = _streams_of(self._model_device).stream(self._stream)
        return context

    def lend_model(self) -> None:
        """Give the model to the exchange: its stream goes on once all is done that the current one was asked so far."""
        if self._stream is not None:
            self._stream.wait_stream(_streams_of(self._model_device).current_stream(self._model_device))

    def take_model_back(self) -> None:
        """Let the current stream go on once all is done that the exchange's was asked so far."""
        if self._stream is not None:
            _streams_of(self._model_device).current_stream(self._model_device).wait_stream(self._stream)

    def hand_over(self, values: torch.Tensor) -> Handed:
        """Hand over values (float32 [n]) that the current stream writes."""
        if self._stream is None or values.device.type == "cpu":
            return Handed(values)
        return Handed(values, _written(_streams_of(values.device).current_stream(values.device)))

    def from_model(self, values: torch.Tensor) -> Handed:
        """Bring values (float32 [n]) here that the current stream writes where the model is; nobody waits for them."""
        if not self.moves:
            return self.hand_over(values)
        if self._stream is None:
            return Handed(values.to(self.device))
        self._stream.wait_stream(_streams_of(values.device).current_stream(values.device))
        with self.stream():
            arrived = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            arrived.copy_(values, non_blocking=True)
            values.record_stream(self._stream)
            return Handed(arrived, _written(self._stream))

    def to_model(self, values: torch.Tensor) -> Handed:
        """Send values (float32 [n]) from here to where the model is; called within `stream`."""
        if not self.moves:
            return self.hand_over(values)
        if self._stream is None:
            return Handed(values.to(self._model_device))
        return self.hand_over(values.pin_memory().to(self._model_device, non_blocking=True))

    def from_host(self, values: torch.Tensor) -> torch.Tensor:
        """Values or a payload ([n] on the host) here, for use on the current stream."""
        return values.to(self.device)

    def to_host(self, values: torch.Tensor) -> torch.Tensor:
        """Values or a payload ([n] here) on the host, once they have arrived; called within `stream`."""
        if self._stream is None or values.device.type == "cpu":
            return values.to("cpu")
        arrived = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        arrived.copy_(values, non_blocking=True)
        _written(self._stream).synchronize()
        return arrived


def _has_streams(device: torch.device) -> bool:
    return device.type != "cpu" and hasattr(_streams_of(device), "Stream")


def _streams_of(device: torch.device) -> Any:
    """Torch's module for a type of device: torch.cuda, torch.xpu ..."""
    module: ModuleType | None = getattr(torch, device.type, None)
    return module


def _written(stream: torch.Stream) -> torch.Event:
    """Comes once all that the stream was asked so far is done."""
    # Who waits for one of CUDA's on the host sleeps; torch.Event would keep a core busy meanwhile.
    is_cuda = stream.device.type == "cuda"
    event: torch.Event = torch.cuda.Event(blocking=True) if is_cuda else torch.Event(stream.device)  # type: ignore[no-untyped-call]  # torch has no types here
    event.record(stream)
    return event


HOST: Final = Place(torch.device("cpu"))
"""Where numbers are worked on that no GPU has to do with."""
