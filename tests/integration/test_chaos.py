"""Chaos in small: every fault happens and is survived, nothing is lost; and what is lost is told."""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from integration.killable import KillableServer
from paceline_chaos.plan import Kind

LONGEST_S = 170
FOREIGN = ("--outer.momentum", "0.9", "--schedule.quota", "4", "--exchange.fragment-elements", "20480")

pytestmark = pytest.mark.timeout(200)


def chaos(*arguments: str, code: int = 0) -> "subprocess.CompletedProcess[str]":
    """Run the command."""
    command = [sys.executable, "-m", "paceline_chaos", *arguments]
    found = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST_S, check=False)
    assert found.returncode == code, found.stdout + found.stderr
    return found


def outcome_of(*arguments: str, code: int = 0) -> dict[str, Any]:
    """Run the command and return what it reports."""
    outcome: dict[str, Any] = json.loads(chaos(*arguments, "--json", code=code).stdout)
    return outcome


def test_everything_that_goes_wrong_is_survived(tmp_path: Path) -> None:
    """Three kills of the server and twelve other faults: each kind fires, every acknowledged push is found."""
    kinds = [kind.value for kind in Kind if kind is not Kind.FULL_DISK]
    report = tmp_path / "reliability.md"
    bounds = ("--seed", "7", "--kills", "3", "--faults", "12", "--workers", "4", "--kinds", ",".join(kinds))
    outcome = outcome_of(*bounds, "--report", str(report))
    assert outcome["held"]
    assert {kind: count["survived"] for kind, count in outcome["faults"].items()} == {
        kind: count["fired"] for kind, count in outcome["faults"].items()
    }
    assert all(outcome["faults"][kind]["fired"] >= 1 for kind in kinds)
    assert outcome["faults"]["server-kill"]["fired"] == 3
    assert outcome["looks"] == 4
    assert 0 < outcome["pushes"]["acknowledged"] == outcome["pushes"]["found"]
    assert outcome["pushes"]["distance"] < 2e-5
    assert "| server-kill | " in report.read_text()


class CommandedServer:
    """A user's own deployment: a server that shell commands kill and start.

    Args:
        folder: Where its files are.
        flags: Of `serve`.
    """

    def __init__(self, folder: Path, *flags: str) -> None:
        with KillableServer(folder / "probe", *flags) as probe:
            self.address = probe.address
        self.data_dir = folder / "data"
        self.pid = folder / "pid"
        serve = [sys.executable, "-m", "paceline", "serve", "--listen", self.address]
        serve += ["--storage.data-dir", str(self.data_dir), *flags]
        log = shlex.quote(str(folder / "log"))
        self.start = f"setsid {shlex.join(serve)} >> {log} 2>&1 < /dev/null & echo $! > {self.pid}"
        self.kill = f"kill -9 $(cat {self.pid}); while kill -0 $(cat {self.pid}) 2>/dev/null; do sleep 0.05; done"

    def __enter__(self) -> "CommandedServer":
        subprocess.run(["/bin/sh", "-c", self.start], check=True)
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run(["/bin/sh", "-c", self.kill], check=False)

    def arguments(self) -> tuple[str, ...]:
        """What the command is told of it."""
        return ("--address", self.address, "--kill-command", self.kill, "--start-command", self.start)


def test_a_deployment_of_ones_own(tmp_path: Path) -> None:
    """Killed by the user's commands and reached through faulty links, a run equals the closed form of what it took.

    Asked again, chaos refuses the run, since it does not know its first pushes.
    """
    bounds = ("--kills", "2", "--faults", "4", "--workers", "2", "--kinds", "server-kill,worker-kill,cut,corrupt")
    with CommandedServer(tmp_path, *FOREIGN) as server:
        outcome = outcome_of(*server.arguments(), *bounds)
        assert outcome["held"]
        assert outcome["faults"]["server-kill"]["survived"] == 2
        assert outcome["pushes"]["acknowledged"] > 0
        assert outcome["pushes"]["distance"] < 2e-5
        refused = chaos(*server.arguments(), *bounds, code=2)
        assert "give it a run of its own" in refused.stderr


def test_a_server_that_forgets_is_found_out(tmp_path: Path) -> None:
    """A deployment whose start begins anew has lost what it acknowledged: exit code 1, and a sentence."""
    with CommandedServer(tmp_path, *FOREIGN) as server:
        server.start = f"rm -rf {shlex.quote(str(server.data_dir))}; {server.start}"
        bounds = ("--kills", "1", "--faults", "0", "--workers", "2", "--kinds", "server-kill")
        outcome = outcome_of(*server.arguments(), *bounds, code=1)
        assert not outcome["held"]
        assert outcome["lost"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--kinds", "earthquake"), "'earthquake' is no fault"),
        (("--kill-command", "true"), "belong together"),
        (("--kill-command", "true", "--start-command", "true"), "give its --address"),
        (
            ("--address", "127.0.0.1:1", "--kinds", "server-stop"),
            "cannot be done to a server that was not started here",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: tuple[str, ...], sentence: str) -> None:
    """Wrong usage is told before anything starts; exit code 2."""
    assert sentence in chaos(*arguments, code=2).stderr
