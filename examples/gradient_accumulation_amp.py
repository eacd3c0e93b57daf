"""A worker with automatic mixed precision, gradient accumulation and parameter groups: the loop stays as it was.

    paceline serve &
    python examples/gradient_accumulation_amp.py --address 127.0.0.1:7070

An inner step is a step of the optimizer, however many backward passes went into it; a step that the GradScaler skips
does not count. The optimizer's state, its groups and the scaler stay this worker's own. The task is made up: a deep
network learns what a shallow one with fixed weights does.
"""

import argparse

import torch
from torch import Tensor, nn

import paceline

WIDTH = 64
BATCH = 64


def build_model() -> nn.Sequential:
    """Four layers, a norm in between."""
    layers = [nn.Linear(WIDTH, 128), nn.LayerNorm(128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 1)]
    return nn.Sequential(*layers)


def parameter_groups(model: nn.Module) -> list[dict[str, object]]:
    """Weight decay for matrices only, as usual."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    others = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    return [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0, "lr": 3e-3}]


def draw(teacher: nn.Module, device: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs float32 [BATCH, WIDTH], and what the teacher says to them, float32 [BATCH, 1]."""
    inputs = torch.randn(BATCH, WIDTH, generator=generator).to(device)
    with torch.no_grad():
        return inputs, teacher(inputs)


def main() -> None:
    """Train for a number of optimizer steps and say how many were skipped."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", required=True, help="host:port of the server")
    parser.add_argument("--tls-ca", help="PEM file of the authority of the server's certificate; left out: no TLS")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps to try (default: 200)")
    parser.add_argument("--accumulate", type=int, default=4, help="backward passes for each (default: 4)")
    parser.add_argument("--first-scale", type=float, default=65536.0, help="the scaler's first scale (default: 65536)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    teacher = nn.Sequential(nn.Linear(WIDTH, 16), nn.Tanh(), nn.Linear(16, 1)).to(device)
    model = build_model().to(device)
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=1e-3)
    scaler = torch.amp.GradScaler(device, init_scale=args.first_scale)
    criterion = nn.MSELoss()
    losses: list[float] = []
    skipped = 0

    with paceline.join(args.address, model, optimizer, tls=args.tls_ca) as run:
        generator = torch.Generator().manual_seed(1 + run.worker_index)
        for _ in range(args.steps):
            mean = torch.zeros((), device=device)
            for _ in range(args.accumulate):
                inputs, targets = draw(teacher, device, generator)
                with torch.autocast(device, dtype=torch.float16):
                    loss = criterion(model(inputs).float(), targets) / args.accumulate
                scaler.scale(loss).backward()
                mean += loss.detach()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            before = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            skipped += scaler.get_scale() < before
            losses.append(float(mean))

    stats = run.stats()
    print(f"loss {losses[0]:.4f} at the start, {sum(losses[-10:]) / 10:.4f} at the end")
    print(f"{args.steps - skipped} steps taken, {skipped} skipped by the scaler, {stats.rounds} rounds exchanged")


if __name__ == "__main__":
    main()
