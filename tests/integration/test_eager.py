"""Eager updates in server form against the paper's form (arXiv 2502.12996), which is written here from the paper."""

import asyncio
from contextlib import AsyncExitStack, ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn

import paceline
import paceline_server
from integration.patience import wait_until
from integration.proxy import Proxy
from integration.reference import MomentumSGD, Quadratic
from paceline.eager import OwnOuterStep, WorkerFragment
from paceline_wire import codecs

LR, BETA = 0.4, 0.6
SIZE = 600
INNER_LR = 0.3
INNER_STEPS = 3
ROUNDS = 8


def config(num_workers: int) -> dict[str, Any]:
    """Synchronous DiLoCo without loss on the wire."""
    return {
        "outer": {"lr": LR, "momentum": BETA},
        "schedule": {"kind": "barrier", "quota": num_workers},
        "exchange": {"uplink": "fp32", "downlink": "fp32", "own_weight": "1/M", "dynamic_inner_steps": False},
    }


class PaperWorker:
    """One worker of the paper: its parameters theta and its own outer optimizer, fed with eager outer gradients."""

    def __init__(self, start: torch.Tensor, num_workers: int) -> None:
        self.outer = MomentumSGD(start, lr=LR, beta=BETA, nesterov=True)
        self.num_workers = num_workers
        self.own_before = torch.zeros_like(self.outer.w)

    @property
    def theta(self) -> torch.Tensor:
        """The parameters from which the next inner steps begin."""
        return self.outer.w

    def end_round(self, own: torch.Tensor, mean_before: torch.Tensor) -> None:
        """Step along the average of the round before, with the own stale part replaced by the fresh one."""
        self.outer.step(mean_before + (own - self.own_before) / self.num_workers)
        self.own_before = own


def paper_rounds(losses: list[Quadratic], start: torch.Tensor) -> list[list[torch.Tensor]]:
    """The parameters of every worker after every round: [round][worker], float64 [n]."""
    workers = [PaperWorker(start, len(losses)) for _ in losses]
    mean_before = torch.zeros_like(start, dtype=torch.float64)
    history = []
    for _ in range(ROUNDS):
        outer_gradients = [outer_gradient(loss, worker.theta) for worker, loss in zip(workers, losses, strict=True)]
        for worker, own in zip(workers, outer_gradients, strict=True):
            worker.end_round(own, mean_before)
        mean_before = torch.stack(outer_gradients).mean(0)
        history.append([worker.theta for worker in workers])
    return history


def outer_gradient(loss: Quadratic, start: torch.Tensor) -> torch.Tensor:
    """Start minus end of a round of plain SGD steps."""
    end = start
    for _ in range(INNER_STEPS):
        end = end - INNER_LR * loss.gradient(end)
    return start - end


class Model(nn.Module):
    """One vector, and one worker's quadratic loss of it."""

    def __init__(self, start: torch.Tensor, loss: Quadratic) -> None:
        super().__init__()
        self.x = nn.Parameter(start.clone())
        self.loss = loss

    def set_gradient(self) -> None:
        """What backward would do."""
        self.x.grad = self.loss.gradient(self.x.detach()).float()


def has_exchanged(run: paceline.Run, rounds: int) -> bool:
    """Whether so many rounds are answered."""
    return run.stats().rounds == rounds


def test_joined_workers_are_the_papers() -> None:
    """When answers come at the end of the next round, the parameters of two joined workers are the paper's, always.

    The proxies hold the answers back until then. Each round begins with a step without gradient, by which the worker
    takes up its own estimate before its inner steps; the proxy has seen the push, so the estimate is there.
    """
    losses = [Quadratic(SIZE, seed) for seed in range(2)]
    start = torch.linspace(-1, 1, SIZE)
    expected = paper_rounds(losses, start)
    models = [Model(start, loss) for loss in losses]
    optimizers = [torch.optim.SGD(model.parameters(), lr=INNER_LR) for model in models]
    with ExitStack() as stack:
        address = stack.enter_context(paceline_server.local(config(2)))
        proxies = [stack.enter_context(Proxy(address)) for _ in models]
        runs = []
        for proxy, model, optimizer in zip(proxies, models, optimizers, strict=True):
            runs.append(paceline.join(proxy.address, model, optimizer, inner_steps=1 + INNER_STEPS, overlap="eager"))
            stack.callback(runs[-1].close)
        for number in range(ROUNDS):
            carried = [proxy.carried["up"] for proxy in proxies]
            for step in range(1 + INNER_STEPS):
                if step == INNER_STEPS:
                    # The answers of the round before come now, and those of this round are held back from now on.
                    for proxy, run in zip(proxies, runs, strict=True):
                        proxy.release("down")
                        wait_until(partial(has_exchanged, run, number))
                        proxy.hold("down")
                for index, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
                    model.x.grad = None
                    if step > 0:
                        model.set_gradient()
                    optimizer.step()
                    if step == 0 and number > 0:
                        torch.testing.assert_close(
                            model.x.detach().double(), expected[number - 1][index], rtol=1e-5, atol=1e-5
                        )
            for proxy, before in zip(proxies, carried, strict=True):
                proxy.wait_until_carried(before + 4 * SIZE, "up")
        for proxy in proxies:
            proxy.release("down")
        assert [run.round for run in runs] == [ROUNDS, ROUNDS]


