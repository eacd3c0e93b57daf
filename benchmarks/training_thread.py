"""What joining a run costs the training thread: wall time of inner steps, time inside the hook, seconds waited.

    make bench-training
    python benchmarks/training_thread.py --parameters 10000000 --json

A perceptron is trained on one core; the exchange's threads and the server have the others. Rounds of three kinds take
turns: plain (without the run's hook, so that the run notices none of its steps), joined with nothing under way, joined
while the round before is exchanged. The hook is timed by hooks of the optimizer right before and right after it. All
rounds train one model: a copy lies elsewhere in memory, and by that alone takes up to 2 % longer or shorter.

Of all times, what the training thread spent ready to run while another process had its core is taken out (the kernel
tells it, in /proc/thread-self/schedstat): so other work on the machine blurs less. The exchange has no part in that,
since none of its threads may run there. What was taken out is reported.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import paceline
import paceline_server

RESULTS = Path(__file__).resolve().parent / "results" / "training_thread.json"
LAYERS = 4
ANSWER_S = 60.0
"""Seconds that a round's answer may take, with nothing else to do."""


class OwnClock:
    """A clock of the thread that makes it, which stands still while that is ready to run and another has its core."""

    def __init__(self) -> None:
        self._descriptor = os.open("/proc/thread-self/schedstat", os.O_RDONLY)  # 1 us to read again, 20 us to open

    def own_s(self) -> float:
        """The time on this clock."""
        return time.perf_counter() - self.waits_s()

    def waits_s(self) -> float:
        """For how long it has stood still."""
        return int(os.pread(self._descriptor, 64, 0).split()[1]) / 1e9


class Training:
    """A perceptron, its optimizer and one batch.

    Args:
        parameters: How many it has, about.
        batch: Samples of an inner step.
        clock: What times it.
    """

    def __init__(self, parameters: int, batch: int, clock: OwnClock) -> None:
        self._clock = clock
        width = round((parameters / LAYERS) ** 0.5)
        layers: list[torch.nn.Module] = []
        for _ in range(LAYERS):
            layers += [torch.nn.Linear(width, width), torch.nn.ReLU()]
        self.model = torch.nn.Sequential(*layers)
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3)
        self._batch = torch.randn(batch, width)

    @contextmanager
    def without_hooks(self) -> Iterator[None]:
        """Nothing is called after the optimizer's steps meanwhile."""
        hooks = self.optimizer._optimizer_step_post_hooks  # torch can only remove them for good
        taken_out = dict(hooks)
        hooks.clear()
        try:
            yield
        finally:
            hooks.update(taken_out)

    def round(self, inner_steps: int) -> float:
        """Make inner steps; their mean, seconds."""
        began_s = self._clock.own_s()
        for _ in range(inner_steps):
            loss = (self.model(self._batch) - self._batch).square().mean()
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return (self._clock.own_s() - began_s) / inner_steps


class HookTimer:
    """Times what other hooks of an optimizer do that are registered between `before` and `after`."""

    def __init__(self, optimizer: torch.optim.Optimizer, clock: OwnClock) -> None:
        self._optimizer = optimizer
        self._clock = clock
        self._began_s = 0.0
        self.took_s: list[float] = []
        optimizer.register_step_post_hook(self._begin)

    def close(self) -> None:
        """Time the hooks that are registered by now."""
        self._optimizer.register_step_post_hook(self._end)

    def _begin(self, *_: object) -> None:
        self._began_s = self._clock.own_s()

    def _end(self, *_: object) -> None:
        self.took_s.append(self._clock.own_s() - self._began_s)


