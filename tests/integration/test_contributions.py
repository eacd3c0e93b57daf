"""What travels beside outer gradients through a real server: tokens, local momentum, the server's momentum, rates."""

from typing import Any

import pytest
import torch
from torch import nn

import paceline
import paceline_server
from paceline.worker import Worker
from paceline_wire.errors import InvalidInputError

SIZE = 300


def config(*, lr: float = 0.5, momentum: float = 0.5, **sections: dict[str, Any]) -> dict[str, Any]:
    """A run without loss on the wire, in two fragments of parameters."""
    exchange = {"uplink": "fp32", "downlink": "fp32", "fragment_elements": 256, "inner_steps": 2}
    return {
        "outer": {"lr": lr, "momentum": momentum, **sections.get("outer", {})},
        "schedule": {"kind": "async", "quota": 1, **sections.get("schedule", {})},
        "exchange": {**exchange, "dynamic_inner_steps": False, **sections.get("exchange", {})},
    }


def ones(size: int = SIZE) -> dict[str, torch.Tensor]:
    """An outer gradient that can be followed by eye."""
    return {"x": torch.ones(size)}


async def test_a_push_weighs_by_its_tokens() -> None:
    """Of two workers, the one with three times the tokens has three quarters of the rate."""
    settings = config(lr=1.0, momentum=0.0, schedule={"quota": 2})
    with paceline_server.local(settings) as address:
        async with paceline.connect(address, worker_id="a") as a, paceline.connect(address, worker_id="b") as b:
            await a.initialize({"x": torch.zeros(SIZE)})
            base = await a.fetch()
            await a.exchange(ones(), base, tokens=100)
            before = await b.exchange(ones(), base, tokens=300)
            after = await a.exchange(ones(), base, tokens=100)
            torch.testing.assert_close(before.tensors["x"] - after.tensors["x"], torch.full((SIZE,), 0.25))
            before, after = after, await b.exchange(ones(), base, tokens=300)
            torch.testing.assert_close(before.tensors["x"] - after.tensors["x"], torch.full((SIZE,), 0.75))


class Line(nn.Module):
    """A parameter on which the loss has a slope that is the same everywhere, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(SIZE))
        self.register_buffer("seen", torch.zeros(3))

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """One inner step."""
        optimizer.zero_grad()
        self.x.sum().backward()  # type: ignore[no-untyped-call]  # torch leaves it so
        optimizer.step()


def test_join_counts_tokens() -> None:
    """`run.count` adds to the round's push; a lone worker's share is the whole rate, whatever it counts."""
    model = Line()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        paceline_server.local(config(lr=1.0, momentum=0.0)) as address,
        paceline.join(address, model, optimizer, overlap="blocking") as run,
    ):
        for _ in range(4):
            model.step(optimizer)
            run.count(8)
        with pytest.raises(InvalidInputError, match="-1 tokens"):
            run.count(-1)
        assert run.round == 2
    torch.testing.assert_close(model.x.detach(), torch.full((SIZE,), -0.4))


def test_a_predicted_start_is_where_the_lone_worker_would_be_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Updates bring the server's momentum: once it is known, answers to a lone worker move it by rounding only."""
    predicted: list[torch.Tensor] = []
    answered: list[torch.Tensor] = []
    prepare, take_in = Worker.prepare, Worker.take_in

    def noting_prepare(self: Worker, index: int, ended: Any) -> Any:
        prepared = prepare(self, index, ended)
        if self._plan[index].role == "parameter":
            predicted.append(self._fragments[index].new_start())
        return prepared

    def noting_take_in(self: Worker, index: int, seq: int, update: Any) -> None:
        assert (update.server_momentum is not None) == (self._plan[index].role == "parameter")
        if update.server_momentum is not None:
            answered.append(update.values)
        take_in(self, index, seq, update)

    monkeypatch.setattr(Worker, "prepare", noting_prepare)
    monkeypatch.setattr(Worker, "take_in", noting_take_in)
    model = Line()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    settings = config(outer={"publish": "look-ahead"}, exchange={"own_weight": "predicted"})
    settings["exchange"]["fragment_elements"] = 512
    with paceline_server.local(settings) as address, paceline.join(address, model, optimizer) as run:
        while run.round < 5:
            model.step(optimizer)
    assert len(predicted) == len(answered) == 5
    for expected, actual in zip(predicted, answered, strict=True):
        torch.testing.assert_close(actual, expected)


async def test_local_momentum_is_given_exactly_if_the_run_orders_it() -> None:
    """A run of OrLoMo needs it, for every trained parameter; other runs refuse it."""
    with paceline_server.local(config(outer={"rule": "orlomo"})) as address:
        async with paceline.connect(address, worker_id="a") as worker:
            await worker.initialize({"x": torch.zeros(SIZE), "seen": torch.zeros(3)}, averaged=["seen"])
            base, gradient = await worker.fetch(), {**ones(), "seen": torch.zeros(3)}
            with pytest.raises(InvalidInputError, match="give local_momentum"):
                await worker.exchange(gradient, base)
            with pytest.raises(paceline.PacelineError, match="'x' of the run is missing"):
                await worker.exchange(gradient, base, local_momentum={})
            after = await worker.exchange(gradient, base, local_momentum=ones())
            assert after.tensors["x"].isfinite().all()
            assert not torch.equal(base.tensors["x"], after.tensors["x"])
    with paceline_server.local(config()) as address:
        async with paceline.connect(address, worker_id="a") as worker:
            await worker.initialize({"x": torch.zeros(SIZE)})
            with pytest.raises(InvalidInputError, match="does not take local_momentum"):
                await worker.exchange(ones(), await worker.fetch(), local_momentum=ones())


def test_join_refuses_rounds_of_another_length_where_momentum_is_ordered() -> None:
    """The server lets momentum decay by the configured inner steps, so no worker may choose its own."""
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    with (
        paceline_server.local(config(outer={"rule": "orlomo", "momentum": 0.5})) as address,
        pytest.raises(InvalidInputError, match="inner_steps is 7"),
    ):
        paceline.join(address, model, optimizer, inner_steps=7)


def test_join_refuses_an_optimizer_whose_momentum_cannot_be_ordered() -> None:
    """The sentence says what the run needs, and the run is left alone: it is not even initialized."""
    model = Line()
    with paceline_server.local(config(outer={"rule": "orlomo"})) as address:
        with pytest.raises(InvalidInputError, match=r"must be torch\.optim\.SGD with momentum 0\.5, not AdamW"):
            paceline.join(address, model, torch.optim.AdamW(model.parameters()))
        other = nn.Linear(2, 2)
        optimizer = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.5)
        with paceline.join(address, other, optimizer) as run:
            assert run.worker_index == 0
