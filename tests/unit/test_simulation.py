"""Simulated runs: the same numbers as the algorithms on paper, in an order that virtual time decides."""

import math
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from paceline.worker import Overlap
from paceline_simulator import Absence, ModuleTask, Result, Simulation, WorkerSpec
from paceline_simulator.workers import Manner
from paceline_wire.errors import InvalidInputError
from support_core import assert_near
from support_simulation import QuadraticTask, server_config

STEP_S = 0.25
"""A step's time whose multiples are exact in binary, so that moments coincide where they should."""


def same(count: int, *, delay_s: float = 0.0) -> list[WorkerSpec]:
    """Workers that are all alike."""
    return [WorkerSpec(step_s=STEP_S, delay_s=delay_s) for _ in range(count)]


# --- The numbers.


@pytest.mark.parametrize("nesterov", [True, False])
def test_a_barrier_without_delay_is_momentum_sgd_on_the_mean(nesterov: bool) -> None:
    """Rounds of several workers are the steps of torch's SGD on the mean of their outer gradients."""
    task = QuadraticTask(3)
    config = server_config("barrier", lr=0.7, momentum=0.9, outer={"publish": "look-ahead" if nesterov else "polyak"})
    result = Simulation(config, task, same(3)).run(until_rounds=6)
    theta = torch.nn.Parameter(task.start.double())
    optimizer = torch.optim.SGD([theta], lr=0.7, momentum=0.9, nesterov=nesterov)
    for _ in range(6):
        left = (1 - task.rate) ** 4
        theta.grad = ((1 - left) * (theta.detach() - task.optima.double())).mean(0)
        optimizer.step()
    assert_near(theta.detach(), result.parameters["x"], 1e-5)
    assert result.compute_utilization == 1.0
    assert result.time_s == 6 * 4 * STEP_S


@pytest.mark.parametrize("own_weight", ["1/M", "1", "local", "predicted"])
def test_without_delay_every_estimate_is_blocking(own_weight: str) -> None:
    """What is answered at once leaves nothing to be estimated: the same bits as workers that wait."""
    config = server_config("barrier", exchange={"own_weight": own_weight})
    eager = Simulation(config, QuadraticTask(3), same(3)).run(until_rounds=5)
    blocking = Simulation(config, QuadraticTask(3), same(3), overlap=Overlap.BLOCKING).run(until_rounds=5)
    assert torch.equal(eager.parameters["x"], blocking.parameters["x"])


class PaperForm:
    """Algorithm 2 of the eager-updates paper for rounds on quadratics, in float64: each worker its own optimizer."""

    def __init__(self, task: QuadraticTask, num_workers: int, *, lr: float, beta: float) -> None:
        self._optima, self._pull = task.optima.double(), 1 - (1 - task.rate) ** 4
        self._theta = task.start.double().repeat(num_workers, 1)
        self._velocity = torch.zeros_like(self._theta)
        self._before = torch.zeros_like(self._theta)
        self._lr, self._beta = lr, beta
        self.outer_gradients: list[torch.Tensor] = []

    def round(self) -> None:
        """Train, and apply the stale mean with the own stale part replaced by the fresh one."""
        own = self._pull * (self._theta - self._optima)
        eager = self._before.mean(0) + (own - self._before) / len(own)
        self._velocity = self._beta * self._velocity + eager
        self._theta = self._theta - self._lr * (eager + self._beta * self._velocity)
        self._before = own
        self.outer_gradients.append(own.mean(0))


def test_eager_with_a_whole_rounds_delay_is_the_papers() -> None:
    """With weight 1/M and answers that come just as the next round ends, the run is Algorithm 2's."""
    rounds, lr, beta, task = 7, 0.4, 0.5, QuadraticTask(3)
    config = server_config("barrier", lr=lr, momentum=beta, exchange={"own_weight": "1/M"})
    result = Simulation(config, task, same(3, delay_s=2 * STEP_S)).run(until_rounds=rounds)
    paper = PaperForm(task, 3, lr=lr, beta=beta)
    theta = torch.nn.Parameter(task.start.double())
    server = torch.optim.SGD([theta], lr=lr, momentum=beta, nesterov=True)
    for _ in range(rounds):
        paper.round()
        theta.grad = paper.outer_gradients[-1]
        server.step()
    assert_near(theta.detach(), result.parameters["x"], 1e-5)
    assert result.compute_utilization == 1.0


