"""Runs one system once: starts its processes, reads what its workers recorded, ends what is left."""

import contextlib
import json
import math
import os
import re
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from peer_systems.places import Place, Seat
from peer_systems.setting import Setting
from resident import cpu_s, peak_resident_mib

BENCHMARKS = Path(__file__).resolve().parent.parent
PORT = 29517
"""In a namespace of its own every port is free; without one, this is above what is usually taken."""
STOP_S = 10.0


class DidNotRunError(Exception):
    """A system that could not be measured; the text says why."""


@dataclass(frozen=True, kw_only=True)
class System:
    """One way to exchange a model."""

    label: str
    """What the tables call it."""
    module: str
    """Its module in this package."""
    on_the_wire: str
    """What a parameter is sent as."""
    options: Mapping[str, str] = field(default_factory=dict)
    has_coordinator: bool = True
    is_ours: bool = False
    """Whether it runs in this environment, not in the peers'."""
    between_workers: bool = False
    """Whether the workers speak to each other directly."""
    package: str = "torch"
    """The package whose version tells the system's."""
    bytes_per_parameter: int = 100
    """Memory that all its processes together take at most, for each parameter."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is exchanged, and how often."""

    parameters: int
    warm_up: int
    rounds: int
    inner_steps: int = 1
    step_s: float = 0.0
    limit_s: float = 300.0
    """Seconds after which a run is given up."""


def measure(system: System, place: Place, load: Load, python: str) -> dict[str, Any]:
    """Run a system once.

    Args:
        system: The system.
        place: Where its processes run.
        load: What they exchange.
        python: The interpreter that has the system.

    Returns:
        step_s: Seconds of each outer step, from the last worker's begin to the last worker's end.
        utilization: Time in inner steps over wall time, the mean of the workers; None without a stated time.
        utilization_stated: The same with the stated time of the inner steps: lower where something, such as the
            exchange's own threads, keeps them from a core.
        wire_mb: Megabytes on the wire for each outer step, all workers, both directions, headers included.
        sent_mb, received_mb: For each worker, what the interfaces that it sees sent and received in an outer step.
        worker_cpu_s: CPU seconds of a worker for each outer step, its inner steps included; the mean.
        coordinator_cpu_s: The same of the coordinator and its processes.
        coordinator_mib, worker_mib: Peak resident memory of the largest process.
        versions: Of the packages involved.

    Raises:
        DidNotRunError: A process failed, the run took longer than its limit, or there is not enough free memory.
    """
    _require_memory(system, load)
    setting = Setting(
        system=system.module,
        role="coordinator",
        workers=len(place.workers),
        parameters=load.parameters,
        warm_up=load.warm_up,
        rounds=load.rounds,
        inner_steps=load.inner_steps,
        step_s=load.step_s,
        host=place.coordinator.host,
        coordinator_host=place.coordinator.host if system.has_coordinator else place.workers[0].host,
        port=PORT,
        interface=place.coordinator.interface,
        options=dict(system.options),
    )
    with ExitStack() as stack:
        limit = stack.enter_context(_limit(load.limit_s))
        processes = []
        if system.has_coordinator:
            processes.append(stack.enter_context(_Process(python, setting, place.coordinator, limit)))
            processes[0].event("ready")
        workers = [
            stack.enter_context(_Process(python, _as_worker(setting, rank, seat), seat, limit))
            for rank, seat in enumerate(place.workers)
        ]
        processes += workers
        coordinator_cpu_s = []
        for event in ("warm", "last"):
            for worker in workers:
                worker.event(event)
            coordinator_cpu_s.append(processes[0].cpu_s() if system.has_coordinator else 0.0)
        reports = [worker.event("done") for worker in workers]
        resident = [process.peak_mib() for process in processes]
    found = summary(place, load, [report["exchanges"] for report in reports])
    found["coordinator_cpu_s"] = (coordinator_cpu_s[1] - coordinator_cpu_s[0]) / load.rounds
    found["coordinator_mib"] = resident[0] if system.has_coordinator else None
    found["worker_mib"] = max(resident[-len(workers) :])
    found["versions"] = reports[0]["versions"]
    return found


