"""`join` on models and loops of every kind: what is exchanged, what is left alone, what counts as a step."""

import copy
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import nn

import paceline
import paceline_server
from integration.patience import wait_until
from integration.raw import RawWorker
from paceline import Run
from paceline_wire.errors import InvalidInputError

INNER_STEPS = 3


def config(**exchange: Any) -> dict[str, Any]:
    """A run without loss on the wire, of many fragments."""
    exchange = {"uplink": "fp32", "downlink": "fp32", "fragment_elements": 256, "inner_steps": INNER_STEPS, **exchange}
    return {"outer": {"lr": 0.7, "momentum": 0.5}, "exchange": exchange}


class Zoo(nn.Module):
    """One of every kind of tensor that a model may have."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def values(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator)

        self.conv = nn.Conv2d(3, 16, 3)
        self.conv.weight = nn.Parameter(values(16, 3, 3, 3).to(memory_format=torch.channels_last))
        self.norm = nn.BatchNorm2d(16)
        self.embedding = nn.Embedding(30, 10)
        self.head = nn.Linear(10, 30)
        self.head.weight = self.embedding.weight
        self.frozen = nn.Parameter(values(6), requires_grad=False)
        self.scale = nn.Parameter(values())
        self.empty = nn.Parameter(values(0, 4))
        self.strided = nn.Parameter(values(40)[::2])
        self.transposed = nn.Parameter(values(7, 50).t())
        self.bf16 = nn.Parameter(values(70).to(torch.bfloat16))
        self.fp16 = nn.Parameter(values(300).to(torch.float16))
        self.register_buffer("scratch", values(5), persistent=False)
        self.register_buffer("count", torch.tensor(seed))

    def loss(self) -> torch.Tensor:
        """A loss that every trained parameter takes part in, and that fills the batch norm's statistics."""
        image = torch.ones(2, 3, 8, 8).to(memory_format=torch.channels_last)
        image[0] = -1
        total: torch.Tensor = self.norm(self.conv(image)).square().mean()
        total = total + self.head(self.embedding(torch.arange(30))).square().mean()
        for parameter in (self.scale, self.strided, self.transposed, self.bf16, self.fp16):
            total = total + (parameter.float() - 1).square().mean()
        return total + self.conv.weight.square().mean()


