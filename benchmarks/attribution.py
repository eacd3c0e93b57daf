"""Where an exchange's processor time goes: client and shard sampled by `perf` while they exchange and do nothing else.

    python benchmarks/attribution.py

Needs Linux's `perf` and the right to sample own processes. Each sample counts for what it was in: the function's name,
the library, or the call of the kernel's below which it was; what is compiled by numba has no name, and is the kernels.
"""

import argparse
import asyncio
import os
import re
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
import uvloop

import paceline
from exchange import WARM_UP_ROUNDS, Seconds, Setting
from paceline_server.processes import ShardProcesses
from paceline_server.settings import config_from_mapping

HERTZ = 2000
_FRAME = re.compile(r"\s*[0-9a-f]+ (.*) \((.*)\)$")

KERNEL_CALLS = (
    (("page_fault",), "page faults"),
    (("sendmsg", "recvmsg"), "TCP"),
    (("futex", "epoll", "write", "sched", "irq"), "waking and waiting"),
)
"""What a sample in the kernel counts for, by parts of the names on its stack; the first that fits."""

SYMBOLS = (("crc32", "CRC-32"), ("direct_copy", "tensors copied by torch"))
LIBRARIES = (
    ("libc.", "malloc and the rest of libc"),
    ("cygrpc", "gRPC's own code"),
    ("libtorch_cpu", "codec kernels"),
    ("perf-", "codec kernels"),
    ("[JIT]", "codec kernels"),
)


class Sample(NamedTuple):
    """Which thread was running, and the names and libraries on its stack, the innermost first."""

    thread: str
    stack: Sequence[tuple[str, str]]


def cause_of(sample: Sample, loop_thread: str) -> str:
    """What a sample counts for."""
    if not sample.stack:
        return "unknown"
    name, library = sample.stack[0]
    if "kernel" in library:
        names = " ".join(each for each, of in sample.stack if "kernel" in of)
        return next((cause for parts, cause in KERNEL_CALLS if any(part in names for part in parts)), "kernel, other")
    if "memmove" in name:
        return f"memmove, {'event loop' if sample.thread == loop_thread else 'codec threads'}"
    found = [cause for part, cause in SYMBOLS if part in name]
    found += [cause for part, cause in LIBRARIES if library.startswith(part)]
    return found[0] if found else "Python and its modules"


def samples(data: Path) -> Iterator[Sample]:
    """What perf has recorded."""
    command = ["perf", "script", "-i", str(data), "-F", "tid,ip,sym,dso"]
    for block in subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n\n"):
        lines = block.strip("\n").splitlines()
        if lines:
            frames = (_FRAME.match(line) for line in lines[1:])
            stack = [(frame[1], frame[2].rpartition("/")[2]) for frame in frames if frame]
            yield Sample(thread=lines[0].split()[0].rstrip(":"), stack=stack)


async def measure(setting: Setting, folder: Path) -> dict[str, tuple[float, float, Counter[str]]]:
    """By side: processor milliseconds of a round as the kernel counts them, as samples do, and those by cause."""
    exchange = {"uplink": setting.uplink, "downlink": setting.downlink}
    config = {"listen": "127.0.0.1:0", "shards": 1, "exchange": exchange, "schedule": {"quota": 1}}
    shards = ShardProcesses(config_from_mapping(config))
    shards.start()
    pids = {"client": os.getpid(), "server": shards.processes[0].pid}
    spent = Seconds([pids["server"]])
    try:
        async with paceline.connect(f"127.0.0.1:{shards.ports[0]}", worker_id="bench") as client:
            tensors = {f"{index:03}": torch.randn(size) for index, size in enumerate(setting.sizes)}
            outer_gradient = {name: tensor * 0.01 for name, tensor in tensors.items()}
            await client.initialize(tensors)
            base = await client.fetch()
            for _ in range(2 * WARM_UP_ROUNDS):
                base = await client.exchange(outer_gradient, base)
            perfs = [_record(pid, folder / side) for side, pid in pids.items()]
            await asyncio.sleep(2)  # until perf has attached itself
            for _ in range(setting.rounds):
                with spent:
                    base = await client.exchange(outer_gradient, base)
            for perf in perfs:
                perf.terminate()
                perf.wait()
    finally:
        shards.stop()
    counted_s = {"client": spent.client_cpu, "server": spent.server_cpu}
    found: dict[str, tuple[float, float, Counter[str]]] = {}
    for side, pid in pids.items():
        causes = Counter(cause_of(sample, str(pid)) for sample in samples(folder / side))
        sampled = Counter({cause: 1000 * count / HERTZ / setting.rounds for cause, count in causes.items()})
        found[side] = 1000 * counted_s[side] / setting.rounds, sum(sampled.values()), sampled
    return found


def _record(pid: int, data: Path) -> "subprocess.Popen[bytes]":
    # A plain fork would make all of this process's pages copy-on-write; Popen does not fork so.
    command = ["perf", "record", "-q", "-e", "cpu-clock", "-F", str(HERTZ), "-g", "-o", str(data), "-p", str(pid)]
    return subprocess.Popen(command, stderr=subprocess.DEVNULL)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=100_000_000)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--uplink", default="int8")
    parser.add_argument("--downlink", default="int8")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    setting = Setting(
        parameters=asked.parameters, rounds=asked.rounds, uplink=asked.uplink, downlink=asked.downlink, shards=1
    )
    with TemporaryDirectory() as folder:
        sides = uvloop.run(measure(setting, Path(folder)))
    print(f"processor ms of a round of {setting.parameters:,} parameters, {time.strftime('%Y-%m-%d')}:")
    print(f"  {'':32}" + "".join(f"{side:>8}" for side in sides))
    for cause, _ in sum((causes for _, _, causes in sides.values()), Counter[str]()).most_common():
        print(f"  {cause:32}" + "".join(f"{causes[cause]:8.0f}" for _, _, causes in sides.values()))
    print(f"  {'all samples':32}" + "".join(f"{sampled:8.0f}" for _, sampled, _ in sides.values()))
    print(f"  {'as the kernel counts':32}" + "".join(f"{counted:8.0f}" for counted, _, _ in sides.values()))


if __name__ == "__main__":
    main()