def test_delayed_lags_behind_eager() -> None:
    """Workers that do not see their own work repeat it: further from the optimum after the same time."""
    config = server_config("barrier", lr=0.7, momentum=0.0)
    losses = [
        Simulation(config, QuadraticTask(2), same(2, delay_s=2 * STEP_S), overlap=overlap)
        .run(until_rounds=3)
        .evaluations[-1]
        .metrics["loss"]
        for overlap in (Overlap.EAGER, Overlap.DELAYED)
    ]
    assert losses[0] < losses[1]


def closed_form(task: QuadraticTask, result: Result, *, lr: float, beta: float, quota: int) -> torch.Tensor:
    """Section 2's closed form over all pushes that arrived, from drifts that are known (4 steps a round), float64."""
    w = task.start.double()
    open_bin = math.ceil((len(result.arrivals) - 1) / quota)
    for arrival in result.arrivals:
        assert arrival.outcome == "applied"
        g = -4 * task.drift * task.optima[int(arrival.worker.removeprefix("worker-"))].double()
        w -= lr / quota * (1 - beta ** (open_bin - arrival.base_bin + 1)) / (1 - beta) * g
    return w


def test_every_push_that_arrived_is_in_the_parameters_once() -> None:
    """With workers of all speeds that vanish, leave, stall and come back, the run is the closed form of its pushes."""
    task = QuadraticTask(4, rate=0.0, drift=0.125)
    absences = [
        (),
        (Absence(from_s=10.1, to_s=17.0), Absence(from_s=30.0, to_s=31.0)),
        (Absence(from_s=5.3, to_s=25.0, manner=Manner.STALL),),
        (Absence(from_s=12.0, to_s=20.0, manner=Manner.LEAVE), Absence(from_s=40.0)),
    ]
    specs = [
        WorkerSpec(step_s=0.2 * (1 + number), jitter=0.5, delay_s=0.3, joins_s=2.0 * number, absences=away)
        for number, away in enumerate(absences)
    ]
    outer = {"late_bins": 1000}  # else very late pushes enter in part
    config = server_config(lr=0.5, momentum=0.8, outer=outer, schedule={"quota": 3, "lease_s": 4.0})
    result = Simulation(config, task, specs, seed=3).run(until_s=60.0)
    assert max(max(worker.lateness) for worker in result.workers) > 1
    assert {arrival.incarnation for arrival in result.arrivals} == {1, 2, 3}
    assert_near(closed_form(task, result, lr=0.5, beta=0.8, quota=3), result.parameters["x"], 1e-5)


@pytest.mark.parametrize("kind", ["async", "barrier", "participation"])
def test_the_same_seed_gives_the_same_bits(kind: str) -> None:
    """Two simulations with one seed agree in everything; another seed draws other times."""

    def simulated(seed: int) -> Result:
        specs = [WorkerSpec(step_s=0.1 * (1 + number), jitter=0.4, delay_s=0.05) for number in range(4)]
        config = server_config(kind, exchange={"uplink": "int4", "downlink": "bf16"})
        return Simulation(config, QuadraticTask(4), specs, seed=seed).run(until_s=10.0)

    first, second, third = simulated(1), simulated(1), simulated(2)
    assert torch.equal(first.parameters["x"], second.parameters["x"])
    assert torch.equal(first.momentum["x"], second.momentum["x"])
    assert first.arrivals == second.arrivals
    assert first.workers == second.workers
    assert first.arrivals != third.arrivals


def test_running_on_is_running_through() -> None:
    """A run in pieces is the run in one."""

    def simulation() -> Simulation:
        return Simulation(server_config(), QuadraticTask(2), [WorkerSpec(step_s=0.1), WorkerSpec(step_s=0.17)])

    whole, pieces = simulation().run(until_s=9.0), simulation()
    for until_s in (1.0, 4.05):
        pieces.run(until_s=until_s)
    assert torch.equal(whole.parameters["x"], pieces.run(until_s=9.0).parameters["x"])


# --- The wire.


def test_lossy_codecs_and_deltas_stay_near_the_lossless_run() -> None:
    """Quantized pushes with feedback and quantized changes end near the lossless run, in fewer bytes."""
    exact, lossy = (
        Simulation(
            server_config("barrier", exchange={"uplink": uplink}),
            QuadraticTask(2, size=512),
            same(2),
            downlink=downlink,
        ).run(until_rounds=12)
        for uplink, downlink in (("fp32", "fp32"), ("int8", "int8"))
    )
    assert_near(exact.parameters["x"], lossy.parameters["x"], 0.02)
    assert lossy.workers[0].bytes_up < exact.workers[0].bytes_up / 3
    assert lossy.workers[0].bytes_down < exact.workers[0].bytes_down / 3