EXCHANGED = {
    "bf16": ("bfloat16", "parameter"),
    "conv.bias": ("float32", "parameter"),
    "conv.weight": ("float32", "parameter"),
    "embedding.weight": ("float32", "parameter"),
    "empty": ("float32", "parameter"),
    "fp16": ("float16", "parameter"),
    "head.bias": ("float32", "parameter"),
    "norm.bias": ("float32", "parameter"),
    "norm.running_mean": ("float32", "averaged"),
    "norm.running_var": ("float32", "averaged"),
    "norm.weight": ("float32", "parameter"),
    "scale": ("float32", "parameter"),
    "strided": ("float32", "parameter"),
    "transposed": ("float32", "parameter"),
}
LOCAL = {"frozen", "scratch", "count", "norm.num_batches_tracked"}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A run of zoos; every test joins and leaves it."""
    with paceline_server.local(config(dynamic_inner_steps=False)) as found:
        yield found


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """A plain optimizer."""
    return torch.optim.SGD(model.parameters(), lr=0.05)


def train(model: Zoo, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """An ordinary training loop."""
    for _ in range(steps):
        optimizer.zero_grad()
        torch.autograd.backward(model.loss())
        optimizer.step()


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer, persistent or not, by its first name."""
    return {name: tensor.detach() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


async def test_what_is_exchanged(address: str) -> None:
    """Trained parameters, tied ones once, and floating persistent buffers; nothing else."""
    model = Zoo(1)
    with paceline.join(address, model, sgd(model)):
        async with paceline.connect(address) as observer:
            manifest = observer.manifest
            assert manifest is not None
            base = await observer.fetch()
    assert {spec.name: (spec.dtype, spec.role) for spec in manifest.tensors} == EXCHANGED
    for spec in manifest.tensors:
        assert spec.shape == tuple(model.get_parameter(spec.name).shape if "running" not in spec.name else (16,))
        assert base.tensors[spec.name].shape == spec.shape
    fragments = manifest.fragments
    assert len(fragments) > 5
    assert sum(fragment.num_elements for fragment in fragments) == manifest.num_elements


def test_two_workers_end_with_the_servers_parameters(address: str) -> None:
    """Workers that came with different models end with equal ones, the run's own; the rest they kept to themselves."""
    models = [Zoo(1), Zoo(2)]
    before = [copy.deepcopy(tensors_of(model)) for model in models]
    optimizers = [sgd(model) for model in models]
    runs = [paceline.join(address, model, optimizer) for model, optimizer in zip(models, optimizers, strict=True)]
    first, second = (tensors_of(model) for model in models)
    for name in EXCHANGED:
        assert torch.equal(first[name], second[name]), "joined models are the run's"
    for _ in range(5 * INNER_STEPS + 1):
        for model, optimizer in zip(models, optimizers, strict=True):
            train(model, optimizer, 1)
    for run in (*runs, *runs):  # the first to flush does not yet have what the second pushes
        run.flush()
    for run in runs:
        run.close()
        assert run.stats().pushes_refused == 0
    for model, tensors, old in zip(models, (first, second), before, strict=True):
        now = tensors_of(model)
        assert now.keys() == EXCHANGED.keys() | LOCAL
        for name, tensor in now.items():
            assert tensor.data_ptr() == tensors[name].data_ptr() or tensor.numel() == 0, "changed in place"
            assert (tensor.dtype, tensor.stride()) == (old[name].dtype, tensors[name].stride())
            if name in EXCHANGED:
                assert torch.equal(tensor, (second if tensors is first else first)[name])
                assert tensor.isfinite().all()
        assert model.head.weight is model.embedding.weight
        assert model.conv.weight.is_contiguous(memory_format=torch.channels_last)
        for name in ("frozen", "scratch", "count"):
            assert torch.equal(now[name], old[name])
        assert int(now["norm.num_batches_tracked"]) == 5 * INNER_STEPS + 1


async def test_flush_adopts_what_the_server_has(address: str) -> None:
    """After a flush the model is what the server has, rounded to the model's dtypes, even after others have pushed."""
    model, other = Zoo(1), Zoo(2)
    optimizer, other_optimizer = sgd(model), sgd(other)
    with paceline.join(address, model, optimizer) as run, paceline.join(address, other, other_optimizer) as other_run:
        train(model, optimizer, 2)
        run.flush()
        train(other, other_optimizer, 2)
        other_run.flush()
        run.flush()
        async with paceline.connect(address) as observer:
            base = await observer.fetch("fp32")
        now = tensors_of(model)
        for name, tensor in base.tensors.items():
            assert torch.equal(now[name], tensor.to(now[name].dtype))
        assert run.round == run.stats().rounds == 1, "two steps of three, pushed by the flush"


def test_rounds_count_optimizer_steps(address: str) -> None:
    """With gradient accumulation, backward passes do not count; with inner_steps left out the server's number does."""
    model = Zoo(1)
    optimizer = sgd(model)
    with paceline.join(address, model, optimizer) as run:
        assert (run.inner_steps, run.stats().inner_steps) == (INNER_STEPS, INNER_STEPS)
        for step in range(1, 2 * INNER_STEPS + 1):
            for _ in range(4):
                torch.autograd.backward(model.loss())
            assert run.round == (step - 1) // INNER_STEPS
            optimizer.step()
            optimizer.zero_grad()
        assert run.round == 2
    with paceline.join(address, model, optimizer, inner_steps=5) as run:
        assert run.inner_steps == 5
        train(model, optimizer, 11)
        assert run.round == 2


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_scaler_skips_do_not_count(address: str, fused: bool) -> None:
    """Steps with infinite gradients are no inner steps, whether the scaler leaves them out or the optimizer does."""
    model = Zoo(1)
    parameters = [parameter for parameter in model.parameters() if parameter.dtype is torch.float32]
    optimizer = torch.optim.AdamW(parameters, lr=0.001, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    with paceline.join(address, model, optimizer) as run:
        counted = 0
        for step in range(10):
            optimizer.zero_grad()
            torch.autograd.backward(scaler.scale(model.loss()))
            if step % 3 == 1:
                assert model.scale.grad is not None
                model.scale.grad.fill_(torch.inf)
            else:
                counted += 1
            scaler.step(optimizer)
            scaler.update()
            assert run.round == counted // INNER_STEPS
        assert counted == 7
    assert run.stats().pushes_refused == 0


def test_an_exception_in_the_loop_leaves_the_run(address: str) -> None:
    """The exception comes out as it is, the membership ends, and the optimizer is an ordinary one again."""
    model = Zoo(1)
    optimizer = sgd(model)
    run = paceline.join(address, model, optimizer, worker_id="thrower")
    with pytest.raises(ZeroDivisionError), run:
        train_and_fail(model, optimizer)
    with RawWorker(address) as raw:
        assert "thrower" not in {member.worker_id for member in raw.status().members}
    train(model, optimizer, 2 * INNER_STEPS)
    assert run.round == 1, "its hook is gone"
    run.close()


def train_and_fail(model: Zoo, optimizer: torch.optim.Optimizer) -> None:
    """A loop that stops in the middle of its second round."""
    train(model, optimizer, INNER_STEPS + 1)
    raise ZeroDivisionError


def test_stats_tell_what_it_cost(address: str) -> None:
    """Counts are exact, and times and shares are what they can be."""
    model = Zoo(1)
    optimizer = sgd(model)
    with paceline.join(address, model, optimizer, overlap="blocking", worker_id="counter") as run:
        before = run.stats()
        assert (before.rounds, before.pushes, before.bytes_up, before.bytes_down, before.stalled_s) == (0, 0, 0, 0, 0)
        assert before.lateness == 0
        train(model, optimizer, 4 * INNER_STEPS)
        stats = run.stats()
        with RawWorker(address) as raw:
            (member,) = [member for member in raw.status().members if member.worker_id == "counter"]
    elements = sum(tensors_of(model)[name].numel() for name in EXCHANGED)
    assert stats.rounds == 4
    assert stats.bytes_up == stats.bytes_down == 4 * 4 * elements
    assert stats.pushes == member.pushes_applied
    assert stats.pushes % 4 == 0
    assert (stats.pushes_refused, stats.reconnects, stats.lateness) == (0, 0, 0)
    assert stats.stalled_s > 0, "it waited for every answer"
    assert 0 < stats.compute_utilization < 1
    assert member.inner_step_us > 0


def test_workers_have_numbers_and_names(address: str) -> None:
    """Each active worker has an index of its own, the lowest free one, and a name if it is given none."""
    models = [Zoo(seed) for seed in range(3)]
    runs = [paceline.join(address, model, sgd(model)) for model in models[:2]]
    assert [run.worker_index for run in runs] == [0, 1]
    with RawWorker(address) as raw:
        assert len({member.worker_id for member in raw.status().members}) == 2
    runs[0].close()
    with paceline.join(address, models[2], sgd(models[2])) as third:
        assert third.worker_index == 0
    runs[1].close()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"overlap": "sometimes"}, "overlap 'sometimes' is not one of eager, delayed, blocking"),
        ({"exchange_on": "cuda"}, "exchange_on 'cuda' is not one of auto, device, host"),
        ({"inner_steps": 0}, "inner_steps is 0; it must be at least 1"),
        ({"uplink": "int3"}, "there is no codec 'int3'"),
        ({"downlink": "fp4"}, "fp4, which is for differences"),
        ({"worker_id": "a b"}, "worker_id 'a b' is not allowed"),
    ],
)
def test_wrong_arguments_are_named(address: str, arguments: dict[str, Any], sentence: str) -> None:
    """What is wrong is said in a sentence, and nobody has joined."""
    model = Zoo(1)
    with pytest.raises(InvalidInputError, match=sentence):
        paceline.join(address, model, sgd(model), **arguments)
    with RawWorker(address) as raw:
        assert not raw.status().members


