"""Paceline beside the systems that people use instead: seconds and bytes of an outer step, and how busy training stays.

    make bench-peers
    python benchmarks/peers.py --what exchange --parameters 10000000 --links loopback --systems paceline-int8 gloo

Two workers; a model of twenty float32 tensors, the same for all. `exchange`: blocking outer steps, from the model after
the inner steps to the model that the next ones begin with; the inner steps cost nothing. `utilization`: rounds of inner
steps that last a stated time, each system with the overlap that it has; how much of the wall time the inner steps are.
The repeats of all systems are interleaved. What is measured replaces the same cells in benchmarks/results/peers.json,
from which `--tables` fills docs/peers.md.

Every process has OMP_NUM_THREADS=1, as torchrun sets it: with torch's default, several processes on few cores spend
their time waiting for each other's threads. The peers live in an environment of their own, made with `--install`.
"""

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import venv
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import growth
import training_thread
from paceline_server.config_fields import config_fields
from peer_systems import places, tables
from peer_systems.measuring import DidNotRunError, Load, System, measure
from peer_systems.places import Places

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "peers.json"
VENV = ROOT / ".venv-peers"
REQUIREMENTS = ("torch==2.13.0", "numpy", "torchft==0.2.0", "flwr==1.42.0")
WORKERS = 2

INNER_STEPS = 50
STEP_S = 0.1
"""Fifty steps of 0.1 s: a round of 5 s, in which 1 Gbit/s carries 625 MB."""


def ours(label: str, codec: str, **options: str) -> System:
    """Paceline with a codec both ways, or with bf16 down where updates are not quantized so far."""
    down = codec if codec in config_fields()["exchange.downlink"].choices else "bf16"
    return System(
        label=label,
        module="paceline_join",
        is_ours=True,
        package="paceline",
        on_the_wire=codec if down == codec else f"{codec} up, {down} down",
        options={"uplink": codec, "downlink": down, **options},
    )


def gloo(on_the_wire: str, dtype: str) -> System:
    """torch.distributed's all-reduce of a flat outer gradient."""
    return System(
        label="torch.distributed, gloo",
        module="gloo",
        on_the_wire=on_the_wire,
        options={"dtype": dtype},
        has_coordinator=False,
        between_workers=True,
    )


def torchft(label: str, delay: int) -> System:
    """The DiLoCo of torchft, which sends fp32 wherever there is no CUDA."""
    return System(
        label=label,
        module="torchft_diloco",
        on_the_wire="fp32",
        options={"delay": str(delay)},
        between_workers=True,
        package="torchft",
    )


HTTP = System(label="http.server, torch.save", module="http_server", on_the_wire="bf16")
RPC = System(label="torch.distributed.rpc", module="rpc_server", on_the_wire="bf16")
FLOWER = System(
    label="Flower, gRPC, FedAvgM", module="flower", on_the_wire="fp32", package="flwr", bytes_per_parameter=220
)


def exchanging() -> dict[str, System]:
    """Every system as it makes a blocking outer step, by a short name."""
    blocking = {"schedule": "barrier", "overlap": "blocking"}
    return {
        "paceline-int8": ours("Paceline", "int8", **blocking),
        "paceline-int4": ours("Paceline", "int4", **blocking),
        "gloo": gloo("fp32", "float32"),
        "gloo-bf16": gloo("bf16", "bfloat16"),
        "torchft": torchft("torchft DiLoCo, gloo", 0),
        "http": HTTP,
        "rpc": RPC,
        "flower": FLOWER,
    }


def overlapping(inner_steps: int) -> dict[str, System]:
    """Every system as it hides its exchange behind inner steps, if it can, by a short name."""
    eager = {"schedule": "async", "overlap": "eager"}
    return {
        "paceline-int8": ours("Paceline, eager", "int8", **eager),
        "paceline-int4": ours("Paceline, eager", "int4", **eager),
        "gloo": gloo("fp32", "float32"),
        "gloo-bf16": gloo("bf16", "bfloat16"),
        "torchft": torchft("torchft DiLoCo, delayed", max(1, inner_steps - 1)),
        "http": HTTP,
    }