def test_without_delay_joined_workers_are_synchronous_diloco() -> None:
    """When every answer is there before the next inner step, eager workers are blocking DiLoCo's, all alike."""
    losses = [Quadratic(SIZE, seed) for seed in range(2)]
    start = torch.linspace(-1, 1, SIZE)
    outer = MomentumSGD(start, lr=LR, beta=BETA, nesterov=True)
    models = [Model(start, loss) for loss in losses]
    optimizers = [torch.optim.SGD(model.parameters(), lr=INNER_LR) for model in models]
    with ExitStack() as stack:
        address = stack.enter_context(paceline_server.local(config(2)))
        runs = []
        for model, optimizer in zip(models, optimizers, strict=True):
            runs.append(paceline.join(address, model, optimizer, inner_steps=1 + INNER_STEPS, overlap="eager"))
            stack.callback(runs[-1].close)
        for number in range(ROUNDS):
            for run in runs:
                wait_until(partial(has_exchanged, run, number))
            for step in range(1 + INNER_STEPS):
                for model, optimizer in zip(models, optimizers, strict=True):
                    model.x.grad = None
                    if step > 0:
                        model.set_gradient()
                    optimizer.step()
                    if step == 0:
                        torch.testing.assert_close(model.x.detach().double(), outer.w, rtol=1e-5, atol=1e-5)
            outer.step(torch.stack([outer_gradient(loss, outer.w) for loss in losses]).mean(0))


async def test_worker_fragments_are_the_papers_workers() -> None:
    """Three workers that exchange over the client, each round's answer taken in at the end of the next."""
    losses = [Quadratic(SIZE, seed) for seed in range(3)]
    start = torch.linspace(-1, 1, SIZE)
    expected = paper_rounds(losses, start)
    async with AsyncExitStack() as stack:
        address = stack.enter_context(paceline_server.local(config(3)))
        clients = [await stack.enter_async_context(paceline.connect(address, worker_id=f"w{i}")) for i in range(3)]
        await clients[0].initialize({"x": start})
        bases = [await client.fetch() for client in clients]
        fragments = [
            WorkerFragment(
                base=base.tensors["x"],
                bin=base.bins[0],
                codec=codecs.codec("fp32"),
                estimate=OwnOuterStep(lr=LR, momentum=BETA, look_ahead=True, whole=False),
            )
            for base in bases
        ]
        in_flight: list[asyncio.Task[paceline.Base]] = []
        for number in range(ROUNDS):
            own = [
                outer_gradient(loss, fragment.new_start().double()).float()
                for loss, fragment in zip(losses, fragments, strict=True)
            ]
            if in_flight:
                bases = await asyncio.gather(*in_flight)
                for fragment, base in zip(fragments, bases, strict=True):
                    fragment.receive(number, base.tensors["x"], base.bins[0], applied=True)
            for index, fragment in enumerate(fragments):
                assert fragment.push(own[index], torch.zeros_like(own[index]), num_workers=3).base_bin == number
                torch.testing.assert_close(fragment.new_start().double(), expected[number][index], rtol=1e-5, atol=1e-5)
            in_flight = [
                asyncio.create_task(client.exchange({"x": gradient}, base))
                for client, gradient, base in zip(clients, own, bases, strict=True)
            ]
        await asyncio.gather(*in_flight)