def test_fragments_travel_by_themselves_to_the_same_end() -> None:
    """Several fragments on several shards, each in its own messages, make the run of one fragment."""
    whole = Simulation(server_config("barrier"), QuadraticTask(2, size=700), same(2)).run(until_rounds=4)
    config = server_config("barrier", exchange={"fragment_elements": 256}).model_copy(update={"shards": 2})
    pieces = Simulation(config, QuadraticTask(2, size=700), same(2)).run(until_rounds=4)
    assert torch.equal(whole.parameters["x"], pieces.parameters["x"])
    assert len(pieces.arrivals) == 3 * len(whole.arrivals) == 3 * 2 * 4


def test_transfers_of_one_worker_queue_up_behind_each_other() -> None:
    """Three fragments on a slow link arrive one after the other, then take the delay."""
    config = server_config(exchange={"fragment_elements": 256})
    spec = WorkerSpec(step_s=STEP_S, delay_s=0.5, uplink_bytes_per_s=1024.0)
    result = Simulation(config, QuadraticTask(1, size=768), [spec]).run(until_pushes=3)
    assert [arrival.time_s for arrival in result.arrivals] == [1.0 + 0.5 + seconds for seconds in (1, 2, 3)]


def test_a_payload_that_is_not_finite_is_refused_and_the_worker_goes_on() -> None:
    """A worker whose numbers went bad is told so, takes the run's parameters, and nothing is applied."""
    task = QuadraticTask(1)
    simulation = Simulation(server_config(lr=1.0, momentum=0.0), task, same(1, delay_s=0.5 * STEP_S))
    simulation.run(until_s=0.5 * STEP_S)
    task.x[0] = math.nan
    result = simulation.run(until_rounds=3)
    assert [arrival.outcome for arrival in result.arrivals] == ["refused", "applied", "applied"]
    assert result.workers[0].pushes_refused == 1
    assert result.parameters["x"].isfinite().all()


# --- Time.


def test_a_worker_waits_only_when_its_window_is_full() -> None:
    """With a round trip of three rounds, a window of 1 waits for two of them, and one of 3 for none."""

    def utilization(window: int) -> Result:
        config = server_config(exchange={"window": window})
        return Simulation(config, QuadraticTask(1), same(1, delay_s=6 * STEP_S)).run(until_s=48.0)

    full, open_ = utilization(1), utilization(3)
    # Rounds of 1 s; from the second on, each waits until the answer to the one before it has come.
    assert full.workers[0].waited_s == pytest.approx(2 / 3 * 48.0, abs=2.0)
    assert full.compute_utilization == pytest.approx(1 / 3, abs=0.05)
    assert open_.workers[0].waited_s == 0.0
    assert open_.compute_utilization == 1.0
    assert open_.workers[0].rounds == 48


def test_blocking_workers_wait_for_every_answer() -> None:
    """A round and its round trip take turns."""
    result = Simulation(server_config(), QuadraticTask(1), same(1, delay_s=0.5), overlap=Overlap.BLOCKING).run(
        until_rounds=5
    )
    assert result.time_s == 5 * (4 * STEP_S + 1.0)
    assert result.workers[0].waited_s == 5 * 1.0


def test_an_answer_takes_effect_at_the_first_boundary_after_it() -> None:
    """With an answer in the middle of the second step, one step is made before it and three after."""
    task = QuadraticTask(1)
    Simulation(server_config(), task, same(1, delay_s=0.75 * STEP_S)).run(until_rounds=2)
    assert task.calls == [{0: 4}, {0: 2}, {0: 2}]


def test_an_answer_in_time_for_the_end_of_the_round_enters_before_it() -> None:
    """What arrives just when a round ends is in the base of that round's push."""
    result = Simulation(server_config(), QuadraticTask(1), same(1, delay_s=2 * STEP_S)).run(until_rounds=3)
    assert [arrival.base_bin for arrival in result.arrivals] == [0, 1, 2]


def test_steps_of_several_workers_are_made_together() -> None:
    """When one worker's model is needed, the others make the steps that are over by then, and no more than it."""
    task = QuadraticTask(2)
    specs = [WorkerSpec(step_s=1.0), WorkerSpec(step_s=1.5)]
    Simulation(server_config(), task, specs).run(until_s=6.0)
    assert task.calls == [{0: 4, 1: 2}, {1: 2, 0: 2}]


