"""What a demo came to: the figures, as a table, as JSON, and as a plot of loss against time."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from paceline.demo.state import DemoState, Point, WorkerState

FP32_BYTES = 4
"""Bytes of a parameter that isn't compressed."""
BUSY_SHARE = 0.1
"""When more steps than this overran their pace, the comparison tells of the machine rather than of training."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """The figures of one demo; `to_dict` gives them under these names. Losses are held-out, in nats per byte."""

    loss_start: float
    """Of the untrained model."""
    loss_end: float
    """Of the run's parameters, when all workers had flushed."""
    loss_single: float | None
    """Of the lone worker after the same training time; None without the comparison."""
    workers: int
    """How many trained together."""
    num_parameters: int
    """Of the model."""
    steps: int
    """Inner steps, summed over the workers."""
    steps_single: int | None
    """Inner steps of the lone worker."""
    rounds: int
    """Rounds pushed, summed over the workers."""
    bytes_up: int
    """What the workers sent, as they count it."""
    bytes_down: int
    """What they received."""
    bytes_fp32: int
    """What the same pushes would have been in fp32."""
    link_bytes_up: int
    """What crossed the emulated links to the server, counted by the links."""
    link_bytes_down: int
    """What crossed them the other way."""
    bytes_per_parameter_per_round_up: float
    """`bytes_up` over rounds and parameters; 4 in fp32."""
    bytes_per_parameter_per_round_down: float
    """Likewise, of `bytes_down`."""
    stalled_seconds: float
    """Time that training threads waited for the network while training, summed over the workers."""
    stalled_share: float
    """The same as a share of all workers' time."""
    flush_seconds: float
    """Time that workers waited at the end for their last pushes to be answered, summed."""
    lateness: float
    """Mean number of bins a push was late."""
    reconnects: int
    """Connections lost and resumed, all workers."""
    pushes_refused: int
    """Pushes that the server refused, all workers."""
    pace_overrun_share: float
    """Share of the workers' steps that took longer than their pace."""
    pace_overrun_share_single: float | None
    """The lone worker's."""
    seconds_to_single_loss: float | None
    """When the run had reached the loss that the lone worker ended with; None if it never did."""
    wall_seconds: float
    """From the word to start until the last worker had flushed."""

    @property
    def loss_fell(self) -> bool:
        """Whether the run learned anything; not a number counts as no."""
        return self.loss_end < self.loss_start

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON can carry them: what is no finite number is None."""
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in asdict(self).items()
        }


def summarize(state: DemoState) -> Report:
    """Compute the figures of a demo that has ended."""
    workers = state.workers
    rounds = sum(worker.rounds for worker in workers)
    pushed = max(1, rounds * state.num_parameters)
    bytes_up, bytes_down = sum(worker.bytes_up for worker in workers), sum(worker.bytes_down for worker in workers)
    stalled_s = sum(worker.stalled_s for worker in workers)
    single = state.single if state.single_curve else None
    loss_single = state.single_curve[-1].loss if state.single_curve else None
    return Report(
        loss_start=state.curve[0].loss,
        loss_end=state.curve[-1].loss,
        loss_single=loss_single,
        workers=len(workers),
        num_parameters=state.num_parameters,
        steps=sum(worker.steps for worker in workers),
        steps_single=single.steps if single else None,
        rounds=rounds,
        bytes_up=bytes_up,
        bytes_down=bytes_down,
        bytes_fp32=rounds * state.num_parameters * FP32_BYTES,
        link_bytes_up=state.link_bytes_up,
        link_bytes_down=state.link_bytes_down,
        bytes_per_parameter_per_round_up=bytes_up / pushed,
        bytes_per_parameter_per_round_down=bytes_down / pushed,
        stalled_seconds=stalled_s,
        stalled_share=stalled_s / max(1e-9, len(workers) * state.training_s),
        flush_seconds=sum(worker.flush_s for worker in workers),
        lateness=sum(worker.lateness * worker.rounds for worker in workers) / max(1, rounds),
        reconnects=sum(worker.reconnects for worker in workers),
        pushes_refused=sum(worker.pushes_refused for worker in workers),
        pace_overrun_share=_overrun_share(workers),
        pace_overrun_share_single=_overrun_share([single]) if single else None,
        seconds_to_single_loss=None if loss_single is None else _first_at_most(state.curve, loss_single),
        wall_seconds=state.training_s,
    )


def report_table(report: Report) -> Table:
    """Lay the figures out for a reader."""
    table = Table(title="What it came to", show_header=False, title_justify="left")
    table.add_row("held-out loss at the start", f"{report.loss_start:.3f} nats per byte")
    table.add_row(f"held-out loss at the end, {report.workers} workers", f"{report.loss_end:.3f}")
    if report.loss_single is not None:
        table.add_row("the lone worker's after the same time", f"{report.loss_single:.3f}")
    steps = f"{report.steps:,}" + (f" (alone {report.steps_single:,})" if report.steps_single is not None else "")
    table.add_row("inner steps, all workers", steps)
    table.add_row("rounds, all workers", f"{report.rounds:,}")
    up, down = report.bytes_per_parameter_per_round_up, report.bytes_per_parameter_per_round_down
    table.add_row("bytes per parameter and round", f"{up:.2f} up, {down:.2f} down (fp32: {FP32_BYTES} each way)")
    fp32_mb = report.bytes_fp32 / 1e6
    table.add_row("bytes up", f"{report.bytes_up / 1e6:.1f} MB (in fp32 {fp32_mb:.1f} MB)")
    table.add_row("bytes down", f"{report.bytes_down / 1e6:.1f} MB (in fp32 {fp32_mb:.1f} MB)")
    table.add_row(
        "waited for the network", f"{report.stalled_seconds:.2f} s in all ({report.stalled_share:.1%} of the time)"
    )
    table.add_row("lateness", f"{report.lateness:.2f} bins on average")
    if report.reconnects or report.pushes_refused:
        table.add_row("lost connections, refused pushes", f"{report.reconnects}, {report.pushes_refused}")
    alone = report.pace_overrun_share_single
    overran = f"{report.pace_overrun_share:.1%}" + (f" (alone {alone:.1%})" if alone is not None else "")
    table.add_row("steps that overran their pace", overran)
    return table


def verdict(report: Report) -> str:
    """Say in a few sentences whether working together was worth it, and whether the machine sufficed to tell."""
    sentences = [_comparison(report)]
    if report.pace_overrun_share > BUSY_SHARE:
        sentences.append(
            f"The machine was too busy or too small: {report.pace_overrun_share:.0%} of the workers' steps overran "
            "their pace, and that time is lost to them."
        )
    return " ".join(sentences)


def save_plot(state: DemoState, path: Path) -> None:
    """Draw the loss of the run and of the lone worker against training time, as PNG."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    settings = state.settings
    together = f"{len(state.workers)} workers, {settings.delay_ms:g} ms and {settings.rate_mbit:g} Mbit/s away"
    axes.plot(*zip(*state.curve, strict=True), marker=".", label=together)
    if state.single_curve:
        axes.plot(*zip(*state.single_curve, strict=True), marker=".", linestyle="--", label="the lone worker")
    axes.set_xlabel("training time, s")
    axes.set_ylabel("held-out loss, nats per byte")
    axes.set_title("Python's standard library, byte by byte", loc="left")
    later = [point.loss for point in (*state.curve, *state.single_curve) if point.elapsed_s > settings.seconds / 10]
    if later and math.isfinite(highest := max(later)):
        # The untrained model is left above the picture, or it would flatten everything else.
        axes.set_ylim(top=highest + 0.1 * (highest - min(later)) + 0.01)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, format="png", dpi=150)


def _comparison(report: Report) -> str:
    if not report.loss_fell:
        return f"The loss did not fall: {report.loss_start:.3f} at the start, {report.loss_end:.3f} at the end."
    if report.loss_single is None:
        return f"{report.workers} workers brought the loss from {report.loss_start:.3f} to {report.loss_end:.3f}."
    gap = report.loss_single - report.loss_end
    if gap <= 0:
        return f"Working together did not pay: the lone worker ended {-gap:.3f} nats per byte lower."
    sentence = f"{report.workers} workers ended {gap:.3f} nats per byte below the lone worker"
    if report.seconds_to_single_loss is not None:
        sentence += f", whose last loss they had reached after {report.seconds_to_single_loss:.0f} s"
    return sentence + "."


def _overrun_share(workers: list[WorkerState]) -> float:
    return sum(worker.overruns for worker in workers) / max(1, sum(worker.steps for worker in workers))


def _first_at_most(curve: list[Point], loss: float) -> float | None:
    return next((point.elapsed_s for point in curve if point.loss <= loss), None)
