"""What durability costs and how fast it brings a server back: journal throughput, exchange, and recovery after SIGKILL.

    python benchmarks/durability.py --json > benchmarks/results/durability.json

`journal`: appending int4 and int8 pushes of one fragment (4 Mi elements) with a commit each and with four in a commit,
by SQLite in several modes, by our SegmentWriter, and by bare appends with fdatasync, interleaved, in one run.
`exchange`: rounds of one worker with a server that has a data directory, beside one in memory, alternating.
`recovery`: seconds from SIGKILL to the first answered call, by size; the journal holds what the default
`storage.replay_s` lets gather between snapshots.
"""

import argparse
import asyncio
import json
import os
import platform
import shutil
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import paceline
from paceline_server.journal import FragmentInitialized
from paceline_server.storage.segment import SegmentWriter, Sync
from paceline_wire import codecs

FRAGMENT = 4 * 1024 * 1024
MIB = 1024 * 1024
SQLITE_MODES = (("wal", "full"), ("wal", "normal"), ("truncate", "full"))


def append_bare(payload: bytes, pushes: int, group: int, folder: Path) -> None:
    """Append to a file, with fdatasync after each group."""
    descriptor = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for push in range(1, pushes + 1):
        os.write(descriptor, payload)
        if push % group == 0:
            os.fdatasync(descriptor)
    os.close(descriptor)


