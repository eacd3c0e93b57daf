"""What a worker notices of another identity that floods the server: its exchanges' latency without and with the flood.

    python benchmarks/flood.py --json > benchmarks/results/flood.json

The flood has a valid worker's token and does at once: calls in loops, streams that are opened and held, streams of junk
messages, and pushes as fast as the server reads them. It is a process of its own at the lowest priority, so that what
is measured is what the server does with it and not what it takes of the processors. Quiet and flooded rounds alternate.
"""

import argparse
import asyncio
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import torch
from click.testing import CliRunner

import paceline
import paceline_server
from paceline_server.security.command import certs
from paceline_wire import PROTOCOL_VERSION
from paceline_wire.v1 import admin_pb2, admin_pb2_grpc
from paceline_wire.v1 import parameter_server_pb2 as pb
from paceline_wire.v1 import parameter_server_pb2_grpc as pb_grpc

FRAGMENT = 1 << 20
EXCHANGE = "/paceline_wire.v1.ParameterServerService/Exchange"
FLOODS = ("calls", "streams", "junk", "uploads")
PAUSE_S = 0.1
WARM_UP = 40


async def flood(address: str, kinds: Sequence[str]) -> None:
    """Flood a server until killed; the token is in PACELINE_TOKEN."""
    metadata = (("authorization", f"Bearer {os.environ['PACELINE_TOKEN']}"),)
    works: dict[str, tuple[int, Callable[[str, Any, int], Awaitable[None]]]] = {
        "calls": (64, _call),
        "streams": (64, _hold_stream),
        "junk": (16, _send_junk),
        "uploads": (8, _push),
    }
    tasks = [_for_ever(works[kind][1], address, metadata, n) for kind in kinds for n in range(works[kind][0])]
    await asyncio.gather(*tasks)


async def _for_ever(work: Callable[[str, Any, int], Awaitable[None]], address: str, metadata: Any, n: int) -> None:
    while True:
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await work(address, metadata, n)
        await asyncio.sleep(0)


def _channel(address: str) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])


async def _call(address: str, metadata: Any, _: int) -> None:
    async with _channel(address) as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        while True:
            await stub.Status(admin_pb2.StatusRequest(), metadata=metadata)


async def _joined(channel: grpc.aio.Channel, metadata: Any, name: str) -> Any:
    stub, worker = pb_grpc.ParameterServerServiceStub(channel), pb.Worker(worker_id=name, incarnation=time.time_ns())
    await stub.Join(pb.JoinRequest(protocol_version=PROTOCOL_VERSION, worker=worker), metadata=metadata)
    stream = stub.Exchange(metadata=metadata)
    await stream.write(pb.ExchangeRequest(open=pb.ExchangeOpen(worker=worker)))
    return stream


async def _hold_stream(address: str, metadata: Any, n: int) -> None:
    async with _channel(address) as channel:
        stream = await _joined(channel, metadata, f"flood.held{n}")
        await stream.read()


async def _send_junk(address: str, metadata: Any, _: int) -> None:
    async with _channel(address) as channel:
        make: Any = channel.stream_stream
        stream = make(EXCHANGE)(metadata=metadata)
        while True:
            await stream.write(os.urandom(4096))


async def _push(address: str, metadata: Any, n: int) -> None:
    """Pushes of zeros in int8, one after the other, with nobody reading the answers for long."""
    async with _channel(address) as channel:
        stream = await _joined(channel, metadata, f"flood.pushes{n}")
        num_bytes = 260 * FRAGMENT // 256
        zeros = bytes(num_bytes)

        async def drain() -> None:
            while await stream.read() is not grpc.aio.EOF:
                pass

        reading = asyncio.create_task(drain())
        try:
            for seq in itertools.count(1):
                payload = pb.Payload(codec=pb.CODEC_INT8, num_bytes=num_bytes)
                push = pb.Push(fragment=n % 2, seq=seq, base_bin=0, payload=payload)
                await stream.write(pb.ExchangeRequest(push=push, data=zeros))
        finally:
            reading.cancel()


