"""The command `paceline demo`: options, where output goes, and how it ends."""

import asyncio
import importlib.util
import json
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.console import Console

    from paceline.demo.state import DemoState

EXTRA_MODULES = ("matplotlib", "rich")
"""What the demo needs beyond Paceline itself."""

PACING_NOTE = (
    "All of this shares one machine: a worker's step is paced to a fixed time (every fourth worker's to four times as "
    "much), as if each sat on a host of its own, and the lone worker is paced like a fast one."
)


@click.command(short_help="Train a small model with several workers on this machine, and compare with one alone.")
@click.option("--workers", default=4, show_default=True, type=click.IntRange(1, 64), help="How many train together.")
@click.option("--seconds", default=50.0, show_default=True, type=click.FloatRange(1), help="Training time.")
@click.option("--seed", default=0, show_default=True, help="Decides first parameters and batches.")
@click.option("--delay-ms", default=50.0, show_default=True, type=click.FloatRange(0), help="One-way delay of a link.")
@click.option(
    "--rate-mbit",
    default=20.0,
    show_default=True,
    type=click.FloatRange(0, min_open=True),
    help="Rate of a link in each direction, Mbit/s.",
)
@click.option("--single/--no-single", default=True, help="Also train one worker alone, for comparison (the default).")
@click.option(
    "--plot",
    default="paceline-demo.png",
    show_default=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="Where the plot of loss against time goes (PNG).",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else; progress on stderr.")
def demo(
    *,
    workers: int,
    seconds: float,
    seed: int,
    delay_ms: float,
    rate_mbit: float,
    single: bool,
    plot: Path,
    as_json: bool,
) -> None:
    """Train a byte-level transformer on the source of Python's standard library.

    A server process and several worker processes train it together, each worker behind an emulated link, and then a
    lone worker trains the same model for the same time without Paceline. Every fourth worker is four times slower.

    Exits with 0 only if the held-out loss fell.
    """
    missing = [name for name in EXTRA_MODULES if importlib.util.find_spec(name) is None]
    if missing:
        raise click.ClickException(f"the demo needs {' and '.join(missing)}: pip install 'paceline[demo]'")
    # Imported this late because they import torch, and `paceline --help` should not.
    from rich.console import Console

    from paceline.demo.processes import ChildFailedError
    from paceline.demo.report import report_table, save_plot, summarize, verdict
    from paceline.demo.settings import DemoSettings
    from paceline.demo.state import DemoState

    state = DemoState(
        settings=DemoSettings(workers=workers, seconds=seconds, seed=seed, delay_ms=delay_ms, rate_mbit=rate_mbit)
    )
    progress = Console(stderr=as_json)
    progress.print(PACING_NOTE, highlight=False, soft_wrap=not progress.is_terminal)
    try:
        asyncio.run(_run(state, progress, with_single=single))
    except ChildFailedError as error:
        raise click.ClickException(str(error)) from error
    except asyncio.CancelledError:
        raise click.ClickException("ended by a signal; all processes of the demo have been stopped") from None

    report = summarize(state)
    save_plot(state, plot)
    if as_json:
        click.echo(json.dumps(report.to_dict()))
    else:
        progress.print(report_table(report))
        progress.print(verdict(report), highlight=False)
        progress.print(f"Loss against time: {plot}", highlight=False)
    if not report.loss_fell:
        if as_json:
            click.echo(verdict(report), err=True)
        raise click.exceptions.Exit(1)


async def _run(state: "DemoState", console: "Console", *, with_single: bool) -> None:
    from paceline.demo.runner import run_demo
    from paceline.demo.view import showing

    task = asyncio.current_task()
    assert task is not None  # noqa: S101  # a coroutine that runs is in a task
    for number in (signal.SIGTERM, signal.SIGHUP):  # Ctrl-C cancels the task already
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    with showing(state, console) as changed:
        await run_demo(state, with_single=with_single, changed=changed)