def loads(arguments: argparse.Namespace, what: str, parameters: int) -> Load:
    """What is exchanged, and how often: fewer rounds of large models, which take longest where they count least."""
    large = parameters > 20_000_000
    if what == "utilization":
        return Load(
            parameters=parameters,
            warm_up=2,  # the first answer is whole where later ones are differences, and comes in the second round
            rounds=arguments.rounds or 3,
            inner_steps=arguments.inner_steps,
            step_s=arguments.step_s,
            limit_s=arguments.limit_s,
        )
    return Load(
        parameters=parameters,
        warm_up=1 if large else 2,
        rounds=arguments.rounds or (3 if large else 5),
        limit_s=arguments.limit_s,
    )


def measure_all(
    systems: Mapping[str, System], links: Places, load: Load, repeats: int, python: str
) -> list[dict[str, Any]]:
    """Cells of all systems on one kind of links, the repeats interleaved.

    Args:
        systems: By short name.
        links: Where they run.
        load: What is exchanged.
        repeats: How often each system is started anew.
        python: The interpreter of the peers' environment.
    """
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in systems}
    reasons: dict[str, str] = {}
    for _ in range(repeats):
        for name, system in systems.items():
            if name in reasons:
                continue
            place = links.direct if system.between_workers else links.star
            try:
                run = measure(system, place, load, sys.executable if system.is_ours else python)
            except DidNotRunError as error:
                reasons[name] = str(error)
                continue
            found[name].append(run)
            print(f"{links.name}, {load.parameters:,} parameters, {name}: {_in_short(run)}", file=sys.stderr)
    return [cell(name, system, links.name, load, found[name], reasons.get(name)) for name, system in systems.items()]


def cell(
    name: str, system: System, link: str, load: Load, runs: Sequence[Mapping[str, Any]], reason: str | None
) -> dict[str, Any]:
    """What the repeats of one system say together: medians over all their outer steps."""
    key = {
        "what": "utilization" if load.step_s else "exchange",
        "system": name,
        "link": link,
        "parameters": load.parameters,
    }
    told = {"label": system.label, "on_the_wire": system.on_the_wire, "measured": datetime.now(UTC).date().isoformat()}
    if not runs:
        return key | told | {"not_run": reason}
    steps_s = [step_s for run in runs for step_s in run["step_s"]]
    medians = {
        field: statistics.median(run[field] for run in runs) if runs[0][field] is not None else None
        for field in (
            "wire_mb",
            "worker_cpu_s",
            "coordinator_cpu_s",
            "coordinator_mib",
            "worker_mib",
            "utilization",
            "utilization_stated",
        )
    }
    return (
        key
        | told
        | {
            "step_s": statistics.median(steps_s),
            "step_s_min": min(steps_s),
            "step_s_max": max(steps_s),
            "steps": len(steps_s),
            "runs": len(runs),
            **medians,
            "inner_steps": load.inner_steps,
            "inner_step_s": load.step_s,
            "sent_mb": runs[0]["sent_mb"],
            "received_mb": runs[0]["received_mb"],
            "version": runs[0]["versions"].get(system.package, ""),
            "versions": runs[0]["versions"],
        }
    )


def install(folder: Path) -> None:
    """Make the peers' environment."""
    venv.create(folder, with_pip=True)
    subprocess.run([folder / "bin" / "python", "-m", "pip", "install", "--quiet", *REQUIREMENTS], check=True)


