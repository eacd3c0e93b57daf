"""Shards started one by one, each knowing the others' addresses: one run for clients, and each comes back alone."""

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

import paceline
import paceline_server
from integration.patience import PATIENCE_S

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
    config = {"exchange": {"fragment_elements": 256, "uplink": "fp32", "downlink": "fp32"}, "schedule": {"quota": 1}}
    with paceline_server.local(config) as address:
        async with paceline.connect(address, worker_id="w") as client:
            await client.initialize(START)
            expected = await client.exchange(gradient, await client.fetch())
            expected = await client.exchange(gradient, expected)
    for name, tensor in expected.tensors.items():
        assert torch.equal(base.tensors[name], tensor)
    first.process.terminate()
    assert first.ended() == 0
