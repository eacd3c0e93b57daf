"""The examples, and the commands of README.md and docs/deploy.md, as a reader runs them: against real servers."""

import math
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import safetensors.torch
import torch
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

import paceline_server
from integration.patience import wait_until

ROOT = Path(__file__).resolve().parents[2]
SHORT_ROUNDS: Mapping[str, Any] = {"exchange": {"inner_steps": 5, "dynamic_inner_steps": False}}


def example(name: str, address: str, *arguments: str, token: str = "") -> "subprocess.Popen[str]":
    """Start an example as a reader would."""
    return subprocess.Popen(
        [sys.executable, ROOT / "examples" / name, "--address", address, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment() | ({"PACELINE_TOKEN": token} if token else {}),
    )


def environment() -> dict[str, str]:
    """This environment without settings of Paceline's own."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PACELINE_")}


def output_of(process: "subprocess.Popen[str]", timeout_s: float = 90) -> str:
    """Return what a process prints, once it has ended well."""
    try:
        out, err = process.communicate(timeout=timeout_s)
    finally:
        process.kill()
    assert process.returncode == 0, err
    return out


def numbers(pattern: str, text: str) -> list[float]:
    """Return all numbers that stand where the pattern has its group."""
    return [float(found.replace(",", "")) for found in re.findall(pattern, text)]


def test_two_workers_train_together() -> None:
    """Two train.py processes share a run that asks for a token; whichever comes first starts from nothing."""
    config = {**SHORT_ROUNDS, "security": {"tokens": ["secret"]}}
    with paceline_server.local(config) as address:
        workers = [example("train.py", address, "--seconds", "4", token="secret") for _ in range(2)]
        outputs = [output_of(worker) for worker in workers]
    losses = [numbers(r"held-out loss ([\d.]+) nats", output) for output in outputs]
    assert set(numbers(r"worker (\d+):", "".join(outputs))) <= {0, 1}
    assert max(first for first, _ in losses) > 5.4, "close to log(256)"
    assert all(last < 4 for _, last in losses)
    assert all(rounds >= 1 for rounds in numbers(r"after (\d+) rounds", "".join(outputs)))


def test_a_killed_worker_resumes(tmp_path: Path) -> None:
    """resume.py, killed on its way and started again, goes on at its checkpoint and reaches the end."""
    checkpoint = tmp_path / "worker.pt"
    with paceline_server.local(SHORT_ROUNDS) as address:
        arguments = ("--checkpoint", str(checkpoint), "--save-every", "3", "--steps")
        first = example("resume.py", address, *arguments, "1000000")
        try:
            wait_until(checkpoint.exists)
        finally:
            first.kill()
        assert "step 0, round 0" in first.communicate()[0]
        step = torch.load(checkpoint, weights_only=True)["step"]
        output = output_of(example("resume.py", address, *arguments, str(step + 10)))
    assert numbers(r"step (\d+)", output) == [step, step + 10]
    assert numbers(r"round (\d+)", output) == [step // 5]


def test_federated_averaging() -> None:
    """Rounds of three clients lower the mean loss over everybody's held-out text."""
    config = {
        "outer": {"rule": "sgd", "lr": 1},
        "schedule": {"kind": "barrier", "quota": 3},
        "exchange": {"uplink": "int8"},
    }
    with paceline_server.local(config) as address:
        arguments = ("--clients", "3", "--rounds", "3", "--steps", "10")
        output = output_of(example("federated.py", address, *arguments))
    losses = numbers(r"loss ([\d.]+) nats", output)
    assert len(losses) == 4
    assert losses[-1] < losses[0] - 1


def test_skipped_steps_do_not_count() -> None:
    """With accumulation, groups and a scaler whose first scale overflows, rounds are made of the steps really taken."""
    with paceline_server.local(SHORT_ROUNDS) as address:
        arguments = ("--steps", "32", "--accumulate", "2", "--first-scale", "1e8")
        output = output_of(example("gradient_accumulation_amp.py", address, *arguments))
    (taken,), (skipped,) = numbers(r"(\d+) steps taken", output), numbers(r"(\d+) skipped", output)
    assert skipped >= 1
    assert taken + skipped == 32
    assert [math.ceil(taken / 5)] == numbers(r"(\d+) rounds", output), "the last one is what was left when it flushed"
    (first,), (last,) = numbers(r"loss ([\d.]+) at the start", output), numbers(r"([\d.]+) at the end", output)
    assert last < first


@pytest.mark.skipif(os.name != "posix", reason="the quickstart is for POSIX shells")
def test_the_readmes_quickstart(tmp_path: Path) -> None:
    """The README's commands work as they stand, in a shell; only the port and the training time are others here."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Quickstart")[2]
    commands = section.partition("```sh\n")[2].partition("```")[0]
    address = free_address()
    script = commands[commands.index("paceline serve") :].replace("127.0.0.1:7070", address)
    script = script.replace("serve", f"serve --listen {address}").replace("train.py", "train.py --seconds 2")
    assert script.count(f"train.py --seconds 2 --address {address}") == 2
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    with (tmp_path / "output").open("w+", encoding="utf-8") as output:
        shell = subprocess.Popen(
            ["/bin/sh", "-ec", script],
            cwd=tmp_path,
            env=environment() | {"PATH": path},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = shell.wait(120)
        finally:
            os.killpg(shell.pid, signal.SIGTERM)
        output.seek(0)
        text = output.read()
    assert code == 0, text
    assert len(numbers(r"after (\d+) rounds", text)) >= 1
    assert "shard 0: 1 fragments, 303,744 elements" in text
    assert "wrote 5 tensors with 303,744 elements" in text
    assert safetensors.torch.load_file(tmp_path / "model.safetensors")["0.weight"].shape == (256, 32)


def test_the_credentials_of_the_deployment_page(tmp_path: Path) -> None:
    """What docs/deploy.md makes lets a worker in that has the authority and its token, and the container's probe."""
    page = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    made = re.search(r"^    paceline (certs make .*)$", page, re.MULTILINE)
    assert made is not None
    command = [sys.executable, "-m", "paceline", *shlex.split(made[1]), "--server", "127.0.0.1"]
    subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, check=True)
    files = tmp_path / "certs" / "server"
    security = {"tls_cert": files / "server.pem", "tls_key": files / "server.key", "token_key": files / "token.pub"}
    config = {**SHORT_ROUNDS, "security": {name: str(path) for name, path in security.items()}}
    token = (tmp_path / "certs" / "workers" / "paris" / "token").read_text(encoding="utf-8").strip()
    with paceline_server.local(config) as address:
        arguments = ("--steps", "8", "--tls-ca", str(files / "ca.pem"))
        output_of(example("gradient_accumulation_amp.py", address, *arguments, token=token))
        stranger = example("gradient_accumulation_amp.py", address, *arguments, token="wrong")
        assert "UnauthenticatedError" in stranger.communicate(timeout=90)[1]
        assert probe(address, files / "ca.pem") == (0, "")
        code, reason = probe(address, None)
        assert code == 1
        assert "does not answer" in reason
    code, reason = probe(address, files / "ca.pem")
    assert code == 1
    assert "does not answer" in reason


def probe(address: str, ca: Path | None, *arguments: str) -> tuple[int, str]:
    """Run the container's health check; its exit code and what it says."""
    variables = {"HEALTHCHECK_ADDRESS": address} | ({"HEALTHCHECK_CA": str(ca)} if ca is not None else {})
    command = [sys.executable, str(ROOT / "deploy" / "healthcheck.py"), *arguments]
    done = subprocess.run(command, env=environment() | variables, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


def test_a_shard_that_drains_is_alive_and_does_not_serve() -> None:
    """The liveness probe must not end a shard that answers only that it takes nothing any more."""
    servicer = health.HealthServicer()
    servicer.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
    server = grpc.server(ThreadPoolExecutor(1))
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        code, reason = probe(address, None)
        assert (code, "does not serve" in reason) == (1, True)
        assert probe(address, None, "--alive") == (0, "")
    finally:
        server.stop(None).wait()
    assert probe(address, None, "--alive")[0] == 1


def free_address() -> str:
    """Return a loopback address with a port that was free just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"