def append_sqlite(payload: bytes, pushes: int, group: int, mode: tuple[str, str], folder: Path) -> None:
    """Insert into a table, with a commit for each group."""
    connection = sqlite3.connect(folder / "journal.db", isolation_level=None)
    connection.execute("PRAGMA page_size = 65536")
    connection.execute("PRAGMA locking_mode = EXCLUSIVE")
    connection.execute(f"PRAGMA journal_mode = {mode[0]}")
    connection.execute(f"PRAGMA synchronous = {mode[1]}")
    connection.execute("CREATE TABLE records (number INTEGER PRIMARY KEY, payload BLOB)")
    for _ in range(pushes // group):
        connection.execute("BEGIN IMMEDIATE")
        for _ in range(group):
            connection.execute("INSERT INTO records (payload) VALUES (?)", (payload,))
        connection.execute("COMMIT")
    connection.close()


def append_ours(payload: bytes, pushes: int, group: int, sync: Sync, folder: Path) -> None:
    """Append with the journal's own writer, checksums included."""
    record = FragmentInitialized(fragment=0, payload=torch.frombuffer(bytearray(payload), dtype=torch.uint8))
    writer = SegmentWriter(folder / "1.db", 1, sync)
    for _ in range(pushes // group):
        writer.append([record] * group)
    writer.close()


def journal_rates(data_dir: Path, megabytes: int, repeats: int) -> list[dict[str, Any]]:
    """MiB a second of every way to keep pushes; the median of interleaved repeats."""
    found: dict[tuple[str, int, str], list[float]] = {}
    for _ in range(repeats):
        for codec in ("int4", "int8"):
            payload = os.urandom(codecs.codec(codec).encoded_bytes(FRAGMENT))
            pushes = max(8, megabytes * MIB // len(payload) // 4 * 4)
            for group in (1, 4):
                amount = (payload, pushes, group)
                ways = {"append, fdatasync": partial(append_bare, *amount)}
                ways |= {f"sqlite {' '.join(mode)}": partial(append_sqlite, *amount, mode) for mode in SQLITE_MODES}
                ways |= {f"journal, sync {sync.value}": partial(append_ours, *amount, sync) for sync in Sync}
                for name, way in ways.items():
                    took_s = timed_in_folder(data_dir, way)
                    found.setdefault((codec, group, name), []).append(len(payload) * pushes / MIB / took_s)
    return [
        {"codec": codec, "pushes_in_a_commit": group, "way": name, "mib_per_s": summary(rates)}
        for (codec, group, name), rates in found.items()
    ]


def timed_in_folder(data_dir: Path, way: Callable[[Path], None]) -> float:
    """Seconds that something takes in an empty folder."""
    with tempfile.TemporaryDirectory(dir=data_dir) as folder:
        began_s = time.perf_counter()
        way(Path(folder))
        return time.perf_counter() - began_s


class Server:
    """`paceline serve` in a process of its own.

    Args:
        data_dir: Its data directory; None: in memory.
    """

    def __init__(self, data_dir: Path | None) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{probe.getsockname()[1]}"
        self._command = [sys.executable, "-m", "paceline", "serve", "--json", "--listen", self.address]
        if data_dir is not None:
            self._command += ["--storage.data-dir", str(data_dir)]
        self.announced: dict[str, Any] = {}
        self.start()

    def start(self) -> None:
        """Start it; returns when it serves."""
        self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.announced = json.loads(self._process.stdout.readline())

    def kill(self) -> None:
        """End it with SIGKILL."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """End it in good order."""
        self._process.terminate()
        self._process.wait()


def model(elements: int) -> dict[str, torch.Tensor]:
    """Parameters of so many elements in tensors of a fragment's size."""
    sizes = [FRAGMENT] * (elements // FRAGMENT) + ([elements % FRAGMENT] if elements % FRAGMENT else [])
    return {f"{number:04d}": torch.randn(size) for number, size in enumerate(sizes)}


async def exchange_rates(data_dir: Path, elements: int, rounds: int) -> dict[str, Any]:
    """Seconds of a round with and without a data directory, alternating."""
    tensors = model(elements)
    took_s: dict[str, list[float]] = {"durable": [], "in memory": []}
    with tempfile.TemporaryDirectory(dir=data_dir) as folder, ExitStack() as stack:
        servers = {"durable": Server(Path(folder)), "in memory": Server(None)}
        for server in servers.values():
            stack.callback(server.close)
        clients = {name: paceline.connect(server.address, worker_id="a") for name, server in servers.items()}
        async with clients["durable"] as durable, clients["in memory"] as in_memory:
            bases = {}
            for name, client in (("durable", durable), ("in memory", in_memory)):
                await client.initialize(tensors)
                bases[name] = await client.fetch()
            for number in range(rounds + 2):
                for name, client in (("durable", durable), ("in memory", in_memory)):
                    began_s = time.perf_counter()
                    bases[name] = await client.exchange(tensors, bases[name])
                    if number >= 2:
                        took_s[name].append(time.perf_counter() - began_s)
            (status,) = await durable.statuses()
    ratios = [kept / held for kept, held in zip(took_s["durable"], took_s["in memory"], strict=True)]
    return {
        "elements": elements,
        "uplink": "int4",
        "seconds": {name: summary(values) for name, values in took_s.items()},
        "durable_over_memory": summary(ratios),
        "snapshots_meanwhile": status.storage.snapshots,
    }


async def recovery_time(data_dir: Path, elements: int, kills: int) -> dict[str, Any]:
    """Seconds from SIGKILL to the first answer, with as much to replay as the defaults let gather."""
    took_s, replayed, recovery_s = [], [], []
    tensors = model(elements)
    with tempfile.TemporaryDirectory(dir=data_dir) as folder, ExitStack() as stack:
        server = Server(Path(folder))
        stack.callback(server.close)
        async with paceline.connect(server.address, worker_id="a", reach_s=120) as client:
            await client.initialize(tensors)
            base = await client.fetch()
            for _ in range(kills):
                base = await fill_journal(client, tensors, base)
                before = await client.fetch("fp32")
                server.kill()
                began_s = time.perf_counter()
                server.start()
                (status,) = await client.statuses()
                took_s.append(time.perf_counter() - began_s)
                after = await client.fetch("fp32")
                assert all(torch.equal(before.tensors[name], after.tensors[name]) for name in tensors)
                replayed.append(status.storage.recovered_records)
                recovery_s.append(status.storage.recovery_ms / 1000)
    return {
        "elements": elements,
        "kill_to_first_answer_s": summary(took_s),
        "of_which_recovery_s": summary(recovery_s),
        "records_replayed": replayed,
    }


async def fill_journal(client: paceline.Client, tensors: dict[str, torch.Tensor], base: paceline.Base) -> paceline.Base:
    """Push until a snapshot has been written, and then until the next one is near: the worst moment for a kill."""
    (status,) = await client.statuses()
    snapshots, deadline_s = status.storage.snapshots, time.monotonic() + 240
    largest = 0
    while time.monotonic() < deadline_s:
        base = await client.exchange(tensors, base)
        (status,) = await client.statuses()
        largest = max(largest, status.storage.journal_bytes)
        written = status.storage.snapshots - snapshots
        if written >= 2 and status.storage.journal_bytes >= 0.8 * largest:
            break
    return base


def summary(values: list[float]) -> dict[str, float]:
    """Median and spread."""
    return {
        "median": round(statistics.median(values), 4),
        "min": round(min(values), 4),
        "max": round(max(values), 4),
        "count": len(values),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--data-dir", type=Path, default=Path.cwd() / "durability-data", help="a folder on the disk")
    parser.add_argument("--elements", type=int, nargs="*", default=[1_000_000, 10_000_000, 100_000_000])
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    arguments.data_dir.mkdir(exist_ok=True)
    try:
        report = {
            "measured": datetime.now(UTC).date().isoformat(),
            "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
            "versions": {name: version(name) for name in ("grpcio", "torch")} | {"sqlite": sqlite3.sqlite_version},
            "journal": journal_rates(arguments.data_dir, arguments.megabytes, arguments.repeats),
            "exchange": [
                asyncio.run(exchange_rates(arguments.data_dir, elements, arguments.rounds))
                for elements in arguments.elements
            ],
            "recovery": [
                asyncio.run(recovery_time(arguments.data_dir, elements, arguments.kills))
                for elements in arguments.elements
            ],
        }
    finally:
        shutil.rmtree(arguments.data_dir, ignore_errors=True)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
