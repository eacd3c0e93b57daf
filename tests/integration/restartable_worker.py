"""A worker that checkpoints after every step and goes on from there when it is started again; run as a script.

It ends itself with SIGKILL where it is told to: "before" a step, "after" it (the round's pushes may be answered, and
nothing is saved yet) or "in:SECONDS" from its beginning.
"""

import argparse
import os
import signal
import threading
from pathlib import Path

import torch
from torch import nn

import paceline

SIZE = 700
INNER_STEPS = 3


class Model(nn.Module):
    """Two fragments' worth of numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.linspace(-1, 1, SIZE))

    def loss(self, step: int) -> torch.Tensor:
        """The distance to a point that moves with the steps."""
        target = torch.randn(SIZE, generator=torch.Generator().manual_seed(step))
        return (self.x - target).square().sum()


def die() -> None:
    """End at once."""
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    """Train from the checkpoint on, if there is one."""
    parser = argparse.ArgumentParser()
    parser.add_argument("address")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--overlap", required=True)
    parser.add_argument("--die-at", type=int, default=-1)
    parser.add_argument("--die", default="after")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, step, saved, death = Model(), 0, None, None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    if args.checkpoint.exists():
        saved = torch.load(args.checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step = saved["step"]
    join = paceline.join(
        args.address, model, optimizer, inner_steps=INNER_STEPS, worker_id="restarted", overlap=args.overlap
    )
    with join as run:
        if saved is not None:
            run.load_state_dict(saved["run"])
        while step < args.steps:
            if step == args.die_at and args.die == "before":
                die()
            if step == args.die_at and args.die.startswith("in:"):
                death = threading.Timer(float(args.die[3:]), die)
                death.start()
            model.loss(step).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
            if step == args.die_at and args.die == "after":
                die()
            step += 1
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            temporary = args.checkpoint.with_suffix(".new")
            torch.save({**state, "run": run.state_dict()}, temporary)
            temporary.replace(args.checkpoint)
            if death is not None and step in {args.die_at + INNER_STEPS, args.steps}:
                # A machine that is faster than the moment must not get past it.
                death.join()


if __name__ == "__main__":
    main()
