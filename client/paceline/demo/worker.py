"""A worker process of the demo: `python -m paceline.demo.worker`, joined to a run or alone.

It prints one JSON object per line: `ready` once it could start, then, after a line on its standard input, `progress`
about once a second, `trained` when its time is over, and `done` at last. When its standard input ends it stops, so that
none outlives the demo.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import click
import torch

import paceline
from paceline.demo.data import Corpus, held_out_batch, load_corpus
from paceline.demo.model import build_model, evaluate
from paceline.demo.settings import DemoSettings
from paceline.demo.training import Pacer, StepResult, build_optimizer, train

REPORT_INTERVAL_S = 1.0
"""Training time between two lines of progress."""
LONE_STREAM = 999
"""The lone worker's stream of batches: none of the joined workers' own."""


def train_together(address: str, index: int, settings: DemoSettings, corpus: Corpus) -> None:
    """Train as one of the run's workers; the three lines that join it are the ones any script needs."""
    model = build_model(settings.model, settings.seed)
    optimizer = build_optimizer(model, settings)
    _await_start()
    pacer = Pacer(settings.step_s * settings.slowness(index))
    with paceline.join(address, model, optimizer, worker_id=f"demo-{index}") as run:
        report = Reporter(pacer, lambda: {"index": index, "stats": asdict(run.stats())})
        for result in train(model, optimizer, corpus.train, settings, pacer, stream=index):
            report.after_step(result)
        report.print("trained")
        begin_s = time.monotonic()
        run.flush()
        report.print("done", flush_s=time.monotonic() - begin_s)


def train_alone(settings: DemoSettings, corpus: Corpus) -> None:
    """Train the same model without Paceline; evaluates itself at marks, with its clock stopped."""
    model = build_model(settings.model, settings.seed)
    optimizer = build_optimizer(model, settings)
    held_out = held_out_batch(corpus, settings.evaluation_sequences, settings.model.context)
    _await_start()
    pacer = Pacer(settings.step_s)
    report = Reporter(pacer, dict)
    next_mark_s = settings.evaluation_interval_s
    for result in train(model, optimizer, corpus.train, settings, pacer, stream=LONE_STREAM):
        report.after_step(result)
        if next_mark_s <= result.elapsed_s < settings.seconds:
            next_mark_s += settings.evaluation_interval_s
            with pacer.stopped_clock():
                report.print("evaluation", loss=evaluate(model, *held_out))
    with pacer.stopped_clock():
        report.print("done", loss=evaluate(model, *held_out))


class Reporter:
    """Prints how far a worker is, about once per second of training time."""

    def __init__(self, pacer: Pacer, extra: Callable[[], dict[str, Any]]) -> None:
        self._pacer = pacer
        self._extra = extra
        self._next_s = 0.0
        self._losses: list[float] = []

    def after_step(self, result: StepResult) -> None:
        """Note a step, and print the mean loss since the last line if it is time."""
        self._losses.append(result.loss)
        if result.elapsed_s >= self._next_s:
            self._next_s = result.elapsed_s + REPORT_INTERVAL_S
            self.print("progress", train_loss=sum(self._losses) / len(self._losses))
            self._losses.clear()

    def print(self, event: str, **fields: float) -> None:
        """Print one line."""
        pacer = self._pacer
        place = {"elapsed_s": pacer.elapsed_s, "steps": pacer.steps, "overruns": pacer.overruns}
        click.echo(json.dumps({"event": event, **place, **fields, **self._extra()}))


def _await_start() -> None:
    """Say that everything is loaded, wait for the word to start, and from then on stop when the demo does."""
    click.echo(json.dumps({"event": "ready"}))
    if not sys.stdin.readline():
        sys.exit("the demo ended before the worker had started")

    def watch() -> None:
        sys.stdin.read()
        os._exit(1)  # the demo is gone, and nobody is left who would care for an orderly end

    threading.Thread(target=watch, daemon=True).start()


@click.command(help="Run one of the demo's workers; without an address, the lone one.")
@click.option("--settings", "settings_json", required=True, help="The run's settings as JSON.")
@click.option("--address", default=None, help="HOST:PORT of the server, by way of this worker's link.")
@click.option("--index", default=0, help="Which of the run's workers this is.")
def main(settings_json: str, address: str | None, index: int) -> None:
    """Load what is needed, then train."""
    torch.set_num_threads(1)
    settings = DemoSettings.from_json(settings_json)
    corpus = load_corpus()
    if address is None:
        train_alone(settings, corpus)
    else:
        train_together(address, index, settings, corpus)


if __name__ == "__main__":
    main()
