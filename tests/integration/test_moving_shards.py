"""A shard that is started again at another address is found there: by workers that ask, and by whoever comes later."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import paceline
import paceline_server
from integration.patience import PATIENCE_S, wait_until_async
from integration.proxy import Proxy
from integration.raw import RawWorker
from paceline_server.storage.parameters import read_parameters
from paceline_wire.errors import UnavailableError

INNER_STEPS = 2
SIZE = 1000
FRAGMENTS = 4
LEASE_S = 3.0
"""With which workers send a heartbeat every 0.2 s."""


class Shard:
    """A shard's process that is told where the others are, and may be started again anywhere.

    Args:
        data_dir: The run's data directory.
        index: The shard's index, of two.
    """

    def __init__(self, data_dir: Path, index: int) -> None:
        self._config: dict[str, Any] = {
            "listen": "127.0.0.1:0",
            "shards": 2,
            "exchange": {"uplink": "fp32", "fragment_elements": 256, "dynamic_inner_steps": False},
            "storage": {"data_dir": str(data_dir)},
        }
        self._index = index
        self._begin()

    def _begin(self) -> None:
        command = [sys.executable, "-m", "paceline_server.shard_process"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._tell(config=self._config, index=self._index, log_level="WARNING")
        self.address = f"127.0.0.1:{self._line()['port']}"

    def serve(self, addresses: Sequence[str]) -> None:
        """Let it serve, with what it is to say of where the shards are."""
        self.told(addresses)
        assert self._line()["event"] == "serving"

    def told(self, addresses: Sequence[str]) -> None:
        """Say where the shards are."""
        self._tell(shards=list(addresses))

    def move(self) -> None:
        """Kill it and start it again at another port."""
        left = self.address
        self.process.kill()
        self._ended()
        self._begin()
        assert self.address != left

    def stop(self) -> None:
        """End it in order."""
        self.process.send_signal(signal.SIGTERM)
        self._ended()

    def _ended(self) -> None:
        self.process.wait(PATIENCE_S)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()

    def _tell(self, **message: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()

    def _line(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line: dict[str, Any] = json.loads(self.process.stdout.readline())
        return line


@contextmanager
def two_shards(data_dir: Path) -> Iterator[list[Shard]]:
    """A run of two shards."""
    with ExitStack() as stack:
        shards = [Shard(data_dir, index) for index in range(2)]
        for shard in shards:
            stack.callback(shard.stop)
        for shard in shards:
            shard.serve([each.address for each in shards])
        yield shards


def train(model: nn.Linear, optimizer: torch.optim.Optimizer, rounds: int) -> None:
    """Some rounds of steps."""
    for _ in range(rounds * INNER_STEPS):
        model(torch.ones(SIZE)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("index", [0, 1])
def test_a_worker_follows_a_shard_that_moves(tmp_path: Path, index: int) -> None:
    """A shard is killed with pushes under way and comes back elsewhere: each push counts once, and training goes on."""
    model = nn.Linear(SIZE, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
    with two_shards(tmp_path) as shards:
        addresses = [shard.address for shard in shards]
        with paceline.join(
            addresses[0],
            model,
            optimizer,
            worker_id="w",
            inner_steps=INNER_STEPS,
            locate=lambda: addresses,
        ) as run:
            train(model, optimizer, 3)
            shards[index].move()
            shards[index].serve([shard.address for shard in shards])
            addresses[index] = shards[index].address
            train(model, optimizer, 3)
            run.flush()
            assert run.stats().reconnects >= 1
            assert run.stats().pushes == 6 * FRAGMENTS
            assert run.stats().pushes_refused == 0
    _, tensors = read_parameters(tmp_path)
    assert torch.equal(tensors["weight"], model.weight.detach())


async def test_who_comes_later_is_told_where_a_shard_is(tmp_path: Path) -> None:
    """The shards that stayed tell of the one that moved, once they have heard of it."""
    with two_shards(tmp_path) as shards:
        async with paceline.connect(shards[0].address) as client:
            await client.initialize({"x": torch.zeros(SIZE)})
        shards[1].move()
        addresses = [shard.address for shard in shards]
        shards[1].serve(addresses)
        shards[0].told(addresses)

        async def found() -> bool:
            try:
                async with paceline.connect(shards[0].address) as client:
                    return [status.shard_index for status in await client.statuses()] == [0, 1]
            except UnavailableError:
                return False

        await wait_until_async(found)


async def test_an_observer_follows_and_doubts_what_makes_no_sense(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A client that only looks finds the shard, too; an answer that fails or misses a shard is unused."""
    answers: list[str] = []
    with two_shards(tmp_path) as shards:

        def locate() -> list[str]:
            if not answers:
                raise LookupError("nobody knows")
            return answers

        async with paceline.connect(shards[0].address, locate=locate) as client:
            await client.initialize({"x": torch.zeros(SIZE)})
            answers.append(shards[0].address)
            assert len(await client.statuses()) == 2
            shards[1].move()
            addresses = [shard.address for shard in shards]
            shards[1].serve(addresses)
            answers[:] = addresses
            assert torch.equal((await client.fetch("fp32")).tensors["x"], torch.zeros(SIZE))
    assert "locate failed" in caplog.text


async def test_heartbeats_that_were_under_way_when_a_shard_moved_go_on(tmp_path: Path) -> None:
    """A shard whose host is silent moves: whoever watches its connections watches the new ones."""
    config = {"schedule": {"lease_s": LEASE_S}, "exchange": {"fragment_elements": 256}}
    with paceline_server.local(config) as address, Proxy(address) as proxy, RawWorker(address) as raw:
        targets = [proxy.address]
        zeros = {"x": torch.zeros(SIZE)}
        async with paceline.connect(proxy.address, worker_id="w", connections=2, locate=lambda: targets) as client:
            await client.initialize(zeros)
            base = await client.exchange(zeros, await client.fetch())
            proxy.hold("up")

            async def is_silent() -> bool:
                return silent_ms(raw) > LEASE_S * 1000 / 3

            await wait_until_async(is_silent)
            targets[0] = address
            await client.exchange(zeros, base)
            before_ms = silent_ms(raw)

            async def heard_again() -> bool:
                nonlocal before_ms
                before_ms, last_ms = silent_ms(raw), before_ms
                return before_ms < last_ms

            await wait_until_async(heard_again)
            (connection,) = client._session.connections
            assert [len(stripe.tasks) for stripe in connection._stripes] == [2, 2]
            assert not any(task.done() for stripe in connection._stripes for task in stripe.tasks)


def silent_ms(raw: RawWorker) -> int:
    """How long the shard has not heard of the worker."""
    (member,) = raw.status().members
    return member.silent_ms
