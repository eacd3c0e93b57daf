"""Runs a demo: starts the processes, lets them train together, then one alone, and evaluates what they come to."""

import asyncio
import time
from collections.abc import Callable

import torch

import paceline
from paceline.demo.data import held_out_batch, load_corpus
from paceline.demo.model import build_model, evaluate
from paceline.demo.processes import Child, Children
from paceline.demo.state import DemoState, Point, WorkerState
from paceline_wire.errors import NotInitializedError


async def run_demo(state: DemoState, *, with_single: bool, changed: Callable[[], None]) -> None:
    """Run the whole demo, writing what comes of it into `state`.

    Args:
        state: Holds the settings; filled as the demo goes on.
        with_single: Whether to train the lone worker of the comparison, too.
        changed: Called after every change of the state.

    Raises:
        ChildFailedError: A process failed; all others have been ended.
        PacelineError: The server could not be observed.
    """
    state.phase = "reading the standard library"
    changed()
    evaluator = await asyncio.to_thread(Evaluator, state)
    state.num_parameters = evaluator.num_parameters
    start = Point(0.0, await evaluator.evaluate())
    state.curve.append(start)
    try:
        async with Children() as children:
            await _train_together(state, children, evaluator, changed)
        if with_single:
            state.single_curve.append(start)
            async with Children() as children:
                await _train_alone(state, children, changed)
    except ExceptionGroup as group:  # what failed first has cancelled everything else
        raise _first_leaf(group) from None
    state.phase = "done"
    changed()


class Evaluator:
    """Holds the held-out sequences and a model to try parameters in."""

    def __init__(self, state: DemoState) -> None:
        torch.set_num_threads(1)
        settings = state.settings
        self._model = build_model(settings.model, settings.seed)
        self._held_out = held_out_batch(load_corpus(), settings.evaluation_sequences, settings.model.context)
        self.num_parameters = sum(parameter.numel() for parameter in self._model.parameters())

    async def evaluate(self, parameters: dict[str, torch.Tensor] | None = None) -> float:
        """Return the held-out loss of these parameters, or of the untrained model's, off the event loop."""
        if parameters is not None:
            self._model.load_state_dict(parameters)
        return await asyncio.to_thread(evaluate, self._model, *self._held_out)


async def _train_together(
    state: DemoState, children: Children, evaluator: Evaluator, changed: Callable[[], None]
) -> None:
    settings = state.settings
    state.phase = "starting the server and the workers"
    state.workers = [WorkerState(slowness=settings.slowness(index)) for index in range(settings.workers)]
    changed()
    server, address = await _start_server(state, children)
    links = await children.start_module(
        *("the emulated links", "paceline.relay", "--target", address, "--links", str(settings.workers)),
        *("--delay-ms", str(settings.delay_ms), "--rate-mbit", str(settings.rate_mbit)),
    )
    ports = (await links.expect("listening"))["ports"]
    workers = [
        await children.start_module(
            *(f"worker {index}", "paceline.demo.worker", "--settings", settings.to_json()),
            *("--address", f"127.0.0.1:{port}", "--index", str(index)),
        )
        for index, port in enumerate(ports)
    ]
    await asyncio.gather(*(worker.expect("ready") for worker in workers))

    state.phase = f"{settings.workers} workers train together"
    changed()
    start_s = time.monotonic()
    for worker in workers:
        worker.send_line("start")
    async with paceline.connect(address) as observer, asyncio.TaskGroup() as group:
        watching = [group.create_task(_must_go_on(child)) for child in (server, links)]
        observing = group.create_task(_observe(state, observer, evaluator, start_s, changed))
        async with asyncio.TaskGroup() as working:
            for worker, worker_state in zip(workers, state.workers, strict=True):
                working.create_task(_follow(worker, worker_state, state, changed))
        state.training_s = max(worker_state.elapsed_s for worker_state in state.workers)
        for task in (*watching, observing):
            task.cancel()
        base = await observer.fetch()
    state.curve.append(Point(state.training_s, await evaluator.evaluate(base.tensors)))
    await asyncio.gather(*(worker.finish() for worker in workers))
    links.close_input()
    closed = await links.expect("closed")
    state.link_bytes_up, state.link_bytes_down = sum(closed["bytes_up"]), sum(closed["bytes_down"])
    changed()


async def _start_server(state: DemoState, children: Children) -> tuple[Child, str]:
    settings = state.settings
    server = await children.start_module(
        *("the server", "paceline", "serve", "--json", "--listen", "127.0.0.1:0", "--schedule.kind", "async"),
        *("--outer.lr", str(settings.outer_lr), "--outer.momentum", str(settings.outer_momentum)),
        *("--exchange.uplink", settings.uplink, "--exchange.downlink", settings.downlink),
        *("--exchange.inner-steps", str(settings.inner_steps)),
    )
    return server, (await server.expect("listening"))["address"]


async def _train_alone(state: DemoState, children: Children, changed: Callable[[], None]) -> None:
    state.phase = "one worker trains alone"
    changed()
    worker = await children.start_module(
        "the lone worker", "paceline.demo.worker", "--settings", state.settings.to_json()
    )
    await worker.expect("ready")
    worker.send_line("start")
    await _follow(worker, state.single, state, changed)
    await worker.finish()


async def _follow(worker: Child, worker_state: WorkerState, state: DemoState, changed: Callable[[], None]) -> None:
    """Take over a worker's reports until it is done; a loss among them is a point of the lone worker's curve."""
    async for event in worker.events_until("done"):
        worker_state.update(event)
        if "loss" in event:
            state.single_curve.append(Point(event["elapsed_s"], event["loss"]))
        changed()


async def _observe(
    state: DemoState, observer: paceline.Client, evaluator: Evaluator, start_s: float, changed: Callable[[], None]
) -> None:
    """Evaluate the server's parameters now and then; a client like any other, but without a link in between."""
    interval_s = state.settings.evaluation_interval_s
    while True:
        await asyncio.sleep(interval_s - (time.monotonic() - start_s) % interval_s)
        try:
            base = await observer.fetch()
        except NotInitializedError:
            continue  # no worker has come that far
        fetched_s = time.monotonic() - start_s
        state.curve.append(Point(fetched_s, await evaluator.evaluate(base.tensors)))
        changed()


async def _must_go_on(child: Child) -> None:
    await child.finish()
    raise child.failure()


def _first_leaf(group: ExceptionGroup) -> Exception:
    first = group.exceptions[0]
    return _first_leaf(first) if isinstance(first, ExceptionGroup) else first