def test_slower_workers_do_fewer_steps(address: str) -> None:
    """With dynamic inner steps a worker of speed v does floor(H v / v_max) steps, as speeds and members change."""
    with ExitStack() as stack:
        dynamic = stack.enter_context(paceline_server.local(config(inner_steps=50, dynamic_inner_steps=True)))
        workers = [stack.enter_context(RawWorker(dynamic, name)) for name in ("fast", "slow", "slowest")]
        fast, slow, slowest = workers
        assert [worker.join().inner_steps for worker in workers] == [50, 50, 50], "speeds are not known yet"
        assert fast.heartbeat(10_000).inner_steps == 50
        assert slow.heartbeat(30_000).inner_steps == 16
        assert slowest.heartbeat(10_000_000).inner_steps == 1, "never less than one"
        assert slow.heartbeat().inner_steps == 16, "a heartbeat without a speed keeps the last"
        assert slow.heartbeat(12_000).inner_steps == 41
        assert slow.heartbeat(5_000).inner_steps == 50
        assert fast.heartbeat().inner_steps == 25, "there is a faster one now"
        slow.leave()
        assert fast.heartbeat().inner_steps == 50
        assert [member.inner_steps for member in fast.status().members] == [50, 1]
    with RawWorker(address, "fixed") as worker:
        worker.join()
        assert worker.heartbeat(10_000_000).inner_steps == INNER_STEPS, "unless the run says otherwise"
        worker.leave()


