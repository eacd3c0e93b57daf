"""Where the exchange works on each fragment: one place for each device, and on a GPU only what fits there."""

import pytest
import torch

from paceline import placement
from paceline.fragments import manifest_of
from paceline.placement import BYTES_PER_PARAMETER, ExchangeOn, places_of

SIZE = 1000
NEEDED = BYTES_PER_PARAMETER * SIZE


@pytest.fixture(name="memory")
def memory_fixture(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The memory of the device "meta", which stands for a GPU: eight times what the exchange keeps."""
    memory = [8.0 * NEEDED]
    monkeypatch.setattr(placement, "_memory_bytes", lambda _device: memory[0])
    return memory


def devices(exchange_on: ExchangeOn, *tensor_devices: str) -> list[str]:
    """Where the exchange works on tensors of SIZE elements each on these devices, fragment by fragment."""
    tensors = {f"{index}": torch.empty(SIZE, device=each) for index, each in enumerate(tensor_devices)}
    places = places_of(manifest_of(tensors, averaged=(), fragment_elements=1024), tensors, exchange_on)
    return [place.device.type for place in places]


@pytest.mark.parametrize("exchange_on", list(ExchangeOn))
def test_a_model_on_the_host_stays_there(exchange_on: ExchangeOn) -> None:
    """Whatever was asked for, nothing leaves the host; all fragments share one place."""
    assert devices(exchange_on, "cpu", "cpu") == ["cpu", "cpu"]
    tensors = {"a": torch.zeros(300), "b": torch.zeros(300)}
    first, second = places_of(manifest_of(tensors, averaged=(), fragment_elements=256), tensors)[:2]
    assert first is second


def test_what_was_asked_for_counts(memory: list[float]) -> None:
    """A worker that says where gets it, however much memory there is."""
    memory[0] = 1.0
    assert devices(ExchangeOn.DEVICE, "meta") == ["meta"]
    memory[0] = 1e12
    assert devices(ExchangeOn.HOST, "meta") == ["cpu"]


def test_a_gpu_is_used_while_an_eighth_of_its_memory_is_enough(memory: list[float]) -> None:
    """Up to an eighth of the GPU is taken without asking, and not a byte more."""
    assert devices(ExchangeOn.AUTO, "meta") == ["meta"]
    memory[0] -= 8
    assert devices(ExchangeOn.AUTO, "meta") == ["cpu"]
    memory[0] = 0.0  # torch cannot tell
    assert devices(ExchangeOn.AUTO, "meta") == ["cpu"]


def test_each_device_of_a_model_is_looked_at_by_itself(memory: list[float]) -> None:
    """Fragments on the host stay there, and those on a GPU count together."""
    assert devices(ExchangeOn.AUTO, "cpu", "meta") == ["cpu", "meta"]
    assert devices(ExchangeOn.AUTO, "meta", "cpu", "meta") == ["cpu", "cpu", "cpu"]
    memory[0] *= 2
    assert devices(ExchangeOn.AUTO, "meta", "cpu", "meta") == ["meta", "cpu", "meta"]