@contextmanager
def cores(own: Sequence[int]) -> Iterator[None]:
    """Give the calling thread these cores; threads and processes that it starts meanwhile keep them."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, own)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def measure(arguments: argparse.Namespace, parameters: int) -> dict[str, Any]:
    """Alternate plain and joined rounds of one size."""
    training_core, *other_cores = sorted(os.sched_getaffinity(0))
    if not other_cores:
        raise SystemExit(
            "one core is for training, and at least one more for the exchange: this process has one in all"
        )
    config = {
        "schedule": {"quota": 1},
        "exchange": {
            "uplink": arguments.uplink,
            "downlink": arguments.downlink,
            "inner_steps": arguments.inner_steps,
        },
    }
    clock = OwnClock()
    training = Training(parameters, arguments.batch, clock)
    timer = HookTimer(training.optimizer, clock)
    with ExitStack() as stack:
        with cores(other_cores):  # the exchange's threads are made by threads that are made here
            address = stack.enter_context(paceline_server.local(config))
            run = stack.enter_context(paceline.join(address, training.model, training.optimizer))
        timer.close()
        stack.enter_context(cores([training_core]))
        found = _rounds(arguments, run, training, timer, clock)
        stats = run.stats()
    return found | {
        "parameters": training.parameters,
        "inner_steps": arguments.inner_steps,
        "uplink": arguments.uplink,
        "downlink": arguments.downlink,
        "waited_s": stats.stalled_s,
        "rounds": stats.rounds,
        "measured": datetime.now(UTC).date().isoformat(),
    }


def _rounds(
    arguments: argparse.Namespace,
    run: paceline.Run,
    training: Training,
    timer: HookTimer,
    clock: OwnClock,
) -> dict[str, Any]:
    inner_steps = arguments.inner_steps
    steps_s: dict[str, list[float]] = {"plain": [], "idle": [], "busy": []}
    hook_s: dict[str, list[float]] = {"idle": [], "busy": []}
    began_s, had_waited_s = time.perf_counter(), clock.waits_s()
    for number in range(arguments.warm_up + arguments.repeats):
        with training.without_hooks():
            took_s = {"plain": training.round(inner_steps)}
        for kind in ("idle", "busy"):
            timer.took_s.clear()
            took_s[kind] = training.round(inner_steps)
            if number >= arguments.warm_up:
                hook_s[kind].append(sum(timer.took_s))
        _wait_for_answers(run)
        if number < arguments.warm_up:
            continue
        for kind, seconds in took_s.items():
            steps_s[kind].append(seconds)
        print(
            f"round {number}: " + ", ".join(f"{kind} {seconds * 1e3:.2f} ms" for kind, seconds in took_s.items()),
            file=sys.stderr,
        )
    plain_s = steps_s["plain"]
    return {
        "plain_step_ms": statistics.median(plain_s) * 1e3,
        "plain_step_ms_spread": [min(plain_s) * 1e3, max(plain_s) * 1e3],
        "repeats": arguments.repeats,
        "share_taken_out": (clock.waits_s() - had_waited_s) / (time.perf_counter() - began_s),
    } | {
        kind: {
            "step_ms": statistics.median(steps_s[kind]) * 1e3,
            "overhead_percent": 100 * (statistics.median(_ratios(steps_s[kind], plain_s)) - 1),
            "hook_ms_in_a_round": statistics.median(hook_s[kind]) * 1e3,
            "hook_percent": 100 * statistics.median(hook_s[kind]) / (statistics.median(plain_s) * inner_steps),
        }
        for kind in ("idle", "busy")
    }


def _ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    return [above / below for above, below in zip(numerators, denominators, strict=True)]


def _wait_for_answers(run: paceline.Run) -> None:
    """Wait until all rounds are answered, so that a plain round has the machine for itself."""
    deadline_s = time.monotonic() + ANSWER_S
    while run.stats().rounds < run.round:
        if time.monotonic() > deadline_s:
            raise SystemExit(f"round {run.round} has no answer after {ANSWER_S:.0f} s")
        time.sleep(0.01)


def main() -> None:
    """Measure and print."""
    arguments = _parsed()
    torch.set_num_threads(1)
    cells = [measure(arguments, parameters) for parameters in arguments.parameters]
    report = {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "versions": {name: version(name) for name in ("grpcio", "torch")},
        "cells": cells,
    }
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report) if arguments.json else table(cells))


def table(cells: Sequence[dict[str, Any]]) -> str:
    """A row for each size and kind of round."""
    rows = [
        "| parameters | round | inner step, plain | joined | overhead | inside the hook, a round | waited |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for each in cells:
        for kind, words in (("idle", "nothing under way"), ("busy", "the one before exchanged")):
            found = each[kind]
            rows.append(
                f"| {each['parameters'] / 1e6:.1f} M | {words} | {each['plain_step_ms']:.2f} ms "
                f"| {found['step_ms']:.2f} ms | {found['overhead_percent']:+.2f} % "
                f"| {found['hook_ms_in_a_round']:.1f} ms, {found['hook_percent']:.2f} % | {each['waited_s']:.4f} s |"
            )
    return "\n".join(rows) + "\n"


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, nargs="+", default=[10_000_000, 40_000_000])
    parser.add_argument("--batch", type=int, default=64, help="samples of an inner step")
    parser.add_argument("--inner-steps", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=10, help="of the three kinds of rounds")
    parser.add_argument("--warm-up", type=int, default=1, help="first ones that do not count")
    parser.add_argument("--uplink", default="int8")
    parser.add_argument("--downlink", default="int8")
    parser.add_argument("--quick", action="store_true", help="10 M parameters, three repeats: about a minute")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.parameters, arguments.repeats = [10_000_000], 3
    return arguments


if __name__ == "__main__":
    main()
