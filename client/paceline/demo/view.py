"""Showing a demo while it runs: a live table on a terminal, plain lines anywhere else."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from paceline.demo.state import DemoState, Point

POINTS_SHOWN = 6
"""Evaluations that the live view lists, the newest last."""


@contextmanager
def showing(state: DemoState, console: Console) -> Iterator[Callable[[], None]]:
    """Show the state for as long as the context lasts.

    Args:
        state: What to show, while others change it.
        console: Where.

    Yields:
        What to call after a change.
    """
    if console.is_terminal:
        with Live(get_renderable=lambda: _picture(state), console=console, refresh_per_second=4) as live:
            yield lambda: None
            live.refresh()
    else:
        yield PlainLines(state, console).print_news


class PlainLines:
    """Prints a line for every phase and every evaluation, for logs and pipes."""

    def __init__(self, state: DemoState, console: Console) -> None:
        self._state = state
        self._console = console
        self._phase = ""
        self._num_shown = 0
        self._num_single_shown = 0

    def print_news(self) -> None:
        """Print what has been added since the last call."""
        state = self._state
        if state.phase != self._phase:
            self._phase = state.phase
            self._line(f"{state.phase} ...")
        for point in state.curve[self._num_shown :]:
            rounds = sum(worker.rounds for worker in state.workers)
            stalled_s = sum(worker.stalled_s for worker in state.workers)
            self._line(f"  {_text_of(point)}  rounds {rounds}  stalled {stalled_s:.2f} s")
        self._num_shown = len(state.curve)
        for point in state.single_curve[self._num_single_shown :]:
            self._line(f"  {_text_of(point)}  alone")
        self._num_single_shown = len(state.single_curve)

    def _line(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True)


def _picture(state: DemoState) -> Group:
    table = Table(title=f"paceline demo: {state.phase}", title_justify="left")
    for heading in ("worker", "step", "time", "steps", "train loss", "rounds", "stalled", "late", "up", "down"):
        table.add_column(heading, justify="right")
    rows = [(str(index), worker) for index, worker in enumerate(state.workers)]
    if state.single_curve:
        rows.append(("alone", state.single))
    for name, worker in rows:
        table.add_row(
            name,
            f"{state.settings.step_s * worker.slowness * 1e3:.0f} ms",
            f"{worker.elapsed_s:.0f} s",
            f"{worker.steps}",
            "" if worker.train_loss is None else f"{worker.train_loss:.3f}",
            *(
                ("", "", "", "", "")
                if worker is state.single
                else (
                    f"{worker.rounds}",
                    f"{worker.stalled_s:.2f} s",
                    f"{worker.lateness:.2f}",
                    f"{worker.bytes_up / 1e6:.1f} MB",
                    f"{worker.bytes_down / 1e6:.1f} MB",
                )
            ),
        )
    lines = [Text("held-out loss  " + _curve_text(state.curve))]
    if state.single_curve:
        lines.append(Text("lone worker's  " + _curve_text(state.single_curve)))
    return Group(table, *lines)


def _curve_text(curve: list[Point]) -> str:
    return "   ".join(_text_of(point) for point in curve[-POINTS_SHOWN:])


def _text_of(point: Point) -> str:
    return f"{point.elapsed_s:.1f} s: {point.loss:.3f}"
