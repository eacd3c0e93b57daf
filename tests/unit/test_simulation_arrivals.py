"""Recorded orders of arrival, and the command that simulates."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from paceline_simulator import Arrival, Simulation, WorkerSpec, command, read_arrivals
from paceline_wire.errors import InvalidInputError
from support_simulation import QuadraticTask, server_config


def write(path: Path, arrivals: list[Arrival]) -> Path:
    """Write arrivals as a server does."""
    path.write_text("".join(json.dumps(vars(arrival)) + "\n" for arrival in arrivals))
    return path


def specs(first_s: float) -> list[WorkerSpec]:
    """Three workers, the first at a speed of its own."""
    return [WorkerSpec(step_s=step_s, delay_s=0.1, name=name) for step_s, name in zip((first_s, 1, 1.3), "abc")]  # noqa: B905  # a string


def test_arrivals_are_read_as_they_were_written(tmp_path: Path) -> None:
    """A file holds what a simulation recorded."""
    recorded = Simulation(server_config(), QuadraticTask(3), specs(0.7)).run(until_s=30.0).arrivals
    assert read_arrivals(write(tmp_path / "arrivals", list(recorded))) == list(recorded)


def test_pushes_are_held_back_until_their_turn() -> None:
    """Workers at other speeds, with incarnations that are times, let in as recorded: the same blocking run."""
    config = server_config("async", schedule={"quota": 3}, exchange={"window": 1})

    def simulation(first_s: float, order: list[Arrival] | None) -> Simulation:
        return Simulation(config, QuadraticTask(3, rate=0.0, drift=0.5), specs(first_s), arrival_order=order)

    recorded = simulation(0.2, None).run(until_rounds=8)
    times = [Arrival(**{**vars(arrival), "incarnation": 1_700_000_000}) for arrival in recorded.arrivals]
    again = simulation(1.9, times).run(until_rounds=8)
    order = [(arrival.worker, arrival.seq) for arrival in recorded.arrivals]
    assert [(arrival.worker, arrival.seq) for arrival in again.arrivals] == order
    assert [arrival.time_s for arrival in again.arrivals] == [arrival.time_s for arrival in recorded.arrivals]
    assert order != sorted(order, key=lambda key: key[1])


def test_what_a_record_does_not_have_comes_after_it() -> None:
    """A record of the first pushes imposes their order; the run goes on by itself."""
    recorded = Simulation(server_config(), QuadraticTask(3), specs(0.7)).run(until_s=10.0).arrivals
    result = Simulation(server_config(), QuadraticTask(3), specs(1.9), arrival_order=recorded[:4]).run(until_s=40.0)
    keys = [(arrival.worker, arrival.seq) for arrival in result.arrivals]
    assert keys[:4] == [(arrival.worker, arrival.seq) for arrival in recorded[:4]]
    assert len(keys) > 8


@pytest.mark.parametrize(
    "line",
    [
        *(b"no json", b"[]", b'{"time_s": 1}', b'{"time_s": null}', b"\xff", b"[" * 100_000),
        b'{"time_s": 1, "fragment": 1e999, "worker": "a", "incarnation": 1, "seq": 1, "base_bin": 0, "outcome": ""}',
    ],
)
def test_a_line_that_is_no_arrival_is_named(line: bytes, tmp_path: Path) -> None:
    """The text says which line it is."""
    path = write(tmp_path / "arrivals", [])
    path.write_bytes(line + b"\n")
    with pytest.raises(InvalidInputError, match="line 1 of"):
        read_arrivals(path)


# --- paceline simulate


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look at the parameters only at the beginning and the end."""
    monkeypatch.setattr(command, "PROGRESS_LINES", 1)
    monkeypatch.setattr(torch, "set_num_threads", lambda _number: None)


@pytest.mark.usefixtures("quickly")
def test_the_command_prints_one_json_object() -> None:
    """Everything that the table has, and the curve; progress goes elsewhere."""
    arguments = "--workers 2 --seconds 0.7 --delay-ms 10 --exchange.inner-steps 5 --slowness 1,2 --absence 1:0.3::leave"
    outcome = CliRunner().invoke(command.simulate, [*arguments.split(), "--json"])
    assert outcome.exit_code == 0, outcome.output
    report = json.loads(outcome.stdout)
    assert [worker["name"] for worker in report["workers"]] == ["worker-0", "worker-1"]
    assert report["workers"][0]["rounds"] == 5
    assert report["evaluations"][-1]["metrics"]["loss"] < report["evaluations"][0]["metrics"]["loss"]
    assert "held-out loss" in outcome.stderr


@pytest.mark.usefixtures("quickly")
def test_the_command_replays_a_record(tmp_path: Path) -> None:
    """The workers are those of the record; a table says what each did."""
    arrival = Arrival(time_s=0.1, fragment=0, worker="x", incarnation=9, seq=1, base_bin=0, outcome="applied")
    path = write(tmp_path / "arrivals", [arrival])
    arguments = ["--replay", str(path), "--seconds", "0.21", "--exchange.inner-steps", "2", "--delay-ms", "0"]
    outcome = CliRunner().invoke(command.simulate, arguments)
    assert outcome.exit_code == 0, outcome.output
    assert outcome.stdout.splitlines()[3].split()[:3] == ["x", "4", "8"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--absence", "4:1:2:leave"],
        ["--absence", "0:1:2:hide"],
        ["--absence", "0:2:1:leave"],
        ["--absence", "0"],
        ["--slowness", "1,fast"],
        ["--slowness", "0"],
    ],
)
def test_wrong_usage_is_said(arguments: list[str]) -> None:
    """A wrong option ends the command with its name and exit code 2."""
    outcome = CliRunner().invoke(command.simulate, arguments)
    assert outcome.exit_code == 2
    assert arguments[0] in outcome.output