class Regression(nn.Module):
    """A small regression whose data differ from worker to worker."""

    def __init__(self, worker: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
        for parameter in self.layers.parameters():
            nn.init.normal_(parameter, std=0.3, generator=generator)
        weights = torch.randn(8, 1, generator=generator)
        self.inputs = torch.randn(64, 8, generator=generator.manual_seed(worker + 1))
        self.outputs = torch.tanh(self.inputs @ weights)

    def loss(self) -> torch.Tensor:
        """The mean squared error on this worker's data."""
        error: torch.Tensor = self.layers(self.inputs) - self.outputs
        return error.square().mean()


@pytest.mark.parametrize("own_weight", ["1", "1/M", "local"])
def test_every_way_of_overlapping_trains(own_weight: str) -> None:
    """Two workers lower their losses with every overlap and own weight, over lossy codecs with their error feedback."""
    overlaps = ["eager"] if own_weight != "1" else ["eager", "delayed", "blocking"]
    exchange = config(uplink="int4", downlink="bf16", own_weight=own_weight, dynamic_inner_steps=False)
    exchange["outer"]["lr"] = 0.5
    with paceline_server.local(exchange) as address:
        models: list[Regression] = []
        for overlap in overlaps:
            models = [Regression(worker) for worker in range(2)]
            optimizers = [torch.optim.SGD(model.parameters(), lr=0.05) for model in models]
            runs: list[Run] = []
            for model, optimizer in zip(models, optimizers, strict=True):
                runs.append(paceline.join(address, model, optimizer, overlap=overlap))
            starts = [model.loss().item() for model in models]
            for _ in range(20 * INNER_STEPS):
                for model, optimizer in zip(models, optimizers, strict=True):
                    optimizer.zero_grad()
                    torch.autograd.backward(model.loss())
                    optimizer.step()
            for run in runs:
                run.flush()
                run.close()
            for model, start in zip(models, starts, strict=True):
                assert model.loss().item() < 0.9 * start
            for run in runs:
                stats = run.stats()
                assert stats.rounds == 20
                assert stats.pushes_refused == 0
                assert 0 < stats.bytes_up < stats.bytes_down


def test_nothing_to_exchange() -> None:
    """A model without any trained parameter joins, steps and flushes all the same."""
    model = nn.Linear(3, 3).requires_grad_(requires_grad=False)
    local = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([local], lr=0.1)
    with paceline_server.local(config()) as address, paceline.join(address, model, optimizer) as run:
        for _ in range(2 * INNER_STEPS):
            local.grad = torch.ones(3)
            optimizer.step()
        wait_until(lambda: run.stats().rounds == 2)
        assert run.stats().bytes_up == 0
