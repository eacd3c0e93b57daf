"""Does anything grow? Thousands of rounds and hundreds of reconnects, with both sides' resident memory watched.

A real server process and real workers, each a process behind a link of its own. Two train on and on, one through `join`
and one through `connect`, and their connections are cut again and again. One comes and goes under new names, and as new
incarnations of a name that is still connected. One is killed and started again. Resident memory is read from /proc; a
straight line through what was read after a warm-up is the growth, in MiB per 1000 rounds.
"""

import argparse
import asyncio
import json
import os
import platform
import subprocess
import sys
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

import paceline
from paceline.relay import Relay
from paceline_server.processes import ShardProcesses
from paceline_server.settings import config_from_mapping
from resident import resident_mib, slope

WIDTH = 256
LAYERS = 4
CONFIG = {
    "listen": "127.0.0.1:0",
    "outer": {"lr": 0.1},
    "schedule": {"quota": 4, "lease_s": 5.0},
    "exchange": {"inner_steps": 4, "dynamic_inner_steps": False, "fragment_elements": 65536},
}
STEP_S = 0.01
"""What a step takes: slow enough to leave the machine to others."""

SAMPLE_S = 2.0
CUT_EVERY_S = 2.0
KILL_EVERY_S = 20.0
WARM_UP = 0.3
"""Part of the rounds that does not count: until then malloc's heap and the libraries' caches reach their size."""

BOUND_MIB = 0.5
"""Growth per 1000 rounds above which the soak fails. Half a KiB a round is far below what a forgotten message, payload
or update for each reconnect would make, and a million rounds then stay within half a GiB. What is known to grow is the
ledger: for each name that ever pushed, some 0.6 KiB a fragment."""

PATIENCE_S = 60.0


class Network(nn.Module):
    """A few linear layers: some fragments of 256 KiB."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """X (B, WIDTH) -> (B, WIDTH)."""
        y: torch.Tensor = self.layers(x)
        return y


def train(address: str, name: str) -> None:
    """Train through `join` until killed."""
    torch.set_num_threads(1)
    model = Network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with paceline.join(address, model, optimizer, worker_id=name):
        while True:
            optimizer.zero_grad()
            model(torch.randn(4, WIDTH)).square().mean().backward()
            optimizer.step()
            time.sleep(STEP_S)


async def exchange(address: str, name: str) -> None:
    """Exchange through `connect` until killed."""
    async with paceline.connect(address, worker_id=name) as client:
        await client.initialize(dict(Network().named_parameters()))
        base = await client.fetch()
        while True:
            gradient = {key: tensor * 1e-3 for key, tensor in base.tensors.items()}
            base = await client.exchange(gradient, base)
            await asyncio.sleep(4 * STEP_S)


async def come_and_go(address: str, name: str) -> None:
    """Join under one name after another, every other time twice at once, and leave."""
    number = 0
    while True:
        number += 1
        async with paceline.connect(address, worker_id=f"{name}-{number // 4}") as client:
            base = await client.fetch()
            base = await client.exchange(base.tensors, base)
            if number % 2:
                async with paceline.connect(address, worker_id=f"{name}-{number // 4}") as newer:
                    await newer.exchange(base.tensors, base)
        print(number, flush=True)
        await asyncio.sleep(1.0)


WORKERS = {"train": train, "exchange": exchange, "come-and-go": come_and_go}


@dataclass
class Watched:
    """A process and what was read of it: (rounds, MiB)."""

    name: str
    pid: int
    points: list[tuple[float, float]] = field(default_factory=list)

    def look(self, rounds: float) -> None:
        """Read what it has resident."""
        self.points.append((rounds, resident_mib(self.pid)))

    def report(self, total_rounds: float) -> dict[str, Any]:
        """Its growth after the warm-up."""
        counted = [point for point in self.points if point[0] >= WARM_UP * total_rounds]
        growth_mib = 1000 * slope(counted)
        return {
            "growth_mib_per_1000_rounds": round(growth_mib, 3),
            "held": growth_mib <= BOUND_MIB,
            "first_mib": round(counted[0][1], 1),
            "last_mib": round(counted[-1][1], 1),
            "rounds_and_mib": [(round(rounds), round(mib, 1)) for rounds, mib in self.points],
        }


def started(kind: str, port: int, name: str) -> "subprocess.Popen[str]":
    """A worker's process."""
    command = [sys.executable, __file__, "--worker", kind, "--address", f"127.0.0.1:{port}", "--name", name]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, text=True)


