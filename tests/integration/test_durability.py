"""Servers that are killed lose nothing: they come back in the same bits, and workers go on without noticing."""

import asyncio
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import paceline
import paceline_server
from integration.killable import KillableServer
from integration.patience import PATIENCE_S, wait_until, wait_until_async
from paceline_server.storage.directory import ShardDirectory
from paceline_wire.errors import NotInitializedError, SupersededError
from support_core import normal

SIZE = 3000
FLAGS = (
    *("--outer.momentum", "0.9", "--exchange.uplink", "int4", "--exchange.downlink", "fp32"),
    *("--exchange.fragment-elements", "1024"),
)
CONFIG = {
    "outer": {"momentum": 0.9},
    "exchange": {"uplink": "int4", "downlink": "fp32", "fragment_elements": 1024},
}
START = {"x": normal(SIZE, 1)}


def gradient(seed: int) -> dict[str, torch.Tensor]:
    """An outer gradient."""
    return {"x": normal(SIZE, seed)}


async def kill_now_and_then(server: KillableServer, done: asyncio.Event, kills: int, seed: int) -> None:
    """Kill a server at random moments, so many times, while others use it."""
    moments = random.Random(seed)
    while server.kills < kills:
        await asyncio.sleep(moments.uniform(0, 0.3))
        await asyncio.to_thread(server.restart)
    done.set()


@pytest.mark.parametrize("sync", ["commit", "interval", "never"])
async def test_a_killed_server_changes_nothing(tmp_path: Path, sync: str) -> None:
    """Killed in the midst of exchanges, whatever the sync policy, a server ends in the bits of one that never was."""
    done = asyncio.Event()
    flags = (*FLAGS, "--schedule.kind", "barrier", "--storage.sync", sync, "--storage.replay-s", "0.001")
    config = {**CONFIG, "schedule": {"kind": "barrier"}}
    with KillableServer(tmp_path, *flags) as server, paceline_server.local(config) as uninterrupted:
        async with (
            paceline.connect(server.address, worker_id="a") as worker,
            paceline.connect(uninterrupted, worker_id="a") as twin,
        ):
            await worker.initialize(START)
            await twin.initialize(START)
            base, expected = await worker.fetch(), await twin.fetch()
            killing = asyncio.create_task(kill_now_and_then(server, done, 3, seed=len(sync)))
            rounds = 0
            while not done.is_set() or rounds < 20:
                base = await worker.exchange(gradient(rounds), base)
                expected = await twin.exchange(gradient(rounds), expected)
                rounds += 1
                assert torch.equal(base.tensors["x"], expected.tensors["x"])
                assert base.bins == expected.bins
            await killing
    assert server.kills == 3


async def test_workers_wait_for_each_other_across_a_kill(tmp_path: Path) -> None:
    """A push that waited for its bin when the server was killed is neither lost nor counted twice."""
    config = {**CONFIG, "schedule": {"kind": "barrier"}}
    flags = (*FLAGS, "--schedule.kind", "barrier")
    with KillableServer(tmp_path, *flags) as server, paceline_server.local(config) as uninterrupted:
        results = []
        for address, kills in ((server.address, True), (uninterrupted, False)):
            async with (
                paceline.connect(address, worker_id="a") as first,
                paceline.connect(address, worker_id="b") as second,
            ):
                await first.initialize(START)
                base = await first.fetch()
                waiting = asyncio.create_task(first.exchange(gradient(1), base))
                await wait_until_async(lambda first=first: applied(first, 3))  # type: ignore[misc]
                if kills:
                    await asyncio.to_thread(server.restart)
                results.append(await second.exchange(gradient(2), base))
                assert torch.equal((await waiting).tensors["x"], results[-1].tensors["x"])
    assert torch.equal(results[0].tensors["x"], results[1].tensors["x"])


async def applied(client: paceline.Client, count: int) -> bool:
    """Whether so many pushes are applied."""
    (status,) = await client.statuses()
    return status.pushes_applied == count


async def test_membership_and_speed_survive(tmp_path: Path) -> None:
    """A restarted server knows its members, and a superseded incarnation stays superseded."""
    with KillableServer(tmp_path, *FLAGS) as server:
        async with paceline.connect(server.address, worker_id="a") as worker:
            await worker.initialize(START)
            base = await worker.exchange(gradient(1), await worker.fetch())
            await asyncio.to_thread(server.restart)
            (status,) = await worker.statuses()
            assert [member.worker_id for member in status.members] == ["a"]
            assert status.storage.recovered_records > 0
            base = await worker.exchange(gradient(2), base)
            assert set(base.bins.values()) == {2}


