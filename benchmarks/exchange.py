"""How fast `exchange` moves bytes over loopback, beside a bare grpc.aio stream and raw TCP, in one run.

    python benchmarks/exchange.py --json > benchmarks/results/exchange.json

Each round has an exchange of all parameters (encoding, checking, applying and decoding included), the same bytes in
messages of the same size through a bare stream, and the same bytes over raw TCP; shares are medians over the rounds.
Each of the three has one client, this process, and servers of its own. The processor seconds of client and servers
stand beside what the stream and the kernels cost alone: the bare stream's, and those of the calls that both sides make
for a fragment, on one thread with nothing else running in this process.
"""

import argparse
import asyncio
import json
import os
import platform
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import grpc.aio
import torch
import uvloop

import echo
import kernels
import paceline
from paceline_server.processes import ShardProcesses
from paceline_server.settings import config_from_mapping
from paceline_wire import codecs
from paceline_wire.checksum import crc32
from paceline_wire.codecs import DIFFERENCE_CODECS

TENSOR_ELEMENTS = kernels.FRAGMENT
WARM_UP_ROUNDS = 3
"""Rounds of each that do not count: they pay for fresh memory and a cold connection."""

KERNEL_REPEATS = 9
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
REFERENCE_PARAMETERS = 100_000_000
"""Processor seconds are told for so many parameters."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is measured.

    Attributes:
        parameters: How many.
        rounds: Rounds that count.
        uplink: Codec of pushes.
        downlink: Codec of updates.
        shards: Server processes.
    """

    parameters: int
    rounds: int
    uplink: str
    downlink: str
    shards: int

    @property
    def sizes(self) -> list[int]:
        """Elements of each tensor."""
        starts = range(0, self.parameters, TENSOR_ELEMENTS)
        return [min(TENSOR_ELEMENTS, self.parameters - start) for start in starts]

    def num_bytes(self, codec: str) -> int:
        """Payload bytes of a round in a codec."""
        return sum(codecs.codec(codec).encoded_bytes(size) for size in self.sizes)


@dataclass
class Seconds:
    """What the rounds of one way took: wall, and processor seconds of this process and of its servers."""

    servers: Sequence[int]
    wall: list[float] = field(default_factory=list)
    client_cpu: float = 0.0
    server_cpu: float = 0.0

    def __enter__(self) -> "Seconds":
        self._began = time.perf_counter(), time.process_time(), _cpu_s(self.servers)
        return self

    def __exit__(self, *_: object) -> None:
        wall_s, client_s, server_s = self._began
        self.wall.append(time.perf_counter() - wall_s)
        self.client_cpu += time.process_time() - client_s
        self.server_cpu += _cpu_s(self.servers) - server_s

    def forget(self) -> None:
        """What was measured so far does not count."""
        self.wall.clear()
        self.client_cpu = self.server_cpu = 0.0


async def measure(setting: Setting) -> dict[str, Any]:
    """Measure one setting."""
    config = {
        "listen": "127.0.0.1:0",
        "shards": setting.shards,
        "exchange": {"uplink": setting.uplink, "downlink": setting.downlink},
        "schedule": {"quota": 1},
    }
    up, down = setting.num_bytes(setting.uplink), setting.num_bytes(setting.downlink)
    shards = ShardProcesses(config_from_mapping(config))
    shards.start()
    with ExitStack() as held:
        held.callback(shards.stop)
        bare_server, tcp_server = (held.enter_context(echo.EchoServer(kind)) for kind in ("grpc", "tcp"))
        connection = held.enter_context(socket.create_connection(("127.0.0.1", tcp_server.port)))
        exchange = Seconds([process.pid for process in shards.processes])
        bare, raw = Seconds([bare_server.process.pid]), Seconds([tcp_server.process.pid])
        async with (
            paceline.connect(f"127.0.0.1:{shards.ports[0]}", worker_id="bench") as client,
            grpc.aio.insecure_channel(f"127.0.0.1:{bare_server.port}", options=echo.options()) as channel,
        ):
            generator = torch.Generator().manual_seed(0)
            tensors = {
                f"{index:03}": torch.randn(size, generator=generator) for index, size in enumerate(setting.sizes)
            }
            outer_gradient = {name: tensor * 0.01 for name, tensor in tensors.items()}
            await client.initialize(tensors)
            base = await client.fetch()
            call: Any = channel.stream_stream(echo.METHOD)(metadata=echo.metadata(up, down))
            for number in range(WARM_UP_ROUNDS + setting.rounds):
                if number == WARM_UP_ROUNDS:
                    for each in (exchange, bare, raw):
                        each.forget()
                with exchange:
                    base = await client.exchange(outer_gradient, base)
                with bare:
                    await echo.bare_round(call, up, down)
                with raw:
                    await asyncio.to_thread(echo.raw_round, connection, up, down)
            call.cancel()
    return _summary(setting, up + down, exchange, bare, raw)


