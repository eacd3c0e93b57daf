"""Outer rules through a real server with several workers, against their formulas written once more in float64."""

import asyncio
import json
import os
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

import paceline
import paceline_server
from integration.reference import flat, unflat
from integration.test_ordered_momentum import START, clients
from paceline_server.config_outer import OUTER_RULES
from paceline_wire.errors import ConfigurationError
from support_rules import REFERENCES, asynchronous_arrivals

LR, BETA, WORKERS = 0.7, 0.6, 3
SIZE = sum(tensor.numel() for tensor in START.values())
PRINTING = """
from paceline_server.rules import OuterRule

print("hello from somebody's module")

class Halving(OuterRule):
    def apply(self, numbers, g, push):
        numbers.w.mul_(0.5)
"""


def config(rule: str, **sections: Any) -> dict[str, Any]:
    """A run of three workers without loss on the wire, of two fragments when it starts from START."""
    outer = {"rule": rule, "lr": LR} | ({} if rule == "sgd" else {"momentum": BETA})
    exchange = {"uplink": "fp32", "downlink": "fp32", "fragment_elements": 256, "dynamic_inner_steps": False}
    return {
        **sections,
        "outer": outer | sections.get("outer", {}),
        "schedule": {"kind": "async", "quota": WORKERS},
        "exchange": exchange | sections.get("exchange", {}),
    }


def normal(seed: int) -> torch.Tensor:
    """Values for all of START, float32 [n]."""
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rule", [name for name in OUTER_RULES if name != "orlomo"])
async def test_every_answer_is_the_rules_formula(rule: str) -> None:
    """Three workers, 21 pushes in random order: each is sent what the printed formula makes of the arrivals."""
    reference = REFERENCES[rule](flat(START), num_workers=WORKERS, lr=LR, beta=0.0 if rule == "sgd" else BETA)
    with paceline_server.local(config(rule)) as address:
        async with clients(address, WORKERS) as workers:
            bases = [await worker.fetch() for worker in workers]
            for arrival in asynchronous_arrivals(WORKERS, Random(3), num_bins=7):
                g = normal(arrival.t)
                worker, base = workers[arrival.worker], bases[arrival.worker]
                assert base.bins == {0: arrival.bin, 1: arrival.bin}
                bases[arrival.worker] = await worker.exchange(unflat(g.double(), START), base)
                reference.arrive(g.double(), arrival)
                sent = flat(bases[arrival.worker].tensors)
                torch.testing.assert_close(sent, reference.sent(), rtol=2e-5, atol=2e-5)
            fetched = flat((await workers[0].fetch()).tensors)
            torch.testing.assert_close(fetched, reference.sent(), rtol=2e-5, atol=2e-5)


async def test_orlomo_averages_what_torch_does_in_every_worker() -> None:
    """Rounds of torch's SGD with momentum, pushed one after the other, end as the mean of parameters and momentum."""
    steps, inner_lr, rounds = 4, 0.1, 4
    settings = config("orlomo", outer={"lr": 1.0, "publish": "polyak"}, exchange={"inner_steps": steps})
    settings["schedule"] = {"kind": "barrier"}
    gradients = [
        [[normal(1000 * number + 100 * worker + step) for step in range(steps)] for worker in range(WORKERS)]
        for number in range(rounds)
    ]
    x, v = flat(START), torch.zeros(SIZE, dtype=torch.float64)
    with paceline_server.local(settings) as address:
        async with clients(address, WORKERS) as workers:
            bases = [await worker.fetch() for worker in workers]
            for number in range(rounds):
                exchanges, ends = [], []
                for worker, base, of_round in zip(workers, bases, gradients[number], strict=True):
                    q, p = torch_round(flat(base.tensors).float(), of_round, inner_lr)
                    outer_gradient, momentum = unflat(q.double(), START), unflat(p.double(), START)
                    exchanges.append(worker.exchange(outer_gradient, base, local_momentum=momentum))
                    y, r = x, v
                    for g in of_round:
                        r = BETA * r + inner_lr * g.double()
                        y = y - r
                    ends.append((y, r))
                bases = list(await asyncio.gather(*exchanges))
                x = torch.stack([y for y, _ in ends]).mean(0)
                v = torch.stack([r for _, r in ends]).mean(0)
                for base in bases:
                    torch.testing.assert_close(flat(base.tensors), x, rtol=2e-5, atol=5e-5)


