"""The commands serve, status and export as processes of their own, and how a server starts and ends."""

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import safetensors.torch
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

import paceline
import paceline_server
from integration.patience import PATIENCE_S, wait_until_async
from integration.raw import RawWorker
from paceline_wire.errors import ConfigurationError

TOKEN = "correct-horse"
START = {
    "embedding.weight": torch.randn(20, 30, generator=torch.Generator().manual_seed(0)),
    "head.bias": torch.randn(7, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16),
    "norm.running_mean": torch.randn(5, generator=torch.Generator().manual_seed(2)).to(torch.float16),
    "scale": torch.tensor(1 / 3),
    "nothing": torch.empty(0, 3),
}


def processes(*commands: Sequence[str]) -> "list[subprocess.CompletedProcess[str]]":
    """Run commands beside each other, each as a process of its own, to their ends."""

    def run(arguments: Sequence[str]) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "paceline", *arguments]
        env = {**os.environ, "PACELINE_TOKEN": TOKEN}
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=2 * PATIENCE_S, env=env)

    with ThreadPoolExecutor() as threads:
        return list(threads.map(run, commands))


@dataclass(frozen=True)
class Served:
    """A running `paceline serve --json`.

    Attributes:
        process: The command.
        announced: What it printed when it listened.
    """

    process: "subprocess.Popen[str]"
    announced: dict[str, Any]

    @property
    def address(self) -> str:
        """Where the first shard listens."""
        address: str = self.announced["address"]
        return address


@contextmanager
def serve(*arguments: str) -> Iterator[Served]:
    """Start a server in a session of its own, on free ports; whatever happens, it is gone at the end."""
    command = [sys.executable, "-m", "paceline", "serve", "--json", "--listen", "127.0.0.1:0", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            assert process.stdout is not None
            yield Served(process, json.loads(process.stdout.readline()))
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    """A server of one shard that asks for a token, and whose updates lose precision; one test begins its run."""
    with serve("--security.tokens", TOKEN, "--exchange.uplink", "fp32", "--exchange.downlink", "bf16") as found:
        yield found


def test_serve_announces_itself(served: Served) -> None:
    """One line of JSON says where it listens and that nothing is durable."""
    assert served.announced == {
        "event": "listening",
        "address": served.address,
        "shards": [served.address],
        "durable": False,
    }
    host, _, port = served.address.rpartition(":")
    assert host == "127.0.0.1"
    assert int(port) > 0


def test_health_and_reflection(served: Served) -> None:
    """Orchestrators find it serving; tools find its services."""
    with grpc.insecure_channel(served.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        answer = health.Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        metadata = (("authorization", f"Bearer {TOKEN}"),)
        (listed,) = reflection.ServerReflectionInfo(iter([request]), timeout=PATIENCE_S, metadata=metadata)
    assert {service.name for service in listed.list_services_response.service} == {
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
        "paceline_wire.v1.AdminService",
        "paceline_wire.v1.ParameterServerService",
    }


def test_a_second_server_on_the_port_fails_loudly(served: Served) -> None:
    """It does not share the port: exit code 2 and a sentence; a process of several tells its starter the same."""
    sentence = f"cannot listen on {served.address}: the port is taken"
    (done,) = processes(["serve", "--listen", served.address])
    assert done.returncode == 2
    assert sentence in done.stderr
    assert done.stdout == ""
    with (
        pytest.raises(ConfigurationError, match=re.escape(sentence)),
        paceline_server.local({"listen": served.address}),
    ):
        pass


async def test_status_and_export(served: Served, tmp_path: Path) -> None:
    """Before the run begins both say so; then status shows it, and export writes every bit under the model's names."""
    path = tmp_path / "run.safetensors"
    status, export = processes(["status", served.address], ["export", served.address, str(path)])
    assert status.returncode == 0
    assert "not initialized" in status.stdout
    assert export.returncode == 4
    assert "no parameters yet" in export.stderr
    assert not path.exists()

    async with paceline.connect(served.address, worker_id="9", token=TOKEN) as worker:
        await worker.initialize(START, averaged=["norm.running_mean"])
        await worker.exchange({name: torch.zeros_like(tensor) for name, tensor in START.items()}, await worker.fetch())
        status, as_json, export, refused = await asyncio.to_thread(
            processes,
            ["status", served.address],
            ["status", served.address, "--json"],
            ["export", served.address, str(path), "--json"],
            ["status", served.address, "--token", "wrong"],
        )
    assert "shard 0: 3 fragments, 613 elements" in status.stdout
    assert "worker 0 9: speed not known yet, 50 inner steps a round, 3 pushes" in status.stdout
    (shard,) = json.loads(as_json.stdout)["shards"]
    assert (shard["num_elements"], shard["pushes_applied"]) == (613, 3)
    (member,) = shard["members"]
    assert (member["worker_id"], member["pushes_applied"]) == ("9", 3)
    assert refused.returncode == 4
    assert "the token is missing or wrong" in refused.stderr
    assert export.returncode == 0, export.stderr
    assert json.loads(export.stdout) == {"path": str(path), "tensors": 5, "elements": 613}
    exported = safetensors.torch.load_file(path)
    assert exported.keys() == START.keys()
    for name, tensor in START.items():
        assert exported[name].dtype is tensor.dtype
        assert torch.equal(exported[name], tensor)


@pytest.mark.parametrize(
    ("number", "shards", "whole_group"),
    [(signal.SIGTERM, 1, False), (signal.SIGTERM, 2, False), (signal.SIGINT, 2, True)],
)
async def test_a_signal_ends_the_server_with_0(number: signal.Signals, shards: int, whole_group: bool) -> None:
    """SIGTERM, and SIGINT as Ctrl-C sends it to the whole group, end all processes in order, with workers waiting."""
    with serve("--shards", str(shards), "--schedule.kind", "barrier") as served:
        assert len(served.announced["shards"]) == shards
        with RawWorker(served.address, "idle") as idle:
            async with paceline.connect(served.address, worker_id="waiting") as worker:
                await worker.initialize(START)
                idle.join()
                base = await worker.fetch()
                gradient = {name: torch.ones_like(tensor) for name, tensor in START.items()}
                waiting = asyncio.create_task(worker.exchange(gradient, base))
                await wait_until_async(lambda: pushes_have_come(worker, len(base.bins)))
                assert not waiting.done()
                if whole_group:
                    os.killpg(served.process.pid, number)
                else:
                    served.process.send_signal(number)
                code = await asyncio.to_thread(served.process.wait, PATIENCE_S)
                assert not waiting.done()
                waiting.cancel()
        assert code == 0
        assert served.process.stdout is not None
        assert served.process.stdout.read() == ""


async def pushes_have_come(client: paceline.Client, number: int) -> bool:
    """Whether so many pushes are applied, over all shards."""
    return sum(status.pushes_applied for status in await client.statuses()) == number
