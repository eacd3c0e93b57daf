"""What operators do to running servers: `paceline admin`, on real processes, and that it survives them."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
import torch
from click.testing import CliRunner

import paceline
import paceline_server
from integration.killable import KillableServer
from integration.patience import PATIENCE_S, wait_until_async
from paceline.cli import cli
from paceline_server.hosted import FragmentCopy
from paceline_server.server import ShardServer
from paceline_server.settings import config_from_mapping
from paceline_server.storage.parameters import read_parameters
from paceline_wire.errors import EvictedError
from paceline_wire.v1 import admin_pb2, admin_pb2_grpc
from paceline_wire.v1 import parameter_server_pb2 as pb

START = {"x": torch.linspace(-1, 1, 1024), "y": torch.linspace(0, 1, 700)}
FLAGS = (
    *("--exchange.uplink", "fp32", "--exchange.downlink", "fp32", "--exchange.fragment-elements", "512"),
    *("--schedule.quota", "1", "--outer.momentum", "0.5", "--no-guard.refuse-outliers"),
)


def gradient(seed: int) -> dict[str, torch.Tensor]:
    """An outer gradient."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(tensor.shape, generator=generator) for name, tensor in START.items()}


async def admin(*arguments: str, code: int = 0) -> Any:
    """Run `paceline admin ... --json` to its end; what it said of each shard, or why it did nothing."""
    result = await asyncio.to_thread(CliRunner().invoke, cli, ["admin", *arguments, "--json"])
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)["shards"] if result.stdout else result.stderr


async def status_of(client: paceline.Client) -> admin_pb2.StatusResponse:
    """The first shard's status."""
    return (await client.statuses())[0]


async def test_a_set_learning_rate_counts_and_replays_to_the_same_bits(tmp_path: Path) -> None:
    """Pushes enter by the new rate at every shard, a killed server comes back to the bits, and with the rate."""
    with KillableServer(tmp_path, *FLAGS, shards=2) as server:
        async with paceline.connect(server.address, worker_id="a") as worker:
            await worker.initialize(START)
            base = await worker.exchange(gradient(1), await worker.fetch("fp32"))
            shards = await admin("set", server.address, "outer.lr=0.25", "exchange.inner_steps=77")
            assert [(shard["before"]["lr"], shard["after"]["lr"]) for shard in shards] == [(0.7, 0.25)] * 2
            assert all(shard["is_kept"] for shard in shards)
            # By hand: u = 0.5 u + lr g, w -= u, since every push fills a bin of its own.
            moved = {name: 0.7 * 0.5 * gradient(1)[name] + 0.25 * gradient(2)[name] for name in START}
            expected = {name: base.tensors[name] - moved[name] for name in START}
            base = await worker.exchange(gradient(2), base)
            for name in START:
                torch.testing.assert_close(base.tensors[name], expected[name])
            await asyncio.to_thread(server.restart)
            again = await worker.fetch("fp32")
            assert all(torch.equal(again.tensors[name], base.tensors[name]) for name in START)
            assert {status.settings.lr for status in await worker.statuses()} == {0.25}
            base = await worker.exchange(gradient(3), base)
        async with paceline.connect(server.address) as other:
            assert other.configuration.outer.lr == 0.25
            assert other.configuration.exchange.inner_steps == 77
    # The newest word counts: a server that is started with another value than before goes on with that one.
    with KillableServer(tmp_path, *FLAGS, "--outer.lr", "0.1", shards=2) as server:
        async with paceline.connect(server.address) as observer:
            status = await status_of(observer)
            assert (status.settings.lr, status.settings.inner_steps) == (0.1, 77)
            again = await observer.fetch("fp32")
            assert all(torch.equal(again.tensors[name], base.tensors[name]) for name in START)


async def test_a_snapshot_amid_changes_replays_to_the_same_bits(tmp_path: Path) -> None:
    """Between the copies of two fragments pushes enter and the rate changes; snapshot and journal give the bits."""
    config = {"exchange": {"uplink": "fp32", "downlink": "fp32", "fragment_elements": 512}, "schedule": {"quota": 1}}
    storage = {"data_dir": str(tmp_path), "replay_s": 3600}
    server = ShardServer(config_from_mapping({**config, "listen": "127.0.0.1:0", "storage": storage}), 0)
    address = f"127.0.0.1:{server.bind()}"
    await server.start([pb.Shard(host="127.0.0.1", port=int(address.partition(":")[2]))])
    async with paceline.connect(address, worker_id="a") as worker:
        await worker.initialize(START)
        base = await worker.fetch("fp32")
        engine, copied = server._engine, server._engine.copied
        copies = 0

        async def copied_amid_changes(index: int) -> FragmentCopy:
            nonlocal base, copies
            copies += 1
            if copies == 3:
                base = await worker.exchange(gradient(2), base)
                await admin("set", address, "outer.lr=0.1")
                base = await worker.exchange(gradient(3), base)
            return await copied(index)

        engine.copied = copied_amid_changes  # type: ignore[method-assign]
        base = await worker.exchange(gradient(1), base)
        snapshots = await admin("snapshot", address)
        assert copies >= 4
        assert snapshots[0]["num_bytes"] > 0
        base = await worker.exchange(gradient(4), base)
    await server.drain()
    _, tensors = await asyncio.to_thread(read_parameters, tmp_path)
    assert all(torch.equal(tensors[name], base.tensors[name]) for name in START)