async def test_a_superseded_incarnation_stays_so(tmp_path: Path) -> None:
    """A start that superseded another while that was a member is known after a kill: the other is refused still."""
    with KillableServer(tmp_path, *FLAGS) as server:
        async with paceline.connect(server.address, worker_id="a") as earlier:
            await earlier.initialize(START)
            base = await earlier.exchange(gradient(1), await earlier.fetch())
            async with paceline.connect(server.address, worker_id="a") as later:
                await asyncio.to_thread(server.restart)
                with pytest.raises(SupersededError):
                    await asyncio.wait_for(earlier.exchange(gradient(2), base), PATIENCE_S)
                base = await later.exchange(gradient(3), base)
                assert set(base.bins.values()) == {2}


class Line(nn.Module):
    """A model whose loss falls, in a few fragments."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(START["x"].clone())


def test_training_never_notices(tmp_path: Path) -> None:
    """A joined training loop goes on while the server is killed, sees no error, and its pushes all count once."""
    model = Line()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with (
        KillableServer(tmp_path, *FLAGS) as server,
        paceline.join(server.address, model, optimizer, inner_steps=2, worker_id="a") as run,
    ):
        for kill in range(2):
            for _ in range(40):
                model.x.square().sum().backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                optimizer.zero_grad()
            if kill == 0:
                server.restart()
        run.flush()
        stats = run.stats()
        assert stats.rounds == 40
        assert stats.reconnects >= 1
        exported = export(server.address, tmp_path / "live.safetensors")
        assert torch.equal(exported["x"], model.x.detach())
        assert server.stop() == 0
        assert torch.equal(export(str(tmp_path), tmp_path / "still.safetensors")["x"], exported["x"])
        server.start()


def paceline_command(*arguments: str) -> None:
    """Run a command that succeeds."""
    subprocess.run([sys.executable, "-m", "paceline", *arguments], check=True, timeout=PATIENCE_S)


def export(source: str, output: Path) -> dict[str, torch.Tensor]:
    """Run `paceline export`."""
    paceline_command("export", source, str(output))
    return safetensors.torch.load_file(output)


async def test_snapshots_bound_the_journal(tmp_path: Path) -> None:
    """Snapshots are written while the run goes on, and what they cover is removed; they can be mirrored."""
    mirror = tmp_path / "mirror"
    flags = (*FLAGS, "--storage.replay-s", "0.0001", "--storage.mirror", mirror.as_uri())
    directory = ShardDirectory(tmp_path / "data", 0)
    with KillableServer(tmp_path / "data", *flags) as server:
        async with paceline.connect(server.address, worker_id="a") as worker:
            await worker.initialize(START)
            base = await worker.fetch()
            rounds = 0

            async def pruned() -> bool:
                nonlocal base, rounds
                base = await worker.exchange(gradient(rounds), base)
                rounds += 1
                return directory.segment_numbers()[0] > 1

            await wait_until_async(pruned)
            await asyncio.to_thread(server.restart)
            assert server.announced["recovered"][0]["replayed_records"] < 3 * rounds
            after = await worker.fetch("fp32")
            assert torch.equal(after.tensors["x"], base.tensors["x"])
            assert after.bins == base.bins
    copies = sorted((mirror / "shard-0" / "snapshots").iterdir())
    assert 1 <= len(copies) <= 2
    assert (copies[-1] / "snapshot.json").exists()


def refused(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run a command that should fail."""
    command = [sys.executable, "-m", "paceline", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)


def test_a_directory_in_use_is_refused(tmp_path: Path) -> None:
    """A second server, and an export, are told who holds the directory; exit code 5."""
    with KillableServer(tmp_path, *FLAGS) as server:
        second = refused("serve", "--listen", "127.0.0.1:0", "--storage.data-dir", str(tmp_path))
        exported = refused("export", str(tmp_path), str(tmp_path / "x.safetensors"))
        assert (second.returncode, exported.returncode) == (5, 5)
        assert f"is in use by process {server.process.pid}" in second.stderr
        assert f"is in use by process {server.process.pid}" in exported.stderr
        told = subprocess.run(
            [sys.executable, "-m", "paceline", "status", server.address, "--json"], stdout=subprocess.PIPE, check=True
        )
        storage = json.loads(told.stdout)["shards"][0]["storage"]
        assert (storage["sync"], storage["newest_record"], storage["snapshots"]) == ("commit", 1, 0)


