"""How the cost of a round grows with parameters, workers and fragments: a picture, and where it is not linear.

    make bench-growth
    python benchmarks/growth.py --what parameters workers --json

One server process and one process with all workers, over loopback, blocking exchanges of the asyncio client.
`parameters`: one worker, 1 M to 500 M parameters, as far as memory allows. `workers`: 1 to 64 with a small model, a
quota of one push. `fragments`: 16 M parameters cut into 4 to 4096. Each point is a run of its own. Wall seconds are a
median; CPU seconds are of all rounds that count. An exponent tells how fast cost grows from one point to another: 1 is
linear.
"""

import argparse
import asyncio
import gc
import itertools
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

import paceline
from paceline_server.processes import ShardProcesses
from paceline_server.settings import config_from_mapping
from paceline_wire.memory import give_back_free_memory
from resident import cpu_s, peak_resident_mib

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "growth.json"
PLOT = ROOT / "docs" / "plots" / "growth.png"

MILLION = 1_000_000
FRAGMENT = 4 * 1024 * 1024
BYTES_PER_PARAMETER = 40
"""Memory of client and server together at most, for each parameter of each worker."""

COSTS = {"wall_s": "wall", "client_cpu_s": "CPU, client", "server_cpu_s": "CPU, server"}
COLOURS = ("#000000", "#0072B2", "#D55E00")
"""From Okabe and Ito's palette, which colour-blind readers can tell apart."""
MARKERS = ("o", "s", "^")


@dataclass(frozen=True, kw_only=True)
class Point:
    """What one run exchanges."""

    parameters: int
    workers: int = 1
    fragment_elements: int = FRAGMENT

    @property
    def fragments(self) -> int:
        """Fragments of the model."""
        return math.ceil(self.parameters / self.fragment_elements)