async def measure(address: str, tokens: dict[str, str], rounds: int, exchanges: int) -> dict[str, list[float]]:
    """Seconds of each exchange of a worker, quiet and under each flood, in turns."""
    taken: dict[str, list[float]] = {}
    async with paceline.connect(address, worker_id="other", token=tokens["other"]) as client:
        await client.initialize({"x": torch.zeros(2 * FRAGMENT)})
        base = await client.fetch()
        gradient = {"x": torch.full((2 * FRAGMENT,), 1e-6)}
        for _ in range(WARM_UP):
            base = await client.exchange(gradient, base)
        for _, kinds in itertools.product(range(rounds), ((), *((kind,) for kind in FLOODS), FLOODS)):
            environment = {**os.environ, "PACELINE_TOKEN": tokens["flood"]}
            command = [sys.executable, __file__, "--flood", address, "--kinds", ",".join(kinds)]
            process = _started(command, environment) if kinds else None
            try:
                await asyncio.sleep(3.0)
                name = "all" if len(kinds) > 1 else "".join(kinds) or "quiet"
                for _ in range(exchanges):
                    began_s = time.perf_counter()
                    base = await client.exchange(gradient, base)
                    taken.setdefault(name, []).append(time.perf_counter() - began_s)
                    await asyncio.sleep(PAUSE_S)
                print(name, f"{statistics.median(taken[name]):.3f} s", file=sys.stderr, flush=True)
            finally:
                if process is not None:
                    process.kill()
                    process.wait()
    return taken


def _started(command: Sequence[str], environment: dict[str, str]) -> "subprocess.Popen[bytes]":
    nice = shutil.which("nice") or "nice"
    return subprocess.Popen([nice, "-n", "19", *command], env=environment)


def _tokens(folder: Path) -> dict[str, str]:
    made = ["make", str(folder), "--server", "localhost", "--worker", "other", "--worker", "flood"]
    CliRunner().invoke(certs, made, catch_exceptions=False)
    return {name: (folder / "workers" / name / "token").read_text().strip() for name in ("other", "flood")}


def summary(taken: dict[str, list[float]]) -> dict[str, Any]:
    """Median and 99th percentile of each, in seconds, and their ratios to the quiet ones."""
    found: dict[str, Any] = {}
    for name, seconds in taken.items():
        p99 = statistics.quantiles(seconds, n=100, method="inclusive")[98]
        found[name] = {"exchanges": len(seconds), "median_s": statistics.median(seconds), "p99_s": p99}
    for each in found.values():
        each["median_ratio"] = each["median_s"] / found["quiet"]["median_s"]
        each["p99_ratio"] = each["p99_s"] / found["quiet"]["p99_s"]
    return found


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--exchanges", type=int, default=25, help="in each part of a round")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--flood", metavar="ADDRESS", help=argparse.SUPPRESS)
    parser.add_argument("--kinds", default=",".join(FLOODS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.flood:
        asyncio.run(flood(arguments.flood, arguments.kinds.split(",")))
    with tempfile.TemporaryDirectory() as folder:
        tokens = _tokens(Path(folder) / "certs")
        config = {
            "security": {"token_key": str(Path(folder) / "certs" / "server" / "token.pub")},
            "schedule": {"quota": 4},
            "exchange": {"uplink": "int8", "fragment_elements": FRAGMENT},
        }
        with paceline_server.local(config) as address:
            found = summary(asyncio.run(measure(address, tokens, arguments.rounds, arguments.exchanges)))
    if arguments.json:
        machine = f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}"
        print(json.dumps({"floods": found, "date": datetime.now(UTC).date().isoformat(), "machine": machine}, indent=1))
        return
    for name, each in found.items():
        print(
            f"{name:8} median {each['median_s'] * 1000:7.1f} ms ({each['median_ratio']:.2f}), "
            f"p99 {each['p99_s'] * 1000:7.1f} ms ({each['p99_ratio']:.2f})"
        )


if __name__ == "__main__":
    main()