async def test_two_shards_are_killed_and_divided_anew(tmp_path: Path) -> None:
    """A run of two shards survives the kill of one of them, and goes on among three after `paceline reshard`."""
    with KillableServer(tmp_path / "two", *FLAGS, shards=2) as server:
        async with paceline.connect(server.address, worker_id="a") as worker:
            await worker.initialize(START)
            base = await worker.exchange(gradient(1), await worker.fetch())
            os.kill(children_of(server.process.pid)[1], signal.SIGKILL)
            await asyncio.to_thread(wait_until, lambda: server.process.poll() is not None)
            assert server.process.returncode == 70
            server.start()
            base = await worker.exchange(gradient(2), base)
            assert set(base.bins.values()) == {2}
        assert server.stop() == 0
        await asyncio.to_thread(paceline_command, "reshard", f"{tmp_path}/two", f"{tmp_path}/three", "--shards", "3")
        with KillableServer(tmp_path / "three", *FLAGS, shards=3) as divided:
            async with paceline.connect(divided.address, worker_id="a") as worker:
                found = await worker.fetch("fp32")
                assert torch.equal(found.tensors["x"], base.tensors["x"])
                assert found.bins == base.bins
                await worker.exchange(gradient(3), found)
        server.start()


def children_of(pid: int) -> list[int]:
    """The processes that a process has started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@contextmanager
def small_disk(path: Path, mib: int) -> Iterator[None]:
    """A file system of so many MiB."""
    mount, umount = shutil.which("mount"), shutil.which("umount")
    if mount is None or umount is None:
        pytest.skip("needs mount, to make a small file system")
    path.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(path)]
    mounted = subprocess.run([mount, *options], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        yield
    finally:
        subprocess.run([umount, "-l", str(path)], check=True)


def fill(balloon: Path) -> None:
    """Take all room that a file system has."""
    try:
        with balloon.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 16))
    except OSError as error:
        assert error.errno == errno.ENOSPC  # noqa: PT017  # the disk is to be full


async def test_a_full_disk_refuses_pushes_until_there_is_room(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With the disk full a push waits, with the reason; with room again it is applied, once, and nothing was lost."""
    with small_disk(tmp_path / "disk", 96), paceline_server.local(CONFIG) as uninterrupted:
        balloon = tmp_path / "disk" / "balloon"
        with KillableServer(tmp_path / "disk" / "data", *FLAGS) as server:
            async with (
                paceline.connect(server.address, worker_id="a") as worker,
                paceline.connect(uninterrupted, worker_id="a") as twin,
            ):
                await worker.initialize(START)
                await twin.initialize(START)
                base = await worker.exchange(gradient(1), await worker.fetch())
                expected = await twin.exchange(gradient(1), await twin.fetch())
                fill(balloon)
                waiting = asyncio.create_task(worker.exchange(gradient(2), base))
                await wait_until_async(lambda: warned(worker))
                # The server may have noticed before the push came to it.
                await wait_until_async(lambda: has_told(caplog))
                assert not waiting.done()
                balloon.unlink()
                base, expected = await waiting, await twin.exchange(gradient(2), expected)
                told = reasons_told(caplog)
                assert len(told) == len(set(told)), "once for each reason, however often it was tried"
                assert all("has no room" in message for message in told)
                assert torch.equal(base.tensors["x"], expected.tensors["x"])
                await asyncio.to_thread(server.restart)
                after = await worker.fetch("fp32")
                assert torch.equal(after.tensors["x"], expected.tensors["x"])


def reasons_told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the worker's log says of the disk."""
    return [record.message for record in caplog.records if "until there is room" in record.message]


async def has_told(caplog: pytest.LogCaptureFixture) -> bool:
    """Whether the worker's log says why it waits."""
    return bool(reasons_told(caplog))


async def warned(client: paceline.Client) -> bool:
    """Whether the server tells that its disk is full."""
    (status,) = await client.statuses()
    return any("has no room" in warning for warning in status.warnings)


async def test_a_server_that_lost_the_run_says_so(tmp_path: Path) -> None:
    """Restarted without its data, a server cannot go on, and the worker is told what happened and what to do."""
    with KillableServer(tmp_path / "data", *FLAGS) as server:
        async with paceline.connect(server.address, worker_id="a") as worker:
            await worker.initialize(START)
            base = await worker.exchange(gradient(1), await worker.fetch())
            server.kill()
            shutil.rmtree(tmp_path / "data")
            await asyncio.to_thread(server.start)
            with pytest.raises(NotInitializedError, match=r"has lost this run.* Start it with the run's data_dir"):
                await worker.exchange(gradient(2), base)