def merged(old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The old cells, with those that were measured again replaced."""
    cells = {_key(each): each for each in old} | {_key(each): each for each in new}
    return list(cells.values())


def main() -> None:
    """Measure, or fill the tables."""
    arguments = _parsed()
    if arguments.install:
        install(arguments.venv)
        return
    if arguments.tables:
        tables.fill(ROOT, _other_tables())
        return
    # A terminated run ends what it started on its way out; Python would not unwind on SIGTERM by itself.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    cells: list[dict[str, Any]] = []
    for found in _measured(arguments):
        cells += found
        _keep(arguments.output, found)
    print(json.dumps(cells) if arguments.json else tables.exchange_table(cells) + tables.utilization_table(cells))


def _other_tables() -> dict[str, str]:
    """Tables of the page that other benchmarks measured; those without results are left as they are."""
    found = {}
    for name, key, table in (("training_thread", "cells", training_thread.table), ("growth", "series", growth.table)):
        results = RESULTS.with_name(f"{name}.json")
        if results.exists():
            found[name] = table(json.loads(results.read_text())[key])
    return found


def _keep(output: Path, cells: Sequence[Mapping[str, Any]]) -> None:
    """Put cells into the file of results, which holds what earlier runs measured."""
    kept = json.loads(output.read_text())["cells"] if output.exists() else []
    report = {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()} {platform.release()}, "
        f"Python {platform.python_version()}",
        "workers": WORKERS,
        "cells": merged(kept, cells),
    }
    output.write_text(json.dumps(report, indent=1) + "\n")


def _measured(arguments: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    python = str(arguments.venv / "bin" / "python")
    for what in arguments.what:
        known = exchanging() if what == "exchange" else overlapping(arguments.inner_steps)
        systems = {name: system for name, system in known.items() if name in (arguments.systems or known)}
        for link in arguments.links:
            with _places(link) as links:
                for parameters in arguments.parameters or _sizes(what, link):
                    load = loads(arguments, what, parameters)
                    yield measure_all(systems, links, load, arguments.repeats, python)


def _places(link: str) -> AbstractContextManager[Places]:
    return places.loopback(WORKERS) if link == "loopback" else places.emulated(link, WORKERS)


def _sizes(what: str, link: str) -> list[int]:
    if what == "utilization":
        return [50_000_000, 200_000_000]
    return [10_000_000, 100_000_000] if link == "loopback" else [10_000_000]


def _key(each: Mapping[str, Any]) -> tuple[Any, ...]:
    return each["what"], each["system"], each["link"], each["parameters"]


def _in_short(run: Mapping[str, Any]) -> str:
    busy = (
        ""
        if run["utilization"] is None
        else f", utilization {run['utilization']:.4f} ({run['utilization_stated']:.4f} stated)"
    )
    return f"{statistics.median(run['step_s']):.3f} s, {run['wire_mb']:.1f} MB on the wire{busy}"


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", nargs="+", choices=("exchange", "utilization"), default=["exchange"])
    parser.add_argument("--systems", nargs="*", help="short names; all if left out")
    parser.add_argument("--parameters", type=int, nargs="*", help="sizes of the model")
    parser.add_argument(
        "--links", nargs="+", default=["loopback"], help="loopback, or RATE_MBIT:RTT_MS such as 1000:20"
    )
    parser.add_argument("--repeats", type=int, default=3, help="how often each system is started")
    parser.add_argument("--rounds", type=int, help="outer steps of each start that count")
    parser.add_argument("--inner-steps", type=int, default=INNER_STEPS)
    parser.add_argument("--step-s", type=float, default=STEP_S, help="seconds that an inner step lasts")
    parser.add_argument("--limit-s", type=float, default=300.0, help="seconds after which a run is given up")
    parser.add_argument("--quick", action="store_true", help="10 M parameters, each system once: about a minute")
    parser.add_argument("--venv", type=Path, default=VENV, help="the peers' environment")
    parser.add_argument("--install", action="store_true", help="make the peers' environment, and measure nothing")
    parser.add_argument("--tables", action="store_true", help="fill the tables of docs/peers.md, and measure nothing")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--json", action="store_true", help="print the measured cells as JSON")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.parameters, arguments.repeats = [10_000_000], 1
    return arguments


if __name__ == "__main__":
    main()
