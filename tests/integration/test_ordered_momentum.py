"""Section 1's identities through a real server: sockets, messages, fragments, and the public client."""

import asyncio
import itertools
import math
import random
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import paceline
import paceline_server
from integration.raw import RawWorker
from integration.reference import MomentumSGD, OrderedMomentumLoop, Quadratic, closed_form, flat, unflat
from paceline import Base, Client
from paceline_wire.v1 import parameter_server_pb2 as pb

LR = 0.7
FRAGMENT = 256
START = {
    "a.weight": torch.linspace(-1.0, 1.0, 300).reshape(30, 10),
    "b.bias": torch.linspace(0.0, 3.0, 15),
    "scale": torch.tensor(0.5),
}
SIZE = sum(tensor.numel() for tensor in START.values())


def config(kind: str = "async", *, beta: float, **schedule: Any) -> dict[str, Any]:
    """A run without loss on the wire, of two fragments when it starts from START."""
    outer = {"lr": LR, "momentum": beta}
    if "publish" in schedule:
        outer["publish"] = schedule.pop("publish")
    return {
        "outer": outer,
        "schedule": {"kind": kind, **schedule},
        "exchange": {"uplink": "fp32", "downlink": "fp32", "fragment_elements": FRAGMENT},
    }


@asynccontextmanager
async def clients(address: str, number: int) -> AsyncIterator[list[Client]]:
    """Connected workers of a run that starts from START, all active before any of them pushes."""
    async with AsyncExitStack() as stack:
        joined = [
            await stack.enter_async_context(paceline.connect(address, worker_id=f"worker-{index}"))
            for index in range(number)
        ]
        await joined[0].initialize(START)
        yield joined


def assert_state(base: Base, expected: torch.Tensor, expected_bin: int) -> None:
    """The base holds these values, and every fragment names this bin."""
    torch.testing.assert_close(flat(base.tensors), expected, rtol=2e-5, atol=2e-5)
    assert base.bins == {0: expected_bin, 1: expected_bin}


async def test_every_reply_is_the_literal_loops() -> None:
    """K clients, quota K, arrivals in random order: parameters and bin of every single reply are section 1's."""
    num_workers, beta, order = 4, 0.9, random.Random(4)
    losses = [Quadratic(SIZE, seed) for seed in range(num_workers)]
    with paceline_server.local(config(beta=beta, quota=num_workers)) as address:
        async with clients(address, num_workers) as workers:
            loop = OrderedMomentumLoop(flat(START), num_workers=num_workers, lr=LR, beta=beta)
            bases = [await worker.fetch() for worker in workers]
            labels = [0] * num_workers
            for _ in range(60):
                arriving = order.randrange(num_workers)
                base = bases[arriving]
                gradient = losses[arriving].gradient(flat(base.tensors)).float()
                bases[arriving] = await workers[arriving].exchange(unflat(gradient, START), base)
                labels[arriving] = loop.arrive(gradient.double(), labels[arriving])
                assert_state(bases[arriving], loop.w, math.ceil(labels[arriving] / num_workers))
            (status,) = await workers[0].statuses()
            assert status.pushes_applied == 2 * 60


async def _end_of(order: Sequence[int], gradients: dict[int, list[torch.Tensor]]) -> tuple[torch.Tensor, int]:
    """Run K = 3 workers until all labels' gradients have arrived; the choices pick who arrives next."""
    with paceline_server.local(config(beta=0.9, quota=3)) as address:
        async with clients(address, 3) as workers:
            bases = [await worker.fetch() for worker in workers]
            outstanding = dict.fromkeys(range(3), 0)
            for t, choice in enumerate(order, start=1):
                arriving = sorted(outstanding)[choice % len(outstanding)]
                label = outstanding.pop(arriving)
                gradient = gradients[label].pop() if label == 0 else gradients[label][0]
                bases[arriving] = await workers[arriving].exchange(unflat(gradient, START), bases[arriving])
                if t in gradients:
                    outstanding[arriving] = t
            assert not outstanding
            final = await workers[0].fetch()
            return flat(final.tensors), final.bins[0]


