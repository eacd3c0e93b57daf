"""A run of two shards and two workers on a Ray cluster, which goes on when nodes die.

    ray start --head                                       # a cluster of this host; or use one that you have
    python examples/ray_launch.py --address auto --data-dir /shared/run

The data directory must be on storage that every node sees at the same path. The model learns to predict the next byte
of Python's standard library from the one before.
"""

import argparse
import sysconfig
from pathlib import Path

import ray
import torch
from torch import Tensor, nn

import paceline.ray
from paceline.ray import Train, WorkerContext


def library_bytes(index: int, num_workers: int) -> Tensor:
    """A worker's share of the source of the standard library, int64 [n]."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[index::num_workers]
    return torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in files)), dtype=torch.uint8).long()


def batch(data: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """Bytes, and the byte after each, int64 [512]: the same ones whenever the step is done again."""
    places = torch.randint(len(data) - 1, (512,), generator=torch.Generator().manual_seed(step))
    return data[places], data[places + 1]


def trainer(steps: int, save_every: int) -> Train:
    """The training function for so many inner steps; Ray sends it to the workers."""

    def train(worker: WorkerContext) -> float:
        """Train from the last saved state on; called again whenever the cluster starts this worker again."""
        torch.set_num_threads(1)
        data = library_bytes(worker.index, worker.num_workers)
        model = nn.Sequential(nn.Embedding(256, 64), nn.GELU(), nn.Linear(64, 256))
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        criterion, step, saved = nn.CrossEntropyLoss(), 0, worker.load()
        if saved is not None:
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            step = saved["step"]

        with worker.join(model, optimizer) as run:
            if saved is not None:
                run.load_state_dict(saved["run"])  # before the first step
            while step < steps:
                inputs, targets = batch(data, step)
                loss = criterion(model(inputs), targets)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                step += 1
                if step % save_every == 0:
                    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
                    worker.save({**state, "run": run.state_dict()})

        inputs, targets = batch(data, steps)
        return float(criterion(model(inputs), targets).item())

    return train


def main() -> None:
    """Launch the run, wait for its workers, and say what they reached."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", default="auto", help="of the Ray cluster (default: the one of this host)")
    parser.add_argument("--data-dir", type=Path, required=True, help="absolute path that every node sees")
    parser.add_argument("--listen", help="host:port of each shard (default: a free port of its node's address)")
    parser.add_argument("--steps", type=int, default=2000, help="inner steps of each worker (default: 2000)")
    parser.add_argument("--save-every", type=int, default=20, help="steps between saved states (default: 20)")
    args = parser.parse_args()
    ray.init(address=args.address)
    train = trainer(args.steps, args.save_every)
    config = {"listen": args.listen} if args.listen else {}
    with paceline.ray.launch(train, data_dir=args.data_dir, config=config, shards=2, workers=2, name="example") as run:
        print(f"the run is at {', '.join(run.locate())}", flush=True)
        for index, loss in enumerate(run.wait()):
            print(f"worker {index}, at the end: loss {loss:.3f} nats per byte")


if __name__ == "__main__":
    main()
