"""The command `paceline simulate`: a run of the configured server and imagined workers, in virtual time.

torch is imported by the functions that need it: `paceline --help` loads this module too.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from paceline_server.config import ServerConfig
from paceline_server.options import server_config_options
from paceline_simulator.workers import Absence, Manner, WorkerSpec
from paceline_wire.errors import PacelineError

if TYPE_CHECKING:
    from paceline_simulator.result import Result
    from paceline_simulator.simulation import Simulation

PROGRESS_LINES = 10
"""Looks at the parameters, evenly spread over a run."""

BYTES_PER_MBIT = 125_000
"""Bytes in a megabit."""


@click.command(short_help="Simulate a run with this configuration in virtual time: any number of workers, any links.")
@server_config_options
@click.option("--workers", type=click.IntRange(1, 1000), help="How many.  [default: 4, or those of --replay]")
@click.option("--slowness", default="1", show_default=True, metavar="N,N,...", help="How many times slower each is.")
@click.option("--step-ms", default=25.0, show_default=True, type=click.FloatRange(0, min_open=True), help="Inner step.")
@click.option("--jitter", default=0.0, show_default=True, type=click.FloatRange(0), help="Sigma of a round's speed.")
@click.option("--delay-ms", default=50.0, show_default=True, type=click.FloatRange(0), help="One-way delay of a link.")
@click.option(
    "--rate-mbit",
    type=click.FloatRange(0, min_open=True),
    help="Rate of a link in each direction, Mbit/s.  [default: unlimited]",
)
@click.option(
    "--seconds", default=50.0, show_default=True, type=click.FloatRange(0, min_open=True), help="Virtual time."
)
@click.option("--seed", default=0, show_default=True, help="Decides first parameters, batches and jitter.")
@click.option("--inner-lr", default=0.004, show_default=True, type=float, help="Learning rate of the inner AdamW.")
@click.option(
    "--overlap",
    default="eager",
    show_default=True,
    type=click.Choice(["eager", "delayed", "blocking"]),
    help="What workers do while a push is under way.",
)
@click.option(
    "--replay",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Let pushes in, in the order that a real server wrote down (storage.arrivals).",
)
@click.option(
    "--absence",
    "absences",
    multiple=True,
    metavar="WORKER:FROM:TO:KIND",
    help="Worker number (from 0) is away between these seconds; TO may be empty. KIND is vanish, leave or stall. "
    "May be given again.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else; progress on stderr.")
def simulate(
    config: ServerConfig,
    workers: int | None,
    slowness: str,
    step_ms: float,
    jitter: float,
    delay_ms: float,
    rate_mbit: float | None,
    seconds: float,
    seed: int,
    inner_lr: float,
    overlap: str,
    replay: Path | None,
    absences: tuple[str, ...],
    as_json: bool,
) -> None:
    """Simulate a run: the server's own decisions, the workers' own logic, and imagined time.

    Trains a byte-level transformer on the source of Python's standard library, as `paceline demo` does, but without
    processes, sockets or waiting: a second of virtual time takes as long as its inner steps. Takes every setting of
    `paceline serve`; what concerns addresses and files is ignored.
    """
    import torch

    from paceline.worker import Overlap
    from paceline_simulator.arrivals import read_arrivals
    from paceline_simulator.demo_task import demo_task
    from paceline_simulator.simulation import Simulation

    arrivals = read_arrivals(replay) if replay is not None else None
    names = list(dict.fromkeys(arrival.worker for arrival in arrivals or ()))
    count = workers or len(names) or 4
    away = _absences(absences, count)
    factors = _factors(slowness)
    rate = rate_mbit * BYTES_PER_MBIT if rate_mbit is not None else math.inf
    specs = [
        WorkerSpec(
            step_s=step_ms / 1000 * factors[number % len(factors)],
            jitter=jitter,
            delay_s=delay_ms / 1000,
            uplink_bytes_per_s=rate,
            downlink_bytes_per_s=rate,
            absences=away[number],
            name=names[number] if number < len(names) else None,
        )
        for number in range(count)
    ]
    torch.set_num_threads(1)  # so small a model is slower with more
    simulation = Simulation(
        config,
        demo_task(count, seed=seed, learning_rate=inner_lr),
        specs,
        seed=seed,
        overlap=Overlap(overlap),
        arrival_order=arrivals,
    )
    result = _run(simulation, seconds, to_stderr=as_json)
    click.echo(json.dumps(_as_dict(result)) if as_json else "\n" + _table(result))


def _run(simulation: "Simulation", seconds: float, *, to_stderr: bool) -> "Result":
    """Simulate, with a line from time to time."""
    for part in range(1, PROGRESS_LINES + 1):
        result = simulation.run(until_s=seconds * part / PROGRESS_LINES)
        newest = result.evaluations[-1]
        click.echo(
            f"{newest.time_s:8.1f} s  held-out loss {newest.metrics['loss']:.4f} nats per byte  "
            f"{newest.pushes} pushes  {newest.inner_steps} inner steps",
            err=to_stderr,
        )
    return result


def _absences(texts: Sequence[str], num_workers: int) -> list[tuple[Absence, ...]]:
    """Each worker's absences, in order."""
    found: list[list[Absence]] = [[] for _ in range(num_workers)]
    for text in texts:
        try:
            worker, from_s, to_s, kind = text.split(":")
            absence = Absence(from_s=float(from_s), to_s=float(to_s or "inf"), manner=Manner(kind))
            found[int(worker)].append(absence)
        except (ValueError, IndexError, PacelineError) as error:
            form = f"it has the form WORKER:FROM:TO:KIND, with a worker from 0 to {num_workers - 1}"
            raise click.BadParameter(f"{text!r}: {form}, and {error}", param_hint="--absence") from error
    return [tuple(sorted(absences, key=lambda absence: absence.from_s)) for absences in found]


