"""The demo's figures, from reports with known numbers."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from paceline.demo.report import report_table, save_plot, summarize, verdict
from paceline.demo.settings import DemoSettings
from paceline.demo.state import DemoState, Point, WorkerState
from paceline.demo.view import PlainLines


@pytest.fixture
def state() -> DemoState:
    """Two workers of a model with 1000 parameters, and a lone one that ended higher."""
    trouble = {"reconnects": 1, "pushes_refused": 0}
    fast = {"rounds": 30, "bytes_up": 15_000, "bytes_down": 60_000, "stalled_s": 0.5, "lateness": 0.5, **trouble}
    slow = {"rounds": 10, "bytes_up": 5_000, "bytes_down": 20_000, "stalled_s": 0.0, "lateness": 2.5, **trouble}
    workers = [WorkerState(), WorkerState(slowness=4.0)]
    workers[0].update(
        {"event": "progress", "elapsed_s": 20.0, "steps": 600, "overruns": 8, "train_loss": 2.0, "stats": fast}
    )
    workers[1].update({"event": "progress", "elapsed_s": 20.0, "steps": 200, "overruns": 0, "stats": slow})
    flushed = {**slow, "stalled_s": 0.25}  # the wait of the flush, which is no stall
    workers[1].update(
        {"event": "done", "elapsed_s": 20.0, "steps": 200, "overruns": 0, "stats": flushed, "flush_s": 0.25}
    )
    single = WorkerState()
    single.update({"event": "done", "elapsed_s": 20.0, "steps": 700, "overruns": 7, "train_loss": 2.5})
    return DemoState(
        settings=DemoSettings(workers=2),
        num_parameters=1000,
        workers=workers,
        single=single,
        curve=[Point(0.0, 5.5), Point(10.0, 3.0), Point(20.0, 2.25)],
        single_curve=[Point(0.0, 5.5), Point(20.0, 2.75)],
        training_s=25.0,
        link_bytes_up=21_000,
        link_bytes_down=82_000,
    )


def test_figures_are_sums_and_means_over_workers(state: DemoState) -> None:
    """Counts are summed, lateness is the mean over pushes, shares are of all steps and all workers' time."""
    expected = {
        "loss_start": 5.5,
        "loss_end": 2.25,
        "loss_single": 2.75,
        "workers": 2,
        "num_parameters": 1000,
        "steps": 800,
        "steps_single": 700,
        "rounds": 40,
        "bytes_up": 20_000,
        "bytes_down": 80_000,
        "bytes_fp32": 160_000,
        "link_bytes_up": 21_000,
        "link_bytes_down": 82_000,
        "bytes_per_parameter_per_round_up": 0.5,
        "bytes_per_parameter_per_round_down": 2.0,
        "stalled_seconds": 0.5,
        "stalled_share": 0.01,
        "flush_seconds": 0.25,
        "lateness": 1.0,
        "reconnects": 2,
        "pushes_refused": 0,
        "pace_overrun_share": 0.01,
        "pace_overrun_share_single": 0.01,
        "seconds_to_single_loss": 20.0,
        "wall_seconds": 25.0,
    }
    assert expected == json.loads(json.dumps(summarize(state).to_dict()))


def test_without_the_comparison_its_figures_are_absent(state: DemoState) -> None:
    """Nothing is made up for a lone worker that didn't run."""
    state.single_curve.clear()
    report = summarize(state)
    assert (
        report.loss_single,
        report.steps_single,
        report.pace_overrun_share_single,
        report.seconds_to_single_loss,
    ) == (None, None, None, None)
    assert verdict(report) == "2 workers brought the loss from 5.500 to 2.250."


def test_the_verdict_says_what_is_so(state: DemoState) -> None:
    """The sentence follows the numbers, in whichever direction they point."""
    assert "2 workers ended 0.500 nats per byte below the lone worker" in verdict(summarize(state))
    state.single_curve[-1] = Point(20.0, 2.0)
    assert "the lone worker ended 0.250 nats per byte lower" in verdict(summarize(state))
    state.curve[-1] = Point(20.0, 6.0)
    assert "did not fall" in verdict(summarize(state))


def test_a_busy_machine_is_not_passed_over(state: DemoState) -> None:
    """When many steps overran their pace, the verdict says that the comparison suffers from it."""
    assert "too busy" not in verdict(summarize(state))
    state.workers[0].overruns = 200
    assert "25% of the workers' steps overran" in verdict(summarize(state))


def test_a_loss_that_is_no_number_has_not_fallen(state: DemoState) -> None:
    """A run that diverged doesn't pass for one that learned, and its report is still JSON."""
    state.curve[-1] = Point(20.0, float("nan"))
    report = summarize(state)
    assert not report.loss_fell
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["loss_end"] is None


def test_the_table_shows_the_figures(state: DemoState) -> None:
    """Each figure that a reader is promised appears in the printed table."""
    console = Console(width=100, record=True, quiet=False, file=None)
    with console.capture() as capture:
        console.print(report_table(summarize(state)))
    for figure in (
        "5.500",
        "2.250",
        "2.750",
        "40",
        "0.50 up, 2.00 down",
        "0.50 s in all (1.0%",
        "1.00 bins",
        "2, 0",
        "1.0%",
    ):
        assert figure in capture.get()


def test_the_plot_is_a_png(state: DemoState, tmp_path: Path) -> None:
    """Both curves are drawn into a PNG file, with or without the lone worker's."""
    for name in ("both.png", "one.png"):
        save_plot(state, tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG\r\n")
        state.single_curve.clear()


def test_plain_lines_come_once(state: DemoState) -> None:
    """Away from a terminal, each phase and each evaluation is a line of its own, and none is repeated."""
    console = Console(width=100)
    lines = PlainLines(state, console)
    with console.capture() as first:
        lines.print_news()
        lines.print_news()
    state.curve.append(Point(25.0, 2.125))
    with console.capture() as second:
        lines.print_news()
    assert len(first.get().splitlines()) == 1 + 3 + 2
    assert second.get().splitlines() == ["  25.0 s: 2.125  rounds 40  stalled 0.50 s"]


def test_settings_survive_the_way_to_a_child() -> None:
    """A child process reads exactly the settings that it was given."""
    settings = DemoSettings(workers=3, seconds=1.5, seed=7, delay_ms=12.5)
    assert settings == DemoSettings.from_json(settings.to_json())