class Soak:
    """The processes of a soak, and what happens to them.

    Args:
        rounds: Rounds after which it ends, over all workers.
        pid: The server's process.
        address: Where it listens.
    """

    def __init__(self, rounds: int, pid: int, address: str) -> None:
        self._rounds = rounds
        self._server = Watched("server", pid)
        self._address = address
        self._processes: dict[str, subprocess.Popen[str]] = {}
        self.cuts = 0
        self.kills = 0

    async def run(self) -> dict[str, Any]:
        """Play it to the end."""
        host, _, port = self._address.rpartition(":")
        began_s = time.monotonic()
        async with AsyncExitStack() as stack:
            relays = {
                kind: await stack.enter_async_context(Relay(host, int(port), delay_s=0.005))
                for kind in (*WORKERS, "killed")
            }
            stack.callback(self._stop)
            for kind in WORKERS:
                self._processes[kind] = started(kind, relays[kind].port, kind)
            self._processes["killed"] = started("train", relays["killed"].port, "killed")
            watched = [self._server, *(Watched(kind, self._processes[kind].pid) for kind in WORKERS)]
            disturbing = asyncio.create_task(self._disturb(relays))
            disturbing.add_done_callback(lambda task: task.cancelled() or task.result())
            await self._watch(watched)
            disturbing.cancel()
        return {
            "rounds": round(watched[0].points[-1][0]),
            "seconds": round(time.monotonic() - began_s),
            "connections_made": sum(relay.num_accepted for relay in relays.values()),
            "connections_cut": self.cuts,
            "workers_killed": self.kills,
            "bound_mib_per_1000_rounds": BOUND_MIB,
            "processes": {process.name: process.report(self._rounds) for process in watched},
        }

    async def _watch(self, watched: list[Watched]) -> None:
        """Look at all processes until the rounds are done.

        Raises:
            RuntimeError: No round was done for long, or a watched worker ended.
        """
        async with paceline.connect(self._address) as observer:
            last, moved_s = -1.0, time.monotonic()
            while last < self._rounds:
                await asyncio.sleep(SAMPLE_S)
                [status] = await observer.statuses()
                rounds = status.pushes_applied / max(1, status.num_fragments)
                if rounds > last:
                    last, moved_s = rounds, time.monotonic()
                ended = [kind for kind in WORKERS if self._processes[kind].poll() is not None]
                if ended or time.monotonic() > moved_s + PATIENCE_S:
                    raise RuntimeError(f"ended: {ended}; {rounds} rounds were done")
                for process in watched:
                    process.look(rounds)

    async def _disturb(self, relays: dict[str, Relay]) -> None:
        """Cut connections in turn, and kill a worker now and then."""
        killed_s = time.monotonic()
        while True:
            for kind in ("train", "exchange", "come-and-go"):
                await asyncio.sleep(CUT_EVERY_S)
                if kind != "come-and-go":
                    self.cuts += relays[kind].cut()
                if time.monotonic() > killed_s + KILL_EVERY_S:
                    killed_s = time.monotonic()
                    self.kills += 1
                    self._processes["killed"].kill()
                    self._processes["killed"].wait()
                    self._processes["killed"] = started("train", relays["killed"].port, "killed")

    def _stop(self) -> None:
        for process in self._processes.values():
            process.kill()
            process.wait()


def run(rounds: int) -> dict[str, Any]:
    """Start a server and soak it."""
    shards = ShardProcesses(config_from_mapping(CONFIG))
    shards.start()
    try:
        soak = Soak(rounds, shards.processes[0].pid, f"127.0.0.1:{shards.ports[0]}")
        result = asyncio.run(soak.run())
    finally:
        shards.stop()
    return result | {
        "held": all(process["held"] for process in result["processes"].values()),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
        "versions": {name: version(name) for name in ("grpcio", "protobuf", "torch", "uvloop")}
        | {"python": platform.python_version()},
    }


def main() -> None:
    """Entry point; exits with 1 if something grew faster than the bound."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20_000, help="of all workers together")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--worker", choices=sorted(WORKERS), help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    parser.add_argument("--name", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work = WORKERS[arguments.worker](arguments.address, arguments.name)
        if work is not None:
            asyncio.run(work)
        return
    result = run(arguments.rounds)
    if arguments.json:
        print(json.dumps(result))
    else:
        _print(result)
    sys.exit(0 if result["held"] else 1)


def _print(result: dict[str, Any]) -> None:
    print(
        f"{result['rounds']} rounds in {result['seconds']} s, {result['connections_made']} connections made, "
        f"{result['connections_cut']} cut, "
        f"{result['workers_killed']} workers killed; at most {result['bound_mib_per_1000_rounds']} MiB per 1000 rounds:"
    )
    for name, process in result["processes"].items():
        growth = f"{process['growth_mib_per_1000_rounds']:7.3f} MiB per 1000 rounds"
        print(f"  {name:12} {growth}, {process['first_mib']:.1f} to {process['last_mib']:.1f} MiB")


if __name__ == "__main__":
    main()
