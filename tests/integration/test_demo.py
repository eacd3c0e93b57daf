"""The command `paceline demo` as a user runs it: real processes, real sockets, real data; only shorter."""

import contextlib
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = [sys.executable, "-m", "paceline", "demo", "--workers", "2"]


@pytest.mark.timeout(170)
def test_demo_trains_and_reports(tmp_path: Path) -> None:
    """Six seconds lower the loss; the report is one JSON object with figures that fit together, and a plot."""
    plot = tmp_path / "loss.png"
    done = subprocess.run(
        [*COMMAND, "--seconds", "6", "--json", "--plot", str(plot)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["workers"] == 2
    assert report["loss_end"] < report["loss_start"]
    assert report["loss_single"] < report["loss_start"]
    assert report["rounds"] >= 4
    assert report["rounds"] * report["num_parameters"] * 4 == report["bytes_fp32"]
    assert 0 < report["bytes_up"] < report["bytes_fp32"] / 6, "int4 is an eighth of fp32, and a little more"
    assert report["bytes_down"] > 0
    assert report["bytes_up"] <= report["link_bytes_up"]
    assert 0 <= report["stalled_seconds"] <= 2 * report["wall_seconds"]
    assert report["wall_seconds"] >= 6
    assert plot.read_bytes().startswith(b"\x89PNG\r\n")


@pytest.mark.timeout(170)
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds child processes by way of /proc")
def test_an_interrupted_demo_leaves_no_process(tmp_path: Path) -> None:
    """Ctrl-C in the middle ends the server, the links and the workers, too, before the command is gone."""
    arguments = ["--seconds", "600", "--no-single", "--plot", str(tmp_path / "loss.png")]
    with subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as demo:
        try:
            assert demo.stdout is not None
            assert any("train together" in line for line in demo.stdout), "the demo ended before its workers were ready"
            children = children_of(demo.pid)
            assert len(children) == 4, "a server, the links and two workers"
            demo.send_signal(signal.SIGINT)
            demo.stdout.read()
            assert demo.wait() != 0
            assert [pid for pid in children if Path(f"/proc/{pid}").exists()] == []
        finally:
            demo.kill()


def children_of(parent: int) -> list[int]:
    """List the processes that a process has started and that are still there."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended while we looked
            after_the_name = stat.read_text().rpartition(")")[2].split()
            if int(after_the_name[1]) == parent:
                found.append(int(stat.parent.name))
    return found