def test_slower_workers_are_given_fewer_steps() -> None:
    """With dynamic local updates, a worker at a quarter of the speed makes a quarter of the steps in a round."""
    config = server_config(inner_steps=8, exchange={"dynamic_inner_steps": True})
    task = QuadraticTask(2)
    result = Simulation(config, task, [WorkerSpec(step_s=0.5), WorkerSpec(step_s=2.0)]).run(until_s=400.0)
    fast, slow = result.workers
    assert slow.rounds == pytest.approx(fast.rounds, abs=3)
    assert slow.inner_steps == pytest.approx(fast.inner_steps / 4, abs=8)
    assert result.evaluations[-1].inner_steps == fast.inner_steps + slow.inner_steps
    assert result.evaluations[-1].tokens == 8 * result.evaluations[-1].inner_steps


def test_jitter_keeps_the_mean() -> None:
    """Lognormal factors have mean 1: over many rounds a worker makes the steps of one without jitter."""
    spec = WorkerSpec(step_s=0.25, jitter=0.5)
    result = Simulation(server_config(), QuadraticTask(1), [spec]).run(until_s=2000.0)
    assert result.workers[0].rounds == pytest.approx(2000, rel=0.05)


def test_the_parameters_are_looked_at_in_time() -> None:
    """At the beginning, every so often, and at the end."""
    result = Simulation(server_config(momentum=0.0), QuadraticTask(1), same(1), evaluate_every_s=2.0).run(until_s=5.0)
    assert [evaluation.time_s for evaluation in result.evaluations] == [0.0, 2.0, 4.0, 5.0]
    assert [evaluation.pushes for evaluation in result.evaluations] == [0, 2, 4, 5]
    losses = [evaluation.metrics["loss"] for evaluation in result.evaluations]
    assert losses == sorted(losses, reverse=True)


# --- Workers come and go.


def barrier_of_two(manner: Manner, *, to_s: float = math.inf) -> Result:
    """A barrier with two workers, of which the second goes in its third round; leases of 3 s."""
    away = (Absence(from_s=2.5, to_s=to_s, manner=manner),)
    specs = [WorkerSpec(step_s=STEP_S), WorkerSpec(step_s=STEP_S, absences=away)]
    return Simulation(server_config("barrier", schedule={"lease_s": 3.0}), QuadraticTask(2), specs).run(until_s=12.0)


def arrived(result: Result, worker: str) -> Sequence[float]:
    """When a worker's pushes arrived."""
    return [arrival.time_s for arrival in result.arrivals if arrival.worker == worker]


def test_a_barrier_waits_for_a_vanished_worker_until_its_lease_runs_out() -> None:
    """The other one waits for the lease, and then goes on alone."""
    result = barrier_of_two(Manner.VANISH)
    assert arrived(result, "worker-1") == [1.0, 2.0]
    assert arrived(result, "worker-0") == [1.0, 2.0, 3.0, 5.5, 6.5, 7.5, 8.5, 9.5, 10.5, 11.5]
    assert result.workers[0].waited_s == 1.5  # the next round was made meanwhile


def test_nobody_waits_for_a_worker_that_leaves() -> None:
    """A leave closes the bin at once."""
    result = barrier_of_two(Manner.LEAVE)
    assert arrived(result, "worker-0") == [float(second) for second in range(1, 13)]
    assert result.workers[0].waited_s == 0.0


def test_a_stalled_worker_comes_back_with_its_late_push() -> None:
    """It goes on where it froze: its push is late by the bins that closed without it, and enters."""
    result = barrier_of_two(Manner.STALL, to_s=9.5)
    late = arrived(result, "worker-1")
    assert late[:3] == [1.0, 2.0, 10.0]
    assert max(result.workers[1].lateness) > 1
    assert all(arrival.outcome == "applied" and arrival.incarnation == 1 for arrival in result.arrivals)


def test_a_vanished_worker_comes_back_as_a_new_process() -> None:
    """A new incarnation fetches the run's parameters, and its optimizer begins anew."""
    task = QuadraticTask(2)
    specs = [WorkerSpec(step_s=STEP_S), WorkerSpec(step_s=STEP_S, absences=(Absence(from_s=2.5, to_s=4.25),))]
    result = Simulation(server_config(), task, specs).run(until_s=8.0)
    assert task.restarts == [1]
    again = [arrival for arrival in result.arrivals if arrival.incarnation == 2]
    assert [(arrival.time_s, arrival.seq) for arrival in again] == [(5.25, 1), (6.25, 2), (7.25, 3)]
    assert all(arrival.base_bin > 1 for arrival in again)