def _factors(text: str) -> list[float]:
    try:
        factors = [float(part) for part in text.split(",")]
    except ValueError:
        factors = [0.0]
    if not all(factor > 0 and math.isfinite(factor) for factor in factors):
        raise click.BadParameter(f"{text!r} is not a list of positive numbers", param_hint="--slowness")
    return factors


def _as_dict(result: "Result") -> dict[str, Any]:
    return {
        "time_s": result.time_s,
        "compute_utilization": result.compute_utilization,
        "evaluations": [
            {**asdict(evaluation), "metrics": dict(evaluation.metrics)} for evaluation in result.evaluations
        ],
        "workers": [
            {
                **asdict(worker),
                "mean_lateness": worker.mean_lateness,
                "compute_utilization": worker.compute_utilization,
            }
            for worker in result.workers
        ],
    }


def _table(result: "Result") -> str:
    """What each worker did and what it came to, for a terminal."""
    width = max(len("worker"), *(len(worker.name) for worker in result.workers))
    heading = ("rounds", "steps", "bins late", "waited s", "computing", "MB up", "MB down", "refused")
    lines = [f"{'worker':<{width}}" + "".join(f"{title:>11}" for title in heading)]
    for worker in result.workers:
        cells = (
            f"{worker.rounds}",
            f"{worker.inner_steps}",
            f"{worker.mean_lateness:.2f}",
            f"{worker.waited_s:.2f}",
            f"{worker.compute_utilization:.1%}",
            f"{worker.bytes_up / 1e6:.2f}",
            f"{worker.bytes_down / 1e6:.2f}",
            f"{worker.pushes_refused}",
        )
        lines.append(f"{worker.name:<{width}}" + "".join(f"{cell:>11}" for cell in cells))
    newest = result.evaluations[-1]
    lines.append(
        f"\nheld-out loss {newest.metrics['loss']:.4f} nats per byte after {newest.time_s:g} s of virtual time, "
        f"{newest.inner_steps} inner steps; workers computed {result.compute_utilization:.1%} of their time"
    )
    return "\n".join(lines)