async def test_the_final_state_does_not_depend_on_the_order_of_arrival() -> None:
    """The same gradients, computed at the same labels, end in the same parameters whichever order they arrive in."""
    num_bins, total = 3, 12
    finals = []
    for seed in range(2):
        generator = torch.Generator().manual_seed(1)
        # The first bin's K gradients all have label 0; with equal values they may come in any order.
        first = torch.randn(SIZE, generator=generator)
        gradients = {0: [first] * 3}
        gradients |= {label: [torch.randn(SIZE, generator=generator)] for label in range(1, 3 * num_bins + 1)}
        order = random.Random(seed)
        finals.append(await _end_of([order.randrange(6) for _ in range(total)], gradients))
    (first_values, first_bin), (second_values, second_bin) = finals
    assert first_bin == second_bin
    torch.testing.assert_close(first_values, second_values, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def histories() -> Iterator[tuple[list[RawWorker], "itertools.count[int]"]]:
    """Three members of a run of quota 3 whose fragments are histories of their own; the number of an unused one."""
    with ExitStack() as stack:
        address = stack.enter_context(paceline_server.local(config(beta=0.8, quota=3, lease_s=3600)))
        workers = [stack.enter_context(RawWorker(address, f"worker-{index}")) for index in range(3)]
        tensor = pb.Tensor(name="x", shape=[60 * FRAGMENT], dtype=pb.DTYPE_FLOAT32, role=pb.ROLE_PARAMETER)
        manifest = pb.Manifest(tensors=[tensor], fragment_elements=FRAGMENT)
        workers[0].initialize(manifest, {index: torch.ones(FRAGMENT) for index in range(60)})
        for worker in workers:
            worker.join()
        yield workers, itertools.count()


@settings(max_examples=20, deadline=None, derandomize=True, phases=[Phase.generate])
@given(choices=st.lists(st.integers(0, 2), min_size=12, max_size=12))
def test_any_order_is_momentum_sgd_over_bins(
    histories: tuple[list[RawWorker], "itertools.count[int]"], choices: list[int]
) -> None:
    """Every reply is the loop's, and once bins 0 to 3 are whole the state is momentum SGD's over their sums."""
    workers, unused = histories
    fragment, last_label = next(unused), 9
    generator = torch.Generator().manual_seed(11)
    firsts = [torch.randn(FRAGMENT, generator=generator) for _ in workers]
    gradients = [torch.randn(FRAGMENT, generator=generator) for _ in range(last_label + 1)]
    loop = OrderedMomentumLoop(torch.ones(FRAGMENT), num_workers=3, lr=LR, beta=0.8)
    sums = torch.zeros(4, FRAGMENT, dtype=torch.float64)
    outstanding = {index: (0, firsts[index]) for index in range(3)}
    seqs, members = [0, 0, 0], [0, 0, 0, 0]
    with ExitStack() as stack:
        streams = [stack.enter_context(worker.exchange()) for worker in workers]
        for choice in choices:
            arriving = sorted(outstanding)[choice % len(outstanding)]
            label, gradient = outstanding.pop(arriving)
            base_bin = math.ceil(label / 3)
            seqs[arriving] += 1
            streams[arriving].push(fragment, seqs[arriving], base_bin, gradient)
            update, values = streams[arriving].update()
            sums[base_bin] += gradient
            label = loop.arrive(gradient.double(), label)
            torch.testing.assert_close(values.double(), loop.w, rtol=1e-5, atol=1e-5)
            assert (update.seq, update.bin) == (seqs[arriving], math.ceil(label / 3))
            members[base_bin] += 1
            if label <= last_label:
                outstanding[arriving] = (label, gradients[label])
    assert not outstanding
    assert members == [3, 3, 3, 3], "every bin holds exactly K gradients"
    reference = MomentumSGD(torch.ones(FRAGMENT), lr=LR / 3, beta=0.8, nesterov=False)
    for total in sums:
        reference.step(total)
    # The last arrivals have opened bin 4, which is empty: one step more along the momentum.
    expected = reference.step(torch.zeros(FRAGMENT, dtype=torch.float64))
    torch.testing.assert_close(workers[0].fetch(fragment)[1].double(), expected, rtol=1e-5, atol=1e-5)


async def test_with_one_worker_it_is_momentum_sgd() -> None:
    """K = 1 is torch.optim.SGD with momentum, step by step."""
    loss = Quadratic(SIZE, 5)
    with paceline_server.local(config(beta=0.9, quota=1)) as address:
        async with clients(address, 1) as (worker,):
            parameter = torch.nn.Parameter(flat(START).float())
            optimizer = torch.optim.SGD([parameter], lr=LR, momentum=0.9)
            base = await worker.fetch()
            for _ in range(20):
                parameter.grad = loss.gradient(parameter.detach()).float()
                optimizer.step()
                gradient = loss.gradient(flat(base.tensors))
                base = await worker.exchange(unflat(gradient, START), base)
                torch.testing.assert_close(flat(base.tensors).float(), parameter.detach(), rtol=1e-5, atol=1e-5)


async def test_without_momentum_it_is_asynchronous_sgd() -> None:
    """With beta 0 it is w -= eta g at every arrival, however late: in float32 bit for bit."""
    order = random.Random(2)
    with paceline_server.local(config(beta=0.0, quota=4)) as address:
        async with clients(address, 4) as workers:
            w = {name: tensor.clone() for name, tensor in START.items()}
            bases = [await worker.fetch() for worker in workers]
            for _ in range(24):
                arriving = order.randrange(4)
                gradient = {name: tensor * 0.3 + 0.1 for name, tensor in bases[arriving].tensors.items()}
                bases[arriving] = await workers[arriving].exchange(gradient, bases[arriving])
                for name in w:
                    w[name] -= gradient[name] * (LR / 4)
                    assert torch.equal(w[name], bases[arriving].tensors[name])


@pytest.mark.parametrize("publish", ["polyak", None])
async def test_a_barrier_is_synchronous_momentum_sgd(publish: str | None) -> None:
    """With a barrier, replies are Polyak's momentum SGD; those that look ahead, which is the default, Nesterov's."""
    settings = {} if publish is None else {"publish": publish}
    losses = [Quadratic(SIZE, seed) for seed in range(3)]
    with paceline_server.local(config("barrier", beta=0.9, **settings)) as address:
        async with clients(address, 3) as workers:
            parameter = torch.nn.Parameter(flat(START))
            optimizer = torch.optim.SGD([parameter], lr=LR, momentum=0.9, nesterov=publish != "polyak")
            bases = list(await asyncio.gather(*(worker.fetch() for worker in workers)))
            for turn in range(1, 13):
                bases = await asyncio.gather(
                    *(
                        worker.exchange(unflat(loss.gradient(flat(base.tensors)), START), base)
                        for worker, loss, base in zip(workers, losses, bases, strict=True)
                    )
                )
                parameter.grad = torch.stack([loss.gradient(parameter.detach()) for loss in losses]).mean(0)
                optimizer.step()
                for base in bases:
                    assert_state(base, parameter.detach(), turn)


async def test_a_push_after_its_bin_closed_joins_its_own_bin() -> None:
    """Under a quorum a straggler's push ends where it would have been in time, and it is answered at once."""
    gradients = [torch.randn(SIZE, generator=torch.Generator().manual_seed(seed)) for seed in range(6)]
    with paceline_server.local(config("quorum", beta=0.6, quota=3, quorum=2)) as address:
        async with clients(address, 3) as (first, second, straggler):
            base = await straggler.fetch()
            after = await asyncio.gather(
                first.exchange(unflat(gradients[0], START), base), second.exchange(unflat(gradients[1], START), base)
            )
            eta = LR / 3
            # The next bin is open already: the reply looks ahead.
            entered = [(0, gradients[0].double()), (0, gradients[1].double())]
            expected = closed_form(flat(START), entered, open_bin=1, eta=eta, beta=0.6)
            assert_state(after[0], expected, 1)
            assert_state(after[1], expected, 1)
            late = await straggler.exchange(unflat(gradients[2], START), base)
            entered.append((0, gradients[2].double()))
            in_time = closed_form(flat(START), entered, open_bin=1, eta=eta, beta=0.6)
            assert_state(late, in_time, 1)
            nesterov = MomentumSGD(flat(START), lr=LR, beta=0.6, nesterov=True)
            torch.testing.assert_close(in_time, nesterov.step(torch.stack(gradients[:3]).double().mean(0)))
            # And once more, on top of the momentum of the first bin.
            await asyncio.gather(
                first.exchange(unflat(gradients[3], START), after[0]),
                second.exchange(unflat(gradients[4], START), after[1]),
            )
            again = await straggler.exchange(unflat(gradients[5], START), late)
            expected = nesterov.step(torch.stack(gradients[3:]).double().mean(0))
            assert_state(again, expected, 2)
            (status,) = await first.statuses()
            assert status.bins_late_total == 2 * 2, "two late pushes in each of two fragments"


async def test_the_quota_follows_the_active_workers() -> None:
    """Without a quota, a bin has as many labels as it found workers; a push enters with the share of all there are."""
    beta = 0.7
    generator = torch.Generator().manual_seed(3)
    with paceline_server.local(config(beta=beta)) as address:
        async with AsyncExitStack() as stack:
            workers: list[Client] = []

            async def join() -> Base:
                name = f"worker-{len(workers)}"
                workers.append(await stack.enter_async_context(paceline.connect(address, worker_id=name)))
                await workers[0].initialize(START)
                return await workers[-1].fetch()

            bases = [await join(), await join()]
            entered: list[tuple[int, float, torch.Tensor]] = []
            open_bin, issuing, labels_left, quota = 0, 0, 0, 2
            for t in range(24):
                if t in (5, 13):
                    bases.append(await join())
                    assert bases[-1].bins == {0: issuing, 1: issuing}
                arriving = t % len(workers)
                gradient = torch.randn(SIZE, generator=generator)
                base_bin = bases[arriving].bins[0]
                open_bin, quota = issuing, max(quota, len(workers))
                entered.append((base_bin, LR / quota, gradient.double()))
                if labels_left == 0:
                    issuing, labels_left, quota = issuing + 1, len(workers), len(workers)
                labels_left -= 1
                bases[arriving] = await workers[arriving].exchange(unflat(gradient, START), bases[arriving])
                expected = flat(START)
                for b, eta, g in entered:
                    expected = closed_form(expected, [(b, g)], open_bin=open_bin, eta=eta, beta=beta)
                assert_state(bases[arriving], expected, issuing)


def test_a_late_gradient_moves_the_parameters_as_far_as_a_timely_one(
    histories: tuple[list[RawWorker], "itertools.count[int]"],
) -> None:
    """Every gradient's displacement ends at eta / (1 - beta), whether it comes at once or eight bins late."""
    workers, unused = histories
    gradient = torch.randn(FRAGMENT, generator=torch.Generator().manual_seed(0))
    nothing, eta = torch.zeros(FRAGMENT), LR / 3
    for bins_late in (0, 8):
        fragment, base_bin = next(unused), 0
        with workers[0].exchange() as worker, workers[1].exchange() as straggler:
            for seq in itertools.count(1):
                worker.push(fragment, seq, base_bin, nothing)
                base_bin = worker.update()[0].bin
                if base_bin == bins_late + 1:
                    break
            straggler.push(fragment, 1, 1, gradient)
            update, values = straggler.update()
            assert update.bins_late == bins_late
            at_once = eta * (1 - 0.8 ** (bins_late + 1)) / (1 - 0.8)
            torch.testing.assert_close(values, 1 - at_once * gradient, rtol=1e-5, atol=1e-5)
            for following in range(seq + 1, seq + 200):
                worker.push(fragment, following, base_bin, nothing)
                update, values = worker.update()
                base_bin = update.bin
            torch.testing.assert_close(values, 1 - eta / (1 - 0.8) * gradient, rtol=1e-5, atol=1e-5)


def test_the_references_agree_with_each_other() -> None:
    """The loop and the closed form are two writings of one rule, so a slip in one of them cannot hide."""
    generator, order = torch.Generator().manual_seed(0), random.Random(0)
    loop = OrderedMomentumLoop(torch.zeros(4), num_workers=2, lr=0.4, beta=0.5)
    labels, entered = [0, 0], []
    for _ in range(30):
        arriving = order.randrange(2)
        g = torch.randn(4, dtype=torch.float64, generator=generator)
        entered.append((math.ceil(labels[arriving] / 2), g))
        labels[arriving] = loop.arrive(g, labels[arriving])
        expected = closed_form(torch.zeros(4).double(), entered, open_bin=loop.c, eta=0.2, beta=0.5)
        torch.testing.assert_close(loop.w, expected, rtol=1e-12, atol=1e-12)
