"""A training script that takes part in a run: an ordinary torch loop, and three lines of Paceline (marked).

    paceline serve &
    python examples/train.py --address 127.0.0.1:7070      # as often as you like, on as many hosts as you like

The model learns to predict the next byte of Python source from the 16 bytes before; its data is the standard library of
the Python that runs it. If the server asks for a token, that is in the variable PACELINE_TOKEN, or in the file that
PACELINE_TOKEN_FILE names.
"""

import argparse
import sysconfig
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import paceline  # 1

CONTEXT = 16


def library_bytes() -> tuple[Tensor, Tensor]:
    """The source of the standard library, uint8 [n] each: what to train on, and every tenth file to evaluate on."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    train = b"".join(path.read_bytes() for index, path in enumerate(files) if index % 10)
    held_out = b"".join(path.read_bytes() for path in files[::10])
    return torch.frombuffer(bytearray(train), dtype=torch.uint8), torch.frombuffer(
        bytearray(held_out), dtype=torch.uint8
    )


def batch(data: Tensor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Contexts int64 [size, CONTEXT] from anywhere in data, and the byte after each, int64 [size]."""
    starts = torch.randint(len(data) - CONTEXT, (size, 1), generator=generator)
    window = data[starts + torch.arange(CONTEXT + 1)].long()
    return window[:, :-1], window[:, -1]


def build_model() -> nn.Module:
    """An embedding and a perceptron: 303,744 parameters."""
    return nn.Sequential(
        nn.Embedding(256, 32), nn.Flatten(), nn.Linear(32 * CONTEXT, 384), nn.GELU(), nn.Linear(384, 256)
    )


def evaluate(model: nn.Module, held_out: Tensor) -> float:
    """Nats per byte over 4096 held-out contexts, the same whenever it is called."""
    inputs, targets = batch(held_out, 4096, torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return float(nn.CrossEntropyLoss()(model(inputs), targets))


def main() -> None:
    """Train for a while and say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", required=True, help="host:port of the server")
    parser.add_argument("--tls-ca", help="PEM file of the authority of the server's certificate; left out: no TLS")
    parser.add_argument("--worker-id", help="this worker's name, the same after a restart; left out: a new one")
    parser.add_argument("--seconds", type=float, default=20.0, help="how long to train (default: 20)")
    args = parser.parse_args()
    torch.set_num_threads(1)  # several workers may share this host
    train, held_out = library_bytes()
    model = build_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    criterion = nn.CrossEntropyLoss()

    with paceline.join(args.address, model, optimizer, tls=args.tls_ca, worker_id=args.worker_id) as run:  # 2
        print(f"worker {run.worker_index}: held-out loss {evaluate(model, held_out):.3f} nats per byte at the start")
        generator = torch.Generator().manual_seed(1 + run.worker_index)  # 3: every worker draws batches of its own
        until_s = time.monotonic() + args.seconds
        while time.monotonic() < until_s:
            inputs, targets = batch(train, 64, generator)
            loss = criterion(model(inputs), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    # Leaving the context flushed: the model now has the run's parameters.
    stats = run.stats()
    print(f"held-out loss {evaluate(model, held_out):.3f} nats per byte after {stats.rounds} rounds")
    print(f"{stats.bytes_up:,} bytes up, {stats.bytes_down:,} down, waited {stats.stalled_s:.2f} s")


if __name__ == "__main__":
    main()