def _summary(setting: Setting, num_bytes: int, exchange: Seconds, bare: Seconds, raw: Seconds) -> dict[str, Any]:
    scale = REFERENCE_PARAMETERS / setting.parameters
    alone = kernel_seconds(setting)
    cpu: dict[str, dict[str, float]] = {}
    for side in ("client", "server"):
        used, streamed = (getattr(each, f"{side}_cpu") / setting.rounds * scale for each in (exchange, bare))
        parts = streamed + sum(alone[side].values())
        cpu[side] = {"exchange": used, "stream": streamed, **alone[side], "of_parts": used / parts}
    both = sum(each["exchange"] for each in cpu.values())
    parts = sum(each["exchange"] / each["of_parts"] for each in cpu.values())
    return {
        "parameters": setting.parameters,
        "uplink": setting.uplink,
        "downlink": setting.downlink,
        "shards": setting.shards,
        "rounds": setting.rounds,
        "megabytes": num_bytes / 1e6,
        "exchange_s": statistics.median(exchange.wall),
        "bare_s": statistics.median(bare.wall),
        "tcp_s": statistics.median(raw.wall),
        "exchange_of_bare": _shares(bare.wall, exchange.wall),
        "bare_of_tcp": _shares(raw.wall, bare.wall),
        "cpu_s_per_100m": cpu,
        "cpu_of_parts": both / parts,
        "walls_s": {"exchange": exchange.wall, "bare": bare.wall, "tcp": raw.wall},
    }


def kernel_seconds(setting: Setting) -> dict[str, dict[str, float]]:
    """Processor seconds per 100 M parameters of the calls that each side makes with a fragment's numbers."""
    memory = kernels.Memory(1)
    works: dict[str, dict[str, Callable[[int], Any]]] = {
        name: {operation.name: operation.work for operation in memory.operations(codecs.codec(name))}
        for name in {setting.uplink, setting.downlink}
    }
    uplink, downlink = works[setting.uplink], works[setting.downlink]
    payloads = [torch.zeros(codecs.codec(name).encoded_bytes(kernels.FRAGMENT), dtype=torch.uint8) for name in works]
    of_codec = dict(zip(works, payloads, strict=True))
    as_differences = setting.downlink in DIFFERENCE_CODECS
    target = torch.zeros(kernels.FRAGMENT)

    def checksums(_: int) -> None:
        crc32(of_codec[setting.uplink].numpy().data)
        crc32(of_codec[setting.downlink].numpy().data)

    sides: dict[str, dict[str, Callable[[int], Any]]] = {
        "client": {
            "encode": uplink["encode, error feedback"],
            "decode": downlink["follow a difference" if as_differences else "decode"],
            "copy to the base": lambda _: target.copy_(memory.values[0]),
            "checksums": checksums,
        },
        "server": {
            "check": uplink["norm"],
            "apply": uplink["apply"],
            "encode": downlink["encode a difference" if as_differences else "encode"],
            "checksums": checksums,
        },
    }
    return {side: {name: _thread_seconds(work) for name, work in works.items()} for side, works in sides.items()}


def _thread_seconds(work: Callable[[int], Any]) -> float:
    """Median processor seconds of work with one fragment, for 100 M parameters."""
    taken: list[float] = []
    for _ in range(KERNEL_REPEATS):
        began_s = time.thread_time()
        work(0)
        taken.append(time.thread_time() - began_s)
    return statistics.median(taken) * REFERENCE_PARAMETERS / kernels.FRAGMENT


def _shares(less: Sequence[float], more: Sequence[float]) -> dict[str, float]:
    """Of the rate of one way, what the other one moves: median, smallest and largest over the rounds."""
    shares = [one / other for one, other in zip(less, more, strict=True)]
    return {"median": statistics.median(shares), "min": min(shares), "max": max(shares)}


def _cpu_s(processes: Sequence[int]) -> float:
    """Processor seconds that processes have used so far, in ticks of the kernel's clock."""
    ticks = 0
    for process in processes:
        user, system = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:13]
        ticks += int(user) + int(system)
    return ticks / TICKS_PER_S


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=100_000_000)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--uplink", default="int8")
    parser.add_argument("--downlink", default="int8")
    parser.add_argument("--shards", default="1", help="numbers of server processes, with commas between them")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    settings = [
        Setting(
            parameters=arguments.parameters,
            rounds=arguments.rounds,
            uplink=arguments.uplink,
            downlink=arguments.downlink,
            shards=int(shards),
        )
        for shards in arguments.shards.split(",")
    ]
    runs = [uvloop.run(measure(setting)) for setting in settings]
    if arguments.json:
        print(json.dumps({"runs": runs, **_machine()}, indent=1))
        return
    for run in runs:
        _print(run)


def _machine() -> dict[str, Any]:
    names = ("grpcio", "isal", "numba", "protobuf", "torch", "uvloop")
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
        "load_average": os.getloadavg()[0],
        "versions": {name: version(name) for name in names} | {"python": platform.python_version()},
    }


def _print(run: dict[str, Any]) -> None:
    print(
        f"{run['parameters']:,} parameters, {run['uplink']} up and {run['downlink']} down, {run['shards']} shards, "
        f"{run['megabytes']:.0f} MB a round, median of {run['rounds']}:"
    )
    for name, label in (("exchange", "exchange"), ("bare", "bare stream"), ("tcp", "raw TCP")):
        print(f"  {label:12}{run[f'{name}_s']:7.3f} s{run['megabytes'] / run[f'{name}_s']:7.0f} MB/s")
    for name, label in (("exchange_of_bare", "exchange / bare"), ("bare_of_tcp", "bare / raw TCP")):
        print("  {:16} {median:.2f} ({min:.2f} to {max:.2f})".format(label, **run[name]))
    print("  processor seconds per 100 M parameters:")
    for side, seconds in run["cpu_s_per_100m"].items():
        parts = ", ".join(
            f"{name} {value:.3f}" for name, value in seconds.items() if name not in ("exchange", "of_parts")
        )
        print(f"    {side:7}{seconds['exchange']:.3f}, {seconds['of_parts']:.2f} of the parts ({parts})")
    print(f"    both: {run['cpu_of_parts']:.2f} of the parts")


if __name__ == "__main__":
    main()
