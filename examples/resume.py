"""A worker that may be stopped at any time and goes on from its checkpoint when it is started again.

    paceline serve --storage.data-dir ./run &
    python examples/resume.py --address 127.0.0.1:7070 --checkpoint ./worker.pt     # kill it, and start it again

The checkpoint has the model, the optimizer, where the data are, and what Paceline must remember (run.state_dict). It is
written beside the old one and then takes its place, so that there is a whole one at any moment. The model learns to
predict the next byte of Python's standard library from the one before; each step has batches of its own.
"""

import argparse
import os
import sysconfig
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import paceline


def library_bytes() -> Tensor:
    """The source of the standard library, int64 [n]."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in files)), dtype=torch.uint8).long()


def batch(data: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """Bytes, and the byte after each, int64 [512]: the same ones whenever the step is done again."""
    places = torch.randint(len(data) - 1, (512,), generator=torch.Generator().manual_seed(step))
    return data[places], data[places + 1]


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint so that there is a whole one at any moment, even if this process or its host dies."""
    temporary = path.with_suffix(".new")
    with temporary.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def main() -> None:
    """Train until the last step, from the checkpoint on if there is one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", required=True, help="host:port of the server")
    parser.add_argument("--tls-ca", help="PEM file of the authority of the server's certificate; left out: no TLS")
    parser.add_argument("--checkpoint", type=Path, required=True, help="file to go on from, and to save to")
    parser.add_argument("--worker-id", default="resumed", help="this worker's name, the same at every start")
    parser.add_argument("--steps", type=int, default=2000, help="inner steps in all (default: 2000)")
    parser.add_argument("--save-every", type=int, default=20, help="steps between checkpoints (default: 20)")
    args = parser.parse_args()
    torch.set_num_threads(1)  # several workers may share this host
    data = library_bytes()
    model = nn.Sequential(nn.Embedding(256, 64), nn.GELU(), nn.Linear(64, 256))
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    step, saved = 0, None
    if args.checkpoint.exists():
        saved = torch.load(args.checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step = saved["step"]

    with paceline.join(args.address, model, optimizer, worker_id=args.worker_id, tls=args.tls_ca) as run:
        if saved is not None:
            run.load_state_dict(saved["run"])  # before the first step
        print(f"step {step}, round {run.round}", flush=True)
        while step < args.steps:
            inputs, targets = batch(data, step)
            loss = criterion(model(inputs), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step % args.save_every == 0:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
                save(args.checkpoint, {**state, "run": run.state_dict()})

    inputs, targets = batch(data, step)
    print(f"step {step}, at the end: loss {criterion(model(inputs), targets).item():.3f} nats per byte")


if __name__ == "__main__":
    main()
