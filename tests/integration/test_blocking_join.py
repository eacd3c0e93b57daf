"""`join` with one worker that waits for every answer is the same training alone plus an outer step, bit for bit."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import paceline
import paceline_server
from integration.patience import wait_until

LR, BETA = 0.7, 0.9
INNER_STEPS, ROUNDS = 4, 5
LOSS = nn.MSELoss()


class OuterSteps:
    """Section 1's lines for one worker at a barrier, in float32: its own outer step, written without Paceline.

    Averaged buffers move to the mean of the workers' buffers: learning rate 1, no momentum.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.w = {name: tensor.detach().clone() for name, tensor in self.tensors().items()}
        self.u = {name: torch.zeros_like(tensor) for name, tensor in self.w.items()}

    def tensors(self) -> dict[str, torch.Tensor]:
        """What is exchanged: parameters and floating buffers."""
        tensors = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        return {name: tensor.detach() for name, tensor in tensors.items() if tensor.is_floating_point()}

    def end_round(self) -> None:
        """Let the round's outer gradient enter, open the next bin, and go on from there."""
        for name, tensor in self.tensors().items():
            w, u = self.w[name], self.u[name]
            g = w - tensor
            if name in dict(self.model.named_buffers()):
                w -= g
            else:
                u += LR * g
                w -= LR * g
                # The next bin opens before the reply.
                w -= BETA * u
                u *= BETA
            tensor.copy_(w)


class Network(nn.Module):
    """A little of everything: batch norm, a tied weight, a scalar, several fragments, a weight that is scattered."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(20, 40)
        self.first.weight.data = self.first.weight.data.T.contiguous().T
        self.norm = nn.BatchNorm1d(40)
        self.second = nn.Linear(40, 20)
        self.tied = nn.Linear(40, 20, bias=False)
        self.tied.weight = self.second.weight
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """X (B, 20) -> (B, 20)."""
        hidden = torch.tanh(self.norm(self.first(x)))
        y: torch.Tensor = self.second(hidden) + self.tied(hidden)
        return y * self.scale


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """SGD with a momentum of its own."""
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW with two groups of parameters."""
    weights = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": weights, "weight_decay": 0.1}, {"params": others, "lr": 0.01, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.003)


def twins(
    build: Callable[[nn.Module], torch.optim.Optimizer],
) -> list[tuple[Network, torch.optim.Optimizer]]:
    """Two equal models, each with an optimizer of its own."""
    torch.manual_seed(0)
    model = Network()
    return [(each, build(each)) for each in (model, copy.deepcopy(model))]


@pytest.fixture
def address() -> Iterator[str]:
    """A server whose answers lose nothing, with fragments so small that every larger tensor lies in several."""
    exchange: dict[str, Any] = {"uplink": "fp32", "downlink": "fp32", "fragment_elements": 256}
    config = {"outer": {"lr": LR, "momentum": BETA}, "schedule": {"kind": "barrier"}, "exchange": exchange}
    with paceline_server.local(config) as found:
        yield found


def train(model: nn.Module, optimizer: torch.optim.Optimizer, *, first_step: int) -> None:
    """A round of inner steps on data that the step's number determines."""
    for step in range(first_step, first_step + INNER_STEPS):
        batch = torch.randn(16, 20, generator=torch.Generator().manual_seed(step))
        LOSS(model(batch), batch).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("build", [sgd, adamw])
def test_blocking_join_equals_training_alone_with_outer_steps(
    build: Callable[[nn.Module], torch.optim.Optimizer], address: str
) -> None:
    """After every round, parameters, buffers and the optimizer's state have the bits of training without Paceline."""
    (model, optimizer), (twin, twin_optimizer) = twins(build)
    outer = OuterSteps(twin)
    with paceline.join(address, model, optimizer, inner_steps=INNER_STEPS, overlap="blocking") as run:
        for number in range(ROUNDS):
            train(model, optimizer, first_step=number * INNER_STEPS)
            train(twin, twin_optimizer, first_step=number * INNER_STEPS)
            outer.end_round()
            assert run.round == run.stats().rounds == number + 1
            assert_equal_bits(model.state_dict(), twin.state_dict())
            assert_equal_bits(state_of(optimizer), state_of(twin_optimizer))
    assert_equal_bits(model.state_dict(), twin.state_dict())


def test_a_wait_that_was_interrupted_loses_nothing(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the wait for an answer, in a notebook that goes on: no round and no inner step is lost or doubled."""
    (model, optimizer), (twin, twin_optimizer) = twins(sgd)
    outer = OuterSteps(twin)
    with paceline.join(address, model, optimizer, inner_steps=INNER_STEPS, overlap="blocking") as run:
        waits: list[int] = []
        wait_for_oldest = run._wait_for_oldest

        def interrupted(began_s: float) -> None:
            waits.append(run._worker.steps_in_round)
            if len(waits) == 1:
                raise KeyboardInterrupt
            wait_for_oldest(began_s)

        monkeypatch.setattr(run, "_wait_for_oldest", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(model, optimizer, first_step=0)
        assert not run._worker.is_lent
        optimizer.zero_grad()
        wait_until(lambda: run.stats().rounds == 1)
        with torch.no_grad():
            run._worker.adopt()  # what the next step would take of answers that came after the interruption
        train(twin, twin_optimizer, first_step=0)
        outer.end_round()
        train(model, optimizer, first_step=INNER_STEPS)
        assert waits[0] == 0
        train(twin, twin_optimizer, first_step=INNER_STEPS)
        outer.end_round()
        assert_equal_bits(model.state_dict(), twin.state_dict())


def state_of(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """All tensors of an optimizer's state by a name of their own."""
    return {
        f"{index}.{key}": value
        for index, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
        if isinstance(value, torch.Tensor)
    }


def assert_equal_bits(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """The same names and, name by name, the same values."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name
