"""Shards started one by one, each knowing the others' addresses: one run for clients, and each comes back alone."""

import asyncio
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import paceline
import paceline_server
from integration.patience import PATIENCE_S

ROOT = Path(__file__).resolve().parents[2]
START = {"weight": torch.linspace(-1.0, 1.0, 4000).reshape(40, 100), "bias": torch.linspace(0.0, 1.0, 10)}


def free_addresses(hosts: list[str]) -> list[str]:
    """An address with a free port at each of the loopback hosts."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in hosts]
        for listener, host in zip(sockets, hosts, strict=True):
            listener.bind((host, 0))
        return [f"{host}:{listener.getsockname()[1]}" for host, listener in zip(hosts, sockets, strict=True)]


class Shard:
    """One shard by itself, as an orchestrator would start it.

    Args:
        index: Which it is.
        addresses: Those of all.
        data_dir: Its own data directory.
    """

    def __init__(self, index: int, addresses: list[str], data_dir: Path) -> None:
        self.command = [sys.executable, "-m", "paceline", "serve", "--json", "--listen", addresses[index]]
        self.command += ["--shard-addresses", ",".join(addresses), "--shard-index", str(index)]
        self.command += ["--storage.data-dir", str(data_dir), "--exchange.fragment-elements", "256"]
        self.command += ["--exchange.uplink", "fp32", "--exchange.downlink", "fp32", "--schedule.quota", "1"]
        self.process = self.started()

    def started(self) -> "subprocess.Popen[str]":
        """Start its process."""
        return subprocess.Popen(self.command, stdout=subprocess.PIPE, text=True)

    def announced(self) -> dict[str, Any]:
        """What it says when it listens."""
        assert self.process.stdout is not None
        said: dict[str, Any] = json.loads(self.process.stdout.readline())
        return said

    def ended(self) -> int:
        """Wait for its process; the exit code."""
        code = self.process.wait(PATIENCE_S)
        if self.process.stdout is not None:
            self.process.stdout.close()
        return code


@pytest.fixture
def shards(tmp_path: Path) -> Iterator[tuple[list[str], list[Shard]]]:
    """Two shards at two addresses, and both."""
    addresses = free_addresses(["127.0.0.2", "127.0.0.3"])
    started = [Shard(index, addresses, tmp_path / str(index)) for index in range(2)]
    yield addresses, started
    for shard in started:
        shard.process.kill()
        shard.ended()


async def test_one_run_whose_shards_come_back_one_by_one(shards: tuple[list[str], list[Shard]]) -> None:
    """Two separate shards give the parameters of one server, also when one of them is killed in between."""
    addresses, (first, second) = shards
    for shard in (first, second):
        assert shard.announced()["shards"] == addresses
    gradient = {name: torch.full_like(tensor, 0.25) for name, tensor in START.items()}
    async with paceline.connect(addresses[1], worker_id="w") as client:
        await client.initialize(START)
        base = await client.exchange(gradient, await client.fetch())
        second.process.kill()
        second.ended()
        second.process = second.started()
        assert second.announced()["recovered"][0]["shard"] == 1
        base = await client.exchange(gradient, base)
        statuses = await client.statuses()
    assert [status.shard_index for status in statuses] == [0, 1]
    assert all(status.pushes_applied > 0 for status in statuses)
    expected = await exchanged_twice(gradient)
    for name, tensor in expected.tensors.items():
        assert torch.equal(base.tensors[name], tensor)
    first.process.terminate()
    assert first.ended() == 0


async def test_a_look_at_a_run_of_which_a_shard_is_away(shards: tuple[list[str], list[Shard]]) -> None:
    """`paceline status` shows the shard that answers, names the other, and ends with code 3."""
    addresses, (first, second) = shards
    for shard in (first, second):
        shard.announced()
    second.process.kill()
    second.ended()
    for options in ([], ["--json"]):
        command = [sys.executable, "-m", "paceline", "status", addresses[0], *options]
        done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=PATIENCE_S)
        assert done.returncode == 3
        assert done.stderr.startswith(f"shard 1 ({addresses[1]}): ")
        if options:
            here, away = json.loads(done.stdout)["shards"]
            assert here["target"] == addresses[0]
            assert (away["shard_index"], away["error"]) == (1, "UnavailableError")
        else:
            assert done.stdout.startswith("shard 0: not initialized")


async def test_a_run_with_a_volume_for_each_shard_is_divided_anew(tmp_path: Path) -> None:
    """What docs/operation.md says, from two shards to three: parameters, momentum and a worker's numbers go on."""
    page = (ROOT / "docs" / "operation.md").read_text(encoding="utf-8")
    (recipe,) = re.findall(r"```sh\n(mkdir -p /volumes.*?)```", page, re.DOTALL)
    volumes, programs = tmp_path / "volumes", tmp_path / "programs"
    (volumes / "2").mkdir(parents=True)
    programs.mkdir()
    (programs / "paceline").write_text(f'#!/bin/sh\nexec {sys.executable} -m paceline "$@"\n')
    (programs / "paceline").chmod(0o755)
    gradient = {name: torch.full_like(tensor, 0.25) for name, tensor in START.items()}
    with started(free_addresses(["127.0.0.2", "127.0.0.3"]), volumes) as addresses:
        async with paceline.connect(addresses[0], worker_id="w") as client:
            await client.initialize(START)
            before = await client.exchange(gradient, await client.fetch())
    environ = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
    script = recipe.replace("/volumes/", f"{volumes}/")
    divide = ["sh", "-euc", script]
    await asyncio.to_thread(subprocess.run, divide, check=True, env=environ, stdout=subprocess.DEVNULL)
    with started(free_addresses(["127.0.0.2", "127.0.0.3", "127.0.0.4"]), volumes) as addresses:
        async with paceline.connect(addresses[2], worker_id="w") as client:
            divided = await client.fetch("fp32")
            assert divided.bins == before.bins
            after = await client.exchange(gradient, divided)
            assert [status.num_fragments > 0 for status in await client.statuses()] == [True] * 3
    expected = await exchanged_twice(gradient)
    for name in START:
        assert torch.equal(divided.tensors[name], before.tensors[name])
        assert torch.equal(after.tensors[name], expected.tensors[name])


@contextmanager
def started(addresses: list[str], volumes: Path) -> Iterator[list[str]]:
    """Shards at some addresses, each with a volume of its own, until they are stopped in good order."""
    shards = [Shard(index, addresses, volumes / str(index)) for index in range(len(addresses))]
    try:
        for shard in shards:
            assert shard.announced()["shards"] == addresses
        yield addresses
    finally:
        for shard in shards:
            shard.process.terminate()
        codes = [shard.ended() for shard in shards]
    assert codes == [0] * len(shards)


async def exchanged_twice(gradient: dict[str, torch.Tensor]) -> paceline.Base:
    """What one server answers to the second of two pushes of the same worker."""
    config = {"exchange": {"fragment_elements": 256, "uplink": "fp32", "downlink": "fp32"}, "schedule": {"quota": 1}}
    with paceline_server.local(config) as address:
        async with paceline.connect(address, worker_id="w") as client:
            await client.initialize(START)
            base = await client.exchange(gradient, await client.fetch())
            return await client.exchange(gradient, base)