SERIES: dict[str, tuple[str, list[Point]]] = {
    "parameters": ("parameters", [Point(parameters=size * MILLION) for size in (1, 2, 5, 10, 20, 50, 100, 200, 500)]),
    "workers": ("workers", [Point(parameters=MILLION // 4, workers=count) for count in (1, 2, 4, 8, 16, 32, 64)]),
    "fragments": (
        "fragments",
        [Point(parameters=4 * FRAGMENT, fragment_elements=FRAGMENT // parts) for parts in (1, 4, 16, 64, 256, 1024)],
    ),
}
"""For each series, the field of a point that grows, and its points."""

WARM_UP_ROUNDS = 4
LEAST_ROUNDS = 5
BUFFER_MIB = 1024
"""What the server may set aside for payloads: as much as its log asks for at 64 workers."""

QUICK_LIMITS = {"parameters": 20 * MILLION, "workers": 16, "fragments": 256}


@contextmanager
def server(config: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """A server: its address and process."""
    shards = ShardProcesses(config_from_mapping({"listen": "127.0.0.1:0", **config}))
    shards.start()
    try:
        yield f"127.0.0.1:{shards.ports[0]}", shards.processes[0].pid
    finally:
        shards.stop()


async def measure(point: Point, uplink: str, downlink: str, seconds: float) -> dict[str, Any]:
    """Exchange again and again for some seconds, all workers at once."""
    config = {
        "schedule": {"quota": 1},
        "exchange": {
            "uplink": uplink,
            "downlink": downlink,
            "fragment_elements": point.fragment_elements,
            "buffer_mib": BUFFER_MIB,
        },
    }
    sizes = [FRAGMENT] * (point.parameters // FRAGMENT)
    if point.parameters % FRAGMENT:
        sizes.append(point.parameters % FRAGMENT)
    tensors = {f"{number:04d}": torch.randn(size) for number, size in enumerate(sizes)}
    outer_gradient = {name: tensor * 0.01 for name, tensor in tensors.items()}
    with server(config) as (address, pid):
        async with AsyncExitStack() as stack:
            clients = [
                await stack.enter_async_context(paceline.connect(address, worker_id=f"worker{number}"))
                for number in range(point.workers)
            ]
            await clients[0].initialize(tensors)
            del tensors
            bases = [await client.fetch() for client in clients]

            async def exchange(number: int) -> None:
                bases[number] = await clients[number].exchange(outer_gradient, bases[number])

            async def one_round() -> float:
                began_s = time.perf_counter()
                await asyncio.gather(*(exchange(number) for number in range(point.workers)))
                return time.perf_counter() - began_s

            # The first rounds pay for fresh memory, large models' longer than a second one's.
            warm_s = [await one_round() for _ in range(WARM_UP_ROUNDS)][-1]
            before_s = time.process_time(), cpu_s(pid)
            walls_s = [await one_round() for _ in range(max(LEAST_ROUNDS, min(50, round(seconds / warm_s))))]
            after_s = time.process_time(), cpu_s(pid)
            resident_mib = peak_resident_mib(pid)
    return {
        "parameters": point.parameters,
        "workers": point.workers,
        "fragments": point.fragments,
        "rounds": len(walls_s),
        "wall_s": statistics.median(walls_s),
        "client_cpu_s": (after_s[0] - before_s[0]) / len(walls_s),
        "server_cpu_s": (after_s[1] - before_s[1]) / len(walls_s),
        "server_mib": resident_mib,
    }


def exponents(measured: Sequence[dict[str, Any]], field: str, cost: str) -> list[float]:
    """How fast a cost grows from each point to the next: the slope between them in logarithms; 1 is linear."""
    return [
        math.log(after[cost] / before[cost]) / math.log(after[field] / before[field])
        for before, after in itertools.pairwise(measured)
        if before[cost] > 0 and after[cost] > 0
    ]


def upper_half(measured: Sequence[dict[str, Any]], field: str, cost: str) -> float:
    """How fast a cost grows from the middle point to the last: what a fixed cost and single points blur least."""
    if len(measured) < 2:
        return math.nan
    (found,) = exponents([measured[(len(measured) - 1) // 2], measured[-1]], field, cost) or [math.nan]
    return found


def series(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """All points of a series, those that memory allows."""
    field, points = SERIES[name]
    measured, left_out = [], []
    for point in points:
        size = getattr(point, field)
        if size > arguments.limits.get(name, math.inf):
            left_out.append({field: size, "reason": "above the limit asked for"})
            continue
        needed_gib, free_gib = BYTES_PER_PARAMETER * point.parameters * point.workers / 2**30, _free_gib()
        if needed_gib > free_gib:
            reason = f"needs about {needed_gib:.0f} GiB of memory; {free_gib:.0f} GiB are free"
            left_out.append({field: size, "reason": reason})
            continue
        measured.append(asyncio.run(measure(point, arguments.uplink, arguments.downlink, arguments.seconds)))
        gc.collect()  # a client's buffers are large: the next point's must not come on top of them
        give_back_free_memory()
        print(f"{name}: {json.dumps(measured[-1])}", file=sys.stderr)
    return {
        "name": name,
        "field": field,
        "points": measured,
        "left_out": left_out,
        "upper_half": {cost: upper_half(measured, field, cost) for cost in COSTS},
        "exponents": {cost: exponents(measured, field, cost) for cost in COSTS},
    }


def draw(found: Sequence[dict[str, Any]]) -> Figure:
    """A panel for each series, both axes logarithmic; the dotted lines are linear."""
    figure = Figure(figsize=(4.4 * len(found), 3.8), layout="constrained")
    for panel, each in zip(figure.subplots(1, len(found), squeeze=False)[0], found, strict=True):
        sizes = [point[each["field"]] for point in each["points"]]
        for (cost, label), colour, marker in zip(COSTS.items(), COLOURS, MARKERS, strict=True):
            values = [point[cost] for point in each["points"]]
            panel.plot(sizes, values, color=colour, marker=marker, markersize=5, label=label)
            linear = [values[-1] * size / sizes[-1] for size in sizes]
            panel.plot(sizes, linear, color=colour, linewidth=0.8, linestyle=":")
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_xlabel(each["name"])
        panel.set_ylabel("seconds a round")
        panel.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    return figure


def table(found: Sequence[dict[str, Any]]) -> str:
    """Every point, and the steepest growth of each series."""
    lines = []
    for each in found:
        lines += [
            f"| {each['name']} | wall, s | CPU client, s | CPU server, s | server, MiB |",
            "| --- | --- | --- | --- | --- |",
            *(
                f"| {point[each['field']]:,} | {point['wall_s']:.4f} | {point['client_cpu_s']:.4f} "
                f"| {point['server_cpu_s']:.4f} | {point['server_mib']:.0f} |"
                for point in each["points"]
            ),
            "",
            "Exponent of the upper half: "
            + ", ".join(f"{label} {each['upper_half'][cost]:.2f}" for cost, label in COSTS.items())
            + "; of the steepest step: "
            + ", ".join(
                f"{label} {max(each['exponents'][cost], default=math.nan):.2f}" for cost, label in COSTS.items()
            )
            + ".",
            *(f"Left out: {left[each['field']]:,} ({left['reason']})" for left in each["left_out"]),
            "",
        ]
    return "\n".join(lines)


def main() -> None:
    """Measure, write, draw."""
    arguments = _parsed()
    kept = json.loads(arguments.output.read_text())["series"] if arguments.output.exists() else []
    # The kernels are compiled at their first use, in this process too.
    asyncio.run(measure(Point(parameters=FRAGMENT), arguments.uplink, arguments.downlink, seconds=0))
    found = [series(name, arguments) for name in arguments.what]
    by_name = {each["name"]: each for each in [*kept, *found]}
    report = {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "measured": datetime.now(UTC).date().isoformat(),
        "versions": {name: version(name) for name in ("grpcio", "torch")},
        "uplink": arguments.uplink,
        "downlink": arguments.downlink,
        "series": [by_name[name] for name in SERIES if name in by_name],
    }
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    if arguments.plot:
        draw(report["series"]).savefig(PLOT, dpi=110)
    print(json.dumps(report) if arguments.json else table(found))


def _free_gib() -> float:
    lines = Path("/proc/meminfo").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields["MemAvailable"].split()[0]) / 2**20


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", nargs="+", choices=tuple(SERIES), default=list(SERIES))
    parser.add_argument("--seconds", type=float, default=5.0, help="how long to measure a point, about")
    parser.add_argument("--uplink", default="int8")
    parser.add_argument("--downlink", default="int8")
    parser.add_argument("--largest", type=int, help="the largest number of parameters")
    parser.add_argument("--quick", action="store_true", help="the smaller points, about a minute")
    parser.add_argument("--no-plot", dest="plot", action="store_false", help="leave docs/plots/growth.png as it is")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    arguments.limits = dict(QUICK_LIMITS) if arguments.quick else {}
    if arguments.largest:
        arguments.limits["parameters"] = arguments.largest
    if arguments.quick:
        arguments.seconds = min(arguments.seconds, 1.0)
    return arguments


if __name__ == "__main__":
    main()
