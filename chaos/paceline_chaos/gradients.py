"""The model that witnesses pretend to train: first parameters and outer gradients that anybody can make again."""

import zlib

import torch

SHAPES = {
    "embedding.weight": (64, 256),
    "block.weight": (256, 256),
    "block.bias": (256,),
    "head.weight": (64, 256),
    "norm.running_mean": (1024,),
}
"""About 100,000 elements, with small fragments a handful of them."""

AVERAGED = ("norm.running_mean",)
"""Those that are averaged without momentum."""

STEP = 0.01
"""Standard deviation of an outer gradient's elements."""


def first_parameters(seed: int) -> dict[str, torch.Tensor]:
    """The parameters that the run begins with (float32)."""
    return _normal(f"{seed}/first")


def outer_gradient(seed: int, worker: str, start: int, number: int) -> dict[str, torch.Tensor]:
    """The outer gradient (float32) of a worker's round; start counts the worker's processes."""
    return {name: tensor * STEP for name, tensor in _normal(f"{seed}/{worker}/{start}/{number}").items()}


def _normal(name: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return {key: torch.randn(shape, generator=generator) for key, shape in SHAPES.items()}