def summary(place: Place, load: Load, exchanges: Sequence[Sequence[Mapping[str, float]]]) -> dict[str, Any]:
    """What the workers' records say of the rounds that count; see `measure`."""
    counted = [each[load.warm_up :] for each in exchanges]
    before = [each[load.warm_up - 1] for each in exchanges]
    steps_s = [
        max(each["ended_s"] for each in together) - max(each["began_s"] for each in together)
        for together in zip(*counted, strict=True)
    ]
    traffic = [
        {way: (each[-1][way] - first[way]) / load.rounds / 1e6 for way in ("sent", "received")}
        for each, first in zip(counted, before, strict=True)
    ]
    walls_s = [each[-1]["ended_s"] - first["ended_s"] for each, first in zip(counted, before, strict=True)]
    cpus_s = [each[-1]["cpu_s"] - first["cpu_s"] for each, first in zip(counted, before, strict=True)]
    inners_s = [each[-1]["inner_s"] - first["inner_s"] for each, first in zip(counted, before, strict=True)]
    stated_s = load.rounds * load.inner_steps * load.step_s
    return {
        "step_s": steps_s,
        "utilization": statistics.mean(_shares(inners_s, walls_s)) if stated_s else None,
        "utilization_stated": statistics.mean(stated_s / wall_s for wall_s in walls_s) if stated_s else None,
        "worker_cpu_s": statistics.mean(cpus_s) / load.rounds,
        "wire_mb": place.wire_bytes(traffic),
        "sent_mb": [each["sent"] for each in traffic],
        "received_mb": [each["received"] for each in traffic],
    }


def _shares(parts: Sequence[float], wholes: Sequence[float]) -> list[float]:
    return [part / whole for part, whole in zip(parts, wholes, strict=True)]


def _require_memory(system: System, load: Load) -> None:
    needed_gib = system.bytes_per_parameter * load.parameters / 2**30
    found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    free_gib = int(found[1]) / 2**20 if found else math.inf
    if free_gib < needed_gib:
        raise DidNotRunError(f"needs about {needed_gib:.0f} GiB of memory; {free_gib:.0f} GiB are free")


def _as_worker(setting: Setting, rank: int, seat: Seat) -> Setting:
    return replace(setting, role="worker", rank=rank, host=seat.host, interface=seat.interface)


class _Limit:
    """Ends processes when the time is over."""

    def __init__(self) -> None:
        self.passed = False
        self.processes: list[subprocess.Popen[str]] = []

    def expire(self) -> None:
        self.passed = True
        for process in self.processes:
            process.kill()


@contextmanager
def _limit(limit_s: float) -> Iterator[_Limit]:
    limit = _Limit()
    timer = threading.Timer(limit_s, limit.expire)
    timer.start()
    try:
        yield limit
    finally:
        timer.cancel()


class _Process:
    """One process of a system, in a group of its own, which ends with the context."""

    def __init__(self, python: str, setting: Setting, seat: Seat, limit: _Limit) -> None:
        self._limit = limit
        self._name = f"the {setting.role}" if setting.role == "coordinator" else f"worker {setting.rank}"
        command = [python, "-m", "peer_systems.process", setting.to_json()]
        # Paceline's own packages too where they are not installed: what runs is this checkout.
        paths = [
            str(BENCHMARKS),
            *(os.environ.get("PYTHONPATH", "").split(os.pathsep) if python == sys.executable else []),
        ]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
        self._process = seat.start(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,
        )
        limit.processes.append(self._process)
        self._last_words: list[str] = []
        self._listener = threading.Thread(target=self._listen, args=(self._process.stderr,), daemon=True)
        self._listener.start()

    def __enter__(self) -> "_Process":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, 9)  # what it started and left

    def event(self, name: str) -> dict[str, Any]:
        """Wait for a line of JSON with this event; other lines are passed over."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if not line.startswith('{"event"'):
                continue
            told: dict[str, Any] = json.loads(line)
            if told["event"] == name:
                return told
        if self._limit.passed:
            raise DidNotRunError("did not finish within its limit")
        self._process.wait(STOP_S)
        self._listener.join(STOP_S)
        words = next((line for line in reversed(self._last_words) if line.strip()), "no message")
        raise DidNotRunError(f"{self._name} ended with code {self._process.returncode}: {words.strip()[:300]}")

    def cpu_s(self) -> float:
        """CPU seconds of the process and its children so far."""
        return sum(cpu_s(pid) for pid in self._pids())

    def peak_mib(self) -> float:
        """Peak resident memory of the largest of the process and its children, MiB."""
        found = [0.0]
        for pid in self._pids():
            with contextlib.suppress(ProcessLookupError):  # a child that has ended meanwhile
                found.append(peak_resident_mib(pid))
        return max(found)

    def _pids(self) -> list[int]:
        pids = [self._process.pid]
        for pid in pids:  # grows while it is read
            for children in Path(f"/proc/{pid}/task").glob("*/children"):
                pids += [int(child) for child in children.read_text().split()]
        return pids

    def _listen(self, errors: IO[str]) -> None:
        for line in errors:
            self._last_words.append(line)
            del self._last_words[:-50]
