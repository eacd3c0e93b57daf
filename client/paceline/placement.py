"""Chooses where the exchange works on each fragment: beside the model on its GPU, or on the host."""

import logging
from collections import defaultdict
from collections.abc import Mapping
from enum import Enum

import torch

from paceline.model_state import device_of
from paceline.place import Place
from paceline_wire.manifest import Manifest

_log = logging.getLogger(__name__)

BYTES_PER_PARAMETER = 36
"""What an eager exchange keeps of each parameter, all in float32: where the round began, the newest base, what the
codec owes, what the estimate of own pushes keeps; of the push in flight what it would owe and what is expected of it; a
start that is proposed, the shift to it, and the end of a round that is being encoded."""

_LARGEST_SHARE = 1 / 8
"""Of a GPU's memory, which the exchange takes without being told to: a model's gradients, optimizer and activations
come after `join`, and a worker must not run out of memory for them."""


class ExchangeOn(Enum):
    """Where to encode outer gradients and decode updates, and to keep what the exchange remembers."""

    AUTO = "auto"
    """On the model's device where that takes at most an eighth of its memory, else on the host."""
    DEVICE = "device"
    """On the model's device."""
    HOST = "host"
    """On the host."""


def places_of(
    manifest: Manifest, tensors: Mapping[str, torch.Tensor], exchange_on: ExchangeOn = ExchangeOn.AUTO
) -> list[Place]:
    """Where the exchange works on each fragment, in the order of the plan: one place for each device of the model.

    Args:
        manifest: What is exchanged.
        tensors: The live model's tensors by name.
        exchange_on: What the worker asked for.
    """
    devices = [device_of(fragment, tensors) for fragment in manifest.fragments]
    num_elements: defaultdict[torch.device, int] = defaultdict(int)
    for device, fragment in zip(devices, manifest.fragments, strict=True):
        num_elements[device] += fragment.num_elements
    places = {device: _place(device, count, exchange_on) for device, count in num_elements.items()}
    return [places[device] for device in devices]


def _place(device: torch.device, num_elements: int, exchange_on: ExchangeOn) -> Place:
    if device.type == "cpu" or exchange_on is ExchangeOn.DEVICE:
        return Place(device)
    needed = BYTES_PER_PARAMETER * num_elements
    on_host = exchange_on is ExchangeOn.HOST or needed > _LARGEST_SHARE * _memory_bytes(device)
    _log.info(
        "outer gradients are encoded on %s: what the exchange keeps of %d parameters takes %.1f GiB",
        "the host" if on_host else device,
        num_elements,
        needed / 2**30,
    )
    return Place(device, on_host=on_host)


def _memory_bytes(device: torch.device) -> float:
    """All of a device's memory; 0 where torch cannot tell."""
    properties = getattr(getattr(torch, device.type, None), "get_device_properties", None)
    return 0.0 if properties is None else float(properties(device).total_memory)