def torch_round(
    start: torch.Tensor, gradients: list[torch.Tensor], inner_lr: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """A round of torch.optim.SGD from no momentum: the outer gradient, and the momentum with its rate inside."""
    parameter = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.SGD([parameter], lr=inner_lr, momentum=BETA)
    for g in gradients:
        parameter.grad = g.clone()
        optimizer.step()
    return start - parameter.detach(), inner_lr * optimizer.state[parameter]["momentum_buffer"]


async def test_shares_go_by_tokens() -> None:
    """Of three workers with 100, 200 and 300 tokens each, a bin's pushes have 1/6, 1/3 and 1/2 of the rate."""
    counts, w = [100, 200, 300], flat(START)
    with paceline_server.local(config("sgd")) as address:
        async with clients(address, WORKERS) as workers:
            bases = [await worker.fetch() for worker in workers]
            known: dict[int, int] = {}
            for t in range(9):
                arriving, g = t % WORKERS, normal(t)
                known[arriving] = counts[arriving]
                share = min(1.0, counts[arriving] * len(known) / (sum(known.values()) * WORKERS))
                assert t < WORKERS or share == pytest.approx(counts[arriving] / sum(counts))
                bases[arriving] = await workers[arriving].exchange(
                    unflat(g.double(), START), bases[arriving], tokens=counts[arriving]
                )
                w = w - LR * share * g.double()
                torch.testing.assert_close(flat(bases[arriving].tensors), w, rtol=2e-5, atol=2e-5)


async def test_arrivals_of_several_workers_and_shards_are_in_order_of_decision(tmp_path: Path) -> None:
    """Each shard's lines are its own fragments', in the order in which the workers were answered."""
    path = tmp_path / "arrivals.jsonl"
    order = [0, 1, 1, 2, 0, 2, 2, 1]
    with paceline_server.local(config("ormo", shards=2, storage={"arrivals": str(path)})) as address:
        async with clients(address, WORKERS) as workers:
            bases = [await worker.fetch() for worker in workers]
            for t, arriving in enumerate(order):
                g = unflat(normal(t).double(), START)
                bases[arriving] = await workers[arriving].exchange(g, bases[arriving])
    for shard, name in enumerate(("arrivals.jsonl", "arrivals.jsonl.1")):
        lines = [json.loads(line) for line in (tmp_path / name).read_text(encoding="utf-8").splitlines()]
        assert [line["worker"] for line in lines] == [f"worker-{arriving}" for arriving in order]
        assert {line["fragment"] for line in lines} == {shard}
        assert {line["outcome"] for line in lines} == {"applied"}
        assert [line["seq"] for line in lines] == [order[: t + 1].count(worker) for t, worker in enumerate(order)]
        times = [line["time_s"] for line in lines]
        assert times == sorted(times)


@pytest.mark.parametrize("shards", [1, 2])
def test_a_record_that_cannot_be_written_ends_an_embedded_server(tmp_path: Path, shards: int) -> None:
    """At start, with the sentence of the shard that found out."""
    settings = config("ormo", shards=shards, storage={"arrivals": str(tmp_path / "no" / "folder.jsonl")})
    with pytest.raises(ConfigurationError, match=r"storage\.arrivals: .*folder\.jsonl cannot be written: No such file"):
        paceline_server.local(settings).__enter__()


@pytest.mark.parametrize(("rule", "shards"), [("printing_rules:Halving", 2), ("halving", 1)])
async def test_a_module_that_prints_does_not_disturb_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: str, shards: int
) -> None:
    """Found by path, or by a package's entry point in every shard's own process; stdout stays the server's."""
    (tmp_path / "printing_rules.py").write_text(PRINTING, encoding="utf-8")
    metadata = tmp_path / "printing_rules-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: printing-rules\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[paceline.outer_rules]\nhalving = printing_rules:Halving\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.syspath_prepend(str(tmp_path))
    with paceline_server.local(config(rule, shards=shards)) as address:
        async with paceline.connect(address, worker_id="a") as client:
            await client.initialize(START)
            base = await client.exchange(unflat(normal(1).double(), START), await client.fetch())
    torch.testing.assert_close(flat(base.tensors), flat(START) / 2)