def test_a_quorum_closes_without_the_slowest() -> None:
    """Two of three and a grace window close a bin; the third's push is late and still enters."""
    specs = [WorkerSpec(step_s=step_s) for step_s in (0.25, 0.275, 1.0)]
    config = server_config("quorum", schedule={"quorum": 2})
    result = Simulation(config, QuadraticTask(3), specs).run(until_s=40.0)
    assert max(result.workers[2].lateness) >= 2
    assert result.workers[0].rounds > 2 * result.workers[2].rounds


# --- Size.


def test_a_thousand_workers() -> None:
    """A thousand workers are a thousand times more events, and nothing else."""
    specs = [WorkerSpec(step_s=1 + number / 1000, delay_s=0.1) for number in range(1000)]
    task = QuadraticTask(1000)
    result = Simulation(server_config(lr=0.5, momentum=0.0, inner_steps=1), task, specs).run(until_pushes=2500)
    assert len(result.arrivals) == 2500
    loss, before = result.evaluations[-1].metrics["loss"], result.evaluations[0].metrics["loss"]
    assert loss < before


# --- Momentum of the workers.


def test_local_momentum_of_one_worker_is_kept_over_its_rounds() -> None:
    """OrLoMo with one worker and a gradient that does not change is SGD with momentum that never stopped."""

    class Slope(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x = torch.nn.Parameter(torch.zeros(3))

    def sgd(module: torch.nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.8)

    def ones() -> "list[torch.Tensor]":
        return [torch.tensor([1.0, 2.0, -1.0])] * 100

    def slope(module: torch.nn.Module, direction: torch.Tensor) -> torch.Tensor:
        return next(module.parameters()) @ direction

    task = ModuleTask(1, build=Slope, optimizer=sgd, batches=lambda _worker: iter(ones()), loss=slope)
    outer = {"rule": "orlomo", "publish": "polyak"}
    result = Simulation(server_config(lr=1.0, momentum=0.8, outer=outer), task, same(1)).run(until_rounds=5)
    alone = Slope()
    optimizer = sgd(alone)
    for direction in ones()[: 5 * 4]:
        optimizer.zero_grad()
        slope(alone, direction).backward()  # type: ignore[no-untyped-call]  # torch leaves it so
        optimizer.step()
    assert_near(alone.x.detach(), result.parameters["x"], 1e-5)


# --- Arguments.


@pytest.mark.parametrize(
    "arguments",
    [
        {"step_s": 0.0},
        {"step_s": math.inf},
        {"step_s": 1.0, "jitter": -0.1},
        {"step_s": 1.0, "uplink_bytes_per_s": 0.0},
        {"step_s": 1.0, "joins_s": 3.0, "absences": (Absence(from_s=2.0, to_s=4.0),)},
        {"step_s": 1.0, "absences": (Absence(from_s=2.0, to_s=4.0), Absence(from_s=3.0))},
    ],
)
def test_workers_that_cannot_be_are_refused(arguments: dict[str, object]) -> None:
    """Times that do not pass, links that carry nothing, absences that overlap."""
    with pytest.raises(InvalidInputError):
        WorkerSpec(**arguments)  # type: ignore[arg-type]  # wrong on purpose


def test_a_simulation_needs_an_end() -> None:
    """Without a limit it would not return."""
    with pytest.raises(InvalidInputError, match="limit"):
        Simulation(server_config(), QuadraticTask(1), same(1)).run()


def test_equal_tokens_weigh_alike() -> None:
    """Pushes that all say that they stand for as much are the pushes that say nothing."""
    said, unsaid = (
        Simulation(server_config("barrier"), QuadraticTask(2), same(2), weigh_tokens=weigh).run(until_rounds=3)
        for weigh in (True, False)
    )
    assert torch.equal(said.parameters["x"], unsaid.parameters["x"])


def test_the_pages_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """The Python of docs/simulation.md runs as it stands, and its model learns."""
    page = Path(__file__).parents[2] / "docs" / "simulation.md"
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    exec(compile(code, str(page), "exec"), {})  # noqa: S102  # our own page
    assert float(capsys.readouterr().out.split("'loss': ")[1].split("}")[0]) < 0.1