async def test_a_worker_learns_the_number_of_inner_steps(tmp_path: Path) -> None:
    """A worker's next round after an answer has the new number of inner steps."""
    with paceline_server.local({"exchange": {"inner_steps": 2}}) as address:
        model = torch.nn.Linear(3, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

        def step() -> None:
            model(torch.ones(4, 3)).sum().backward()
            optimizer.step()

        with await asyncio.to_thread(paceline.join, address, model, optimizer) as run:
            assert run.inner_steps == 2
            await admin("set", address, "exchange.inner_steps=5")
            for _ in range(2):
                step()
            await asyncio.to_thread(run.flush)
            assert run.inner_steps == 5


async def test_settings_that_cannot_be_are_refused_and_noted(tmp_path: Path) -> None:
    """A value out of range, a quota below the quorum, and H under OrLoMo are refused with a reason; nothing changes."""
    quorum = ("--schedule.kind", "quorum", "--schedule.quota", "3", "--schedule.quorum", "2")
    with KillableServer(tmp_path, *quorum) as server:
        for setting, reason in (("outer.lr=-1", "greater than 0"), ("schedule.quota=1", "not be larger than")):
            (shard,) = await admin("set", server.address, setting, code=2)
            assert reason in shard["reason"]
        assert "cannot change while" in await admin("set", server.address, "outer.momentum=0.1", code=2)
        (log,) = await admin("audit", server.address)
        assert [entry["subject"] for entry in log["entries"]] == ["outer.lr", "schedule.quota"]
        assert all(entry["result"].startswith("refused: ") for entry in log["entries"])
        (shard,) = await admin("set", server.address, "schedule.quota=")
        assert "quota" not in shard["after"]
    with paceline_server.local({"outer": {"rule": "orlomo"}, "exchange": {"dynamic_inner_steps": False}}) as address:
        (shard,) = await admin("set", address, "exchange.inner_steps=7", code=2)
        assert "momentum decays" in shard["reason"]


async def test_nothing_is_set_unless_every_shard_answers(tmp_path: Path) -> None:
    """With a shard away, the command refuses and names it; no shard has changed."""
    with KillableServer(tmp_path, *FLAGS, shards=2) as server:
        host, _, port = server.address.partition(":")
        # The second shard goes by an act of its own, and the server stays while the first one serves.
        gone = await call_shard(f"{host}:{int(port) + 1}", "Drain", admin_pb2.DrainRequest())
        assert "no parameters" in gone.problem
        message = await admin("set", server.address, "outer.lr=0.1", code=3)
        assert "nothing was changed, since shard 1 does not answer" in message
        first = await call_shard(server.address, "Status", admin_pb2.StatusRequest())
        assert first.settings.lr == 0.7
        shards = await admin("drain", server.address, code=3)
        assert ["error" in shard for shard in shards] == [False, True]
        assert await asyncio.to_thread(server.process.wait, PATIENCE_S) == 0


def files_of(folder: str) -> list[int]:
    """Sizes of a folder's files."""
    return [path.stat().st_size for path in Path(folder).iterdir()]


async def call_shard(address: str, method: str, request: Any) -> Any:
    """Call one shard's AdminService, as no command does."""
    async with grpc.aio.insecure_channel(address) as channel:
        return await getattr(admin_pb2_grpc.AdminServiceStub(channel), method)(request, timeout=PATIENCE_S)


async def test_an_evicted_worker_learns_why_and_stays_out(tmp_path: Path) -> None:
    """Its exchange ends with the operator's reason, a kill lets it in no earlier, and admitting it does."""
    with KillableServer(tmp_path, *FLAGS, "--schedule.kind", "barrier", "--schedule.quota", "2", shards=2) as server:
        async with paceline.connect(server.address, worker_id="a") as evicted:
            await evicted.initialize(START)
            exchange = asyncio.create_task(evicted.exchange(gradient(1), await evicted.fetch("fp32")))
            await wait_until_async(lambda: pushed(evicted, 2))
            shards = await admin("evict", server.address, "a", "--reason", "runs the wrong data")
            assert [shard["was_member"] for shard in shards] == [True, True]
            with pytest.raises(EvictedError, match=r"'a' was evicted .*\(runs the wrong data\).* until it is admitted"):
                await exchange
        shards = await admin("evict", server.address, "a", "--for", "12h")
        assert [(shard["was_member"], shard["was_evicted"]) for shard in shards] == [(False, True)] * 2
        await asyncio.to_thread(server.restart)
        with pytest.raises(EvictedError, match=r"for 43\d\d\d s more"):
            async with paceline.connect(server.address, worker_id="a"):
                pass
        async with paceline.connect(server.address, worker_id="b") as other:
            (held,) = (await status_of(other)).evicted
            assert (held.worker_id, held.reason) == ("a", "")
            assert [shard["was_kept_out"] for shard in await admin("admit", server.address, "a")] == [True, True]
            assert [shard["was_kept_out"] for shard in await admin("admit", server.address, "a")] == [False, False]
            async with paceline.connect(server.address, worker_id="a"):
                assert not (await status_of(other)).evicted


async def pushed(client: paceline.Client, count: int) -> bool:
    """Whether so many pushes are applied, over all shards, and wait for their bin."""
    return sum(status.pushes_applied for status in await client.statuses()) >= count


async def test_a_drained_server_has_everything_in_its_snapshot(tmp_path: Path) -> None:
    """Drain answers with the snapshot, the server ends with 0, and comes back without a record to replay."""
    with KillableServer(tmp_path, *FLAGS, shards=2) as server:
        async with paceline.connect(server.address, worker_id="a") as worker:
            await worker.initialize(START)
            base = await worker.exchange(gradient(1), await worker.fetch("fp32"))
            shards = await admin("drain", server.address)
            assert all(files_of(shard["snapshot"]["path"]) for shard in shards)
            assert all(shard["snapshot"]["num_bytes"] > 0 for shard in shards)
            assert await asyncio.to_thread(server.process.wait, PATIENCE_S) == 0
            waiting = asyncio.create_task(worker.exchange(gradient(2), base))
            await asyncio.to_thread(server.start)
            assert set((await waiting).bins.values()) == {2}
            replayed = [recovery["replayed_records"] for recovery in server.announced["recovered"]]
            assert max(replayed) <= 1
            assert (await admin("audit", server.address))[0]["entries"][0]["act"] == "drain"


async def test_snapshots_are_written_when_asked_for(tmp_path: Path) -> None:
    """A snapshot says where it is and how large; asked again with nothing new, it is the same one."""
    with KillableServer(tmp_path, *FLAGS) as server:
        (shard,) = await admin("snapshot", server.address, code=4)
        assert shard["error"] == "NotInitializedError"
        async with paceline.connect(server.address, worker_id="a") as worker:
            await worker.initialize(START)
            await worker.exchange(gradient(1), await worker.fetch("fp32"))
            (first,) = await admin("snapshot", server.address)
            (second,) = await admin("snapshot", server.address)
            assert (second["path"], second["existed"]) == (first["path"], True)
            assert sum(files_of(first["path"])) == first["num_bytes"] > 2 * 4 * 1700


async def test_a_server_in_memory_refuses_what_needs_a_directory() -> None:
    """Neither a snapshot nor a drain that would lose the state is done unasked, and both are noted."""
    with paceline_server.local() as address:
        (shard,) = await admin("snapshot", address, code=2)
        assert "storage.data_dir" in shard["reason"]
        (shard,) = await admin("drain", address, code=2)
        assert "--discard" in shard["reason"]
        (log,) = await admin("audit", address)
        assert [entry["act"] for entry in log["entries"]] == ["snapshot", "drain"]
        assert all("127.0.0.1" in entry["peer"] for entry in log["entries"])


def test_the_command_says_what_became_of_each_shard() -> None:
    """As a process of its own, the command prints a line for each shard."""
    with paceline_server.local({"shards": 2}) as address:
        command = [sys.executable, "-m", "paceline", "admin", "set", address, "schedule.quota=3"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=2 * PATIENCE_S)
    lines = done.stdout.splitlines()
    assert [line.partition(": ")[2] for line in lines] == [
        "schedule.quota left out -> 3; until the server is started again"
    ] * 2
    assert lines[1].startswith("shard 1 (127.0.0.1:")


async def test_the_audit_log_is_a_file_of_lines(tmp_path: Path) -> None:
    """Every act is a line in the data directory, appended to across restarts, from which value to which."""
    with KillableServer(tmp_path, *FLAGS) as server:
        await admin("set", server.address, "outer.lr=0.5")
        await asyncio.to_thread(server.restart)
        await admin("set", server.address, "outer.lr=0.4")
        (log,) = await admin("audit", server.address, "--last", "1")
    lines = [json.loads(line) for line in (tmp_path / "shard-0" / "audit.jsonl").read_text().splitlines()]
    assert [(line["act"], line["subject"], line["old"], line["new"], line["result"]) for line in lines] == [
        ("configure", "outer.lr", "0.7", "0.5", "done"),
        ("configure", "outer.lr", "0.5", "0.4", "done"),
    ]
    assert [(entry["old"], entry["new"]) for entry in log["entries"]] == [("0.5", "0.4")]
