"""What starts servers and workers outside of containers: the systemd unit, and the launchers' script."""

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from paceline_server.config_fields import config_fields
from paceline_server.readiness import tell_ready

ROOT = Path(__file__).resolve().parents[2]
UNIT = ROOT / "deploy" / "systemd" / "paceline@.service"
WORKER_UNIT = UNIT.with_name("paceline-worker@.service")
WORKER = ROOT / "deploy" / "worker.sh"

EXPOSURE = 20
"""Tenths of the points of `systemd-analyze security`, which begin at 96 for a unit that says nothing."""

WORKER_EXPOSURE = 40
"""A worker's, which needs the GPUs and may be a user's own script."""


def settings(name: str) -> list[str]:
    """All values that the unit gives a setting."""
    return re.findall(rf"^{name}=(.*)$", UNIT.read_text(), re.MULTILINE)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
@pytest.mark.parametrize(("unit", "exposure"), [(UNIT, EXPOSURE), (WORKER_UNIT, WORKER_EXPOSURE)])
def test_systemd_accepts_the_units(unit: Path, exposure: int, tmp_path: Path) -> None:
    """The units are valid, and what they may do is little."""
    copy = tmp_path / unit.name
    copy.write_text(re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", unit.read_text(), flags=re.MULTILINE))
    for check in (["verify"], ["security", "--offline=true", f"--threshold={exposure}"]):
        command = ["systemd-analyze", *check, str(copy)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert str(copy) not in done.stderr


def test_the_units_variables_are_fields() -> None:
    """Every variable of Paceline's is a field, and every credential that one names is loaded."""
    variables = dict(value.split("=", 1) for value in settings("Environment"))
    of_paceline = {name for name in variables if name.startswith("PACELINE_")}
    assert of_paceline <= {field.variable for field in config_fields().values()}
    loaded = {value.partition(":")[0] for value in settings("LoadCredential")}
    assert {value.removeprefix("%d/") for value in variables.values() if value.startswith("%d/")} == loaded
    assert variables["PACELINE_STORAGE__DATA_DIR"] == f"%S/{settings('StateDirectory')[0]}"


@pytest.mark.parametrize("abstract", [False, True])
def test_readiness_is_told(abstract: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The socket hears READY=1, whichever kind of socket it is."""
    name = f"@paceline-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind("\0" + name[1:] if abstract else name)
        listener.settimeout(10)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        tell_ready()
        assert listener.recv(100) == b"READY=1"


def test_nobody_waits_for_readiness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without systemd nothing is told, and a socket that is gone does no harm."""
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    tell_ready()
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    tell_ready()


@pytest.mark.parametrize("script", [WORKER, *(ROOT / "deploy" / "slurm").glob("*.sbatch")], ids=lambda path: path.name)
def test_shells_accept_the_scripts(script: Path) -> None:
    """The shell that a script names parses it."""
    shell = script.read_text().splitlines()[0].removeprefix("#!")
    done = subprocess.run([shell, "-n", str(script)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_slurms_workers_get_their_names(tmp_path: Path) -> None:
    """The batch script starts the workers by the launchers' script, with the name and the files that are set."""
    srun = tmp_path / "srun"
    srun.write_text('#!/bin/sh\nshift\nexec "$@"\n')
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ncat "$PACELINE_TOKEN_FILE"; echo "$@"\n')
    for path in (srun, python):
        path.chmod(0o755)
    (tmp_path / "token").write_text("secret\n")
    environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SITE": "a", "TOKEN_FILE": str(tmp_path / "token")}
    environ |= {"SERVER": "ps:7070", "TLS_CA": "ca.pem", "TRAIN_SECONDS": "5", "SLURM_PROCID": "3"}
    batch = ["bash", "deploy/slurm/workers.sbatch"]
    done = subprocess.run(batch, capture_output=True, text=True, check=False, env=environ, cwd=ROOT)
    expected = "secret\nexamples/train.py --address ps:7070 --tls-ca ca.pem --seconds 5 --worker-id a.3\n"
    assert (done.stdout, done.stderr) == (expected, "")


def launched(**environ: str) -> "subprocess.CompletedProcess[str]":
    """Start a command by the launchers' script, which prints where it would read its token, and its arguments."""
    script = "import os, sys; print(os.environ.get('PACELINE_TOKEN_FILE'), *sys.argv[1:])"
    command = ["sh", str(WORKER), sys.executable, "-c", script, "--address", "a:7070"]
    env = {"PATH": os.environ["PATH"], **environ}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env)


@pytest.mark.parametrize(
    ("environ", "worker"),
    [
        ({}, "paris.0"),
        ({"INDEX": "7", "RANK": "1"}, "paris.7"),
        ({"JOB_COMPLETION_INDEX": "2"}, "paris.2"),
        ({"SLURM_PROCID": "3"}, "paris.3"),
        ({"RANK": "4", "WORLD_SIZE": "8"}, "paris.4"),
    ],
)
def test_launchers_name_their_workers(environ: dict[str, str], worker: str) -> None:
    """The worker's name is the credential's and the launcher's index."""
    done = launched(SITE="paris", **environ)
    assert done.stdout == f"None --address a:7070 --worker-id {worker}\n"


def test_the_token_stays_in_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker is told the file, wherever its script goes: a renewed token is taken, and no other one counts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PACELINE_TOKEN", raising=False)
    (tmp_path / "token").write_text("secret\n")
    assert launched(SITE="a", TOKEN_FILE=str(tmp_path / "token")).stdout.split()[0] == str(tmp_path / "token")
    script = "import os; os.chdir('/'); from paceline.channels import Access; print(*Access.of(None, None).metadata[0])"
    command = ["sh", str(WORKER), sys.executable, "-c", script]
    env = {**os.environ, "SITE": "a", "TOKEN_FILE": "token", "PACELINE_TOKEN": "another"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    assert done.stdout == "authorization Bearer secret\n"


@pytest.mark.parametrize("name", ["gone", "empty"])
def test_a_token_file_without_a_token_ends_it(name: str, tmp_path: Path) -> None:
    """The script says which file, before anything is started."""
    (tmp_path / "empty").touch()
    done = launched(SITE="a", TOKEN_FILE=str(tmp_path / name))
    assert done.returncode != 0
    assert str(tmp_path / name) in done.stderr


def test_a_worker_without_a_site_is_refused() -> None:
    """The script says what is missing."""
    done = launched()
    assert done.returncode != 0
    assert "SITE" in done.stderr
