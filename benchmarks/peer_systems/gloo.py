"""A plain torch.distributed loop as people write it for DiLoCo: one flat all-reduce over gloo, an outer Nesterov step.

Option "dtype": what is reduced, float32 or bfloat16.
"""

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from peer_systems.setting import Setting
from peer_systems.training import Training


def work(setting: Setting, training: Training) -> None:
    """Make all rounds of one worker; worker 0 hosts the store in which they find each other."""
    os.environ["GLOO_SOCKET_IFNAME"] = setting.interface
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://{setting.coordinator}",
        rank=setting.rank,
        world_size=setting.workers,
        timeout=timedelta(minutes=10),
    )
    starts = [torch.nn.Parameter(tensor.clone()) for tensor in training.tensors]
    optimizer = torch.optim.SGD(starts, lr=0.7, momentum=0.9, nesterov=True)
    dtype: torch.dtype = getattr(torch, setting.options["dtype"])
    flat = torch.empty(setting.parameters, dtype=dtype)
    pieces = torch.split(flat, [start.numel() for start in starts])
    for start in starts:
        start.grad = torch.empty_like(start)
    for _ in training.rounds():
        _outer_step(training, starts, optimizer, flat, pieces)
    dist.destroy_process_group()


@torch.no_grad()
def _outer_step(
    training: Training,
    starts: list[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    flat: torch.Tensor,
    pieces: tuple[torch.Tensor, ...],
) -> None:
    for start, tensor, piece in zip(starts, training.tensors, pieces, strict=True):
        if flat.dtype == torch.float32:
            torch.sub(start, tensor, out=piece)
        else:
            piece.copy_(start - tensor)
    dist.all_reduce(flat)
    flat.div_(dist.get_world_size())
    for start, piece in zip(starts, pieces, strict=True):
        assert start.grad is not None
        start.grad.copy_(piece)
    optimizer.step()
    for start, tensor in zip(starts, training.tensors, strict=True):
        tensor.copy_(start)
