"""Federated averaging with the asyncio client: every client keeps its data, and only what it learned leaves it.

    paceline serve --outer.rule sgd --outer.lr 1 --schedule.kind barrier --schedule.quota 3 --exchange.uplink int8 &
    python examples/federated.py --address 127.0.0.1:7070 --clients 3

With the rule sgd at rate 1 and a barrier, the server's parameters after a round are the mean of the clients', which is
federated averaging (McMahan et al., arXiv 1602.05629), up to what int8 rounds off. Each client has the code of one
folder of Python's standard library, and learns which byte follows which. The clients are tasks of one process here, so
that the example runs anywhere; each could as well be a process of its own somewhere else.
"""

import argparse
import asyncio
import sysconfig
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

import paceline

FOLDERS = ("asyncio", "json", "email", "http", "logging", "multiprocessing", "unittest", "xml")


Pairs = tuple[Tensor, Tensor]
"""Bytes, and the byte after each: int64 [n] both."""


def pairs_of(folder: str) -> tuple[Pairs, Pairs]:
    """A folder of the standard library: what to train on, and the last tenth to evaluate on."""
    files = sorted((Path(sysconfig.get_path("stdlib")) / folder).rglob("*.py"))
    text = torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in files)), dtype=torch.uint8).long()
    cut = len(text) * 9 // 10
    return (text[: cut - 1], text[1:cut]), (text[cut:-1], text[cut + 1 :])


def loss_of(parameters: dict[str, Tensor], before: Tensor, after: Tensor) -> Tensor:
    """Nats per byte of a low-rank table of which byte follows which."""
    return functional.cross_entropy(parameters["before"][before] @ parameters["after"], after)


def train(base: dict[str, Tensor], data: Pairs, steps: int, seed: int) -> dict[str, Tensor]:
    """Train a copy of the run's parameters on a client's own data; returns start minus end."""
    generator = torch.Generator().manual_seed(seed)
    local = {name: tensor.clone().requires_grad_() for name, tensor in base.items()}
    optimizer = torch.optim.Adam(local.values(), lr=0.02)
    for _ in range(steps):
        chosen = torch.randint(len(data[0]), (512,), generator=generator)
        gradients = torch.autograd.grad(loss_of(local, data[0][chosen], data[1][chosen]), list(local.values()))
        for parameter, gradient in zip(local.values(), gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
    return {name: (base[name] - local[name]).detach() for name in base}


async def take_part(
    number: int, args: argparse.Namespace, everybody: asyncio.Barrier, losses: list[list[float]]
) -> None:
    """One client: join, then train and average, round by round."""
    data, held_out = pairs_of(FOLDERS[number % len(FOLDERS)])
    async with paceline.connect(args.address, worker_id=f"client-{number}", tls=args.tls_ca) as client:
        generator = torch.Generator().manual_seed(0)
        first = {"before": (256, 24), "after": (24, 256)}
        await client.initialize({name: 0.1 * torch.randn(shape, generator=generator) for name, shape in first.items()})
        await everybody.wait()  # nobody's first round should be averaged alone
        base = await client.fetch()
        for round_number in range(args.rounds):
            losses[round_number].append(float(loss_of(base.tensors, *held_out)))
            outer_gradient = await asyncio.to_thread(train, base.tensors, data, args.steps, round_number)
            base = await client.exchange(outer_gradient, base)
            await everybody.wait()
            if number == 0:
                mean = sum(losses[round_number]) / args.clients
                print(f"round {round_number}: mean held-out loss {mean:.3f} nats per byte before it")
        losses[args.rounds].append(float(loss_of(base.tensors, *held_out)))


async def main() -> None:
    """Run all clients."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", required=True, help="host:port of the server")
    parser.add_argument("--tls-ca", help="PEM file of the authority of the server's certificate; left out: no TLS")
    parser.add_argument("--clients", type=int, default=3, help="as many as the server's quota (default: 3)")
    parser.add_argument("--rounds", type=int, default=10, help="rounds of averaging (default: 10)")
    parser.add_argument("--steps", type=int, default=20, help="a client's steps in a round (default: 20)")
    args = parser.parse_args()
    everybody = asyncio.Barrier(args.clients)
    losses: list[list[float]] = [[] for _ in range(args.rounds + 1)]
    await asyncio.gather(*(take_part(number, args, everybody, losses) for number in range(args.clients)))
    print(f"at the end: mean held-out loss {sum(losses[-1]) / args.clients:.3f} nats per byte")


if __name__ == "__main__":
    asyncio.run(main())
