"""The papers' settings through real processes and sockets, beside the simulator: OrMo's single gradients and DiLoCo.

    python benchmarks/real.py             plays everything, prints tables, writes benchmarks/results/real.json
    python benchmarks/real.py --report    plays nothing; puts the tables of what is kept there into docs/results.md

Every run is played for real, by worker processes against a server process, and by the simulator, with the same first
parameters and the same samples. Needs Fashion-MNIST, see docs/results.md.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

from experiments.campaign import Arm, Campaign, Settings
from experiments.definitions import ormo
from experiments.real import RealRun, Recipe, Setting, Workers, distance, simulate, train_for_real
from experiments.report import replace_section, spread
from paceline.worker import Overlap
from paceline_wire.memory import keep_large_buffers

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "real.json"

ORMO_WORKERS = 4
ORMO_GRADIENTS = 1600
ORMO_POINTS: Mapping[str, Settings] = {
    "OrMo": (("outer.lr", 0.06), ("outer.momentum", 0.9)),
    "asynchronous SGD": (("outer.lr", 0.25), ("outer.momentum", 0.0)),
    "synchronous momentum": (("outer.lr", 0.06), ("outer.momentum", 0.9)),
}
"""Outer settings as long as the experiment `ormo` has not chosen any for its 4 equal workers."""
ORMO_CELL = f"K = {ORMO_WORKERS}, alike"
ORMO_JITTER = 0.1
"""Simulated, so that the workers' order changes; real workers bring their own."""

DILOCO_WORKERS = (2, 4)
DILOCO_STEPS = 600
DILOCO_ROUND = 30
DILOCO_OUTER = {"lr": 0.7, "momentum": 0.5}
LINK_PART = 0.3
"""Part of a round that the links take, there and back, where workers do not wait; threads and the server add to it."""

PACED_STEP_S = {2: 0.008, 4: 0.012}
"""What an inner step lasts where time matters, by the number of workers, which share this machine."""
UNPACED_STEP_S = 0.001
"""What it lasts where time does not matter: with a barrier, workers that wait do the same whatever their speed."""
REPLAYED_SEED = 0
"""Whose real runs are played again in their recorded order, where workers wait for their answers."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is played with every seed.

    Attributes:
        name: Its name in the table.
        setting: The run, but for the seed.
    """

    name: str
    setting: Setting

    @property
    def waits(self) -> bool:
        """Whether workers wait for every answer, so that only the order of arrivals is left to chance."""
        return self.setting.overlap == Overlap.BLOCKING.value


def cases() -> list[Case]:
    """Return everything that is played."""
    arms = {arm.name: arm for arm in ormo(ORMO_GRADIENTS, (ORMO_WORKERS,)).arms if arm.cell == ORMO_CELL}
    found = [_ormo_case(arms[name], point) for name, point in _ormo_points().items()]
    for num_workers in DILOCO_WORKERS:
        found.append(_diloco_case(num_workers, "blocking", "1"))
        found += [_diloco_case(num_workers, "eager", weight) for weight in ("1/M", "1")]
    return found


def play(case: Case, seed: int, workers: Workers, folder: Path) -> dict[str, Any]:
    """Play a case with a seed, for real and simulated; returns what came of both and how far they are apart."""
    setting = replace(case.setting, seed=seed)
    recipe = Recipe(setting)
    real = train_for_real(setting, workers, folder / f"{case.name}-{seed}".replace("/", "-"))
    answered_after = [report.answered_after for report in real.reports if report.answered_after is not None]
    if not case.waits:
        # Simulated links have the delay that the real ones, with the server behind them, turned out to have.
        setting = replace(setting, delay_s=statistics.fmean(answered_after) * setting.step_s / 2)
    simulated = simulate(setting, recipe.task)
    played = {
        "seed": seed,
        "real": dict(recipe.task.evaluate(real.parameters)),
        "simulated": dict(recipe.task.evaluate(simulated.parameters)),
        "distance": distance(real.parameters, simulated.parameters),
        "step_ms": 1e3 * statistics.fmean(report.step_s for report in real.reports),
        "overruns": statistics.fmean(report.overruns for report in real.reports),
        "bins_late": statistics.fmean(report.bins_late for report in real.reports),
        "bins_late_simulated": statistics.fmean(worker.mean_lateness for worker in simulated.workers),
    }
    if not case.waits:
        return {**played, "answered_after": statistics.fmean(answered_after) / setting.inner_steps}
    return {**played, **(_replayed(setting, real) if seed == REPLAYED_SEED else {})}


def _replayed(setting: Setting, real: RealRun) -> dict[str, Any]:
    """Play a run again in its recorded order: with the simulator's stacked kernels, and with the workers' own."""
    recipe = Recipe(setting)
    stacked = simulate(setting, recipe.task, real.arrivals)
    exact = simulate(setting, recipe.module_task(), real.arrivals)
    return {
        "replayed": dict(recipe.task.evaluate(stacked.parameters)),
        "replayed_distance": distance(real.parameters, stacked.parameters),
        "replayed_distance_same_kernels": distance(real.parameters, exact.parameters),
    }


def main() -> None:
    """Play, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, ... up to this many")
    parser.add_argument("--report", action="store_true", help="play nothing; write what is kept into docs/results.md")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    if arguments.report:
        result = json.loads(RESULTS.read_text(encoding="utf-8"))
        replace_section(ROOT / "docs" / "results.md", "real", tables(result))
    else:
        result = _play_all(arguments.seeds)
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result) if arguments.json else tables(result))


def _play_all(num_seeds: int) -> dict[str, Any]:
    keep_large_buffers()
    torch.set_num_threads(1)
    began_s = time.monotonic()
    played = []
    with Workers(max(ORMO_WORKERS, *DILOCO_WORKERS)) as workers, tempfile.TemporaryDirectory() as folder:
        for case in cases():
            runs = []
            for seed in range(num_seeds):
                runs.append(play(case, seed, workers, Path(folder)))
                spent_s = time.monotonic() - began_s
                print(f"{spent_s:6.0f} s  {case.name}, seed {seed}: {_short(runs[-1])}", file=sys.stderr)
            played.append({"name": case.name, **asdict(case.setting), "runs": runs})
    return {
        "cases": played,
        "took_s": time.monotonic() - began_s,
        "date": datetime.now(UTC).date().isoformat(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "versions": {name: version(name) for name in ("grpcio", "torch")} | {"python": platform.python_version()},
    }


def tables(result: Mapping[str, Any]) -> str:
    """Return what came out of both, and how far they are apart, as two tables in Markdown and a note."""
    outcomes = ["| | real | simulated | difference |", "|---|---|---|---|"]
    apart = [
        "| | largest difference of parameters | in the recorded order | and with the workers' kernels | "
        "bins late, real / simulated | answered after, rounds |",
        "|---|---|---|---|---|---|",
    ]
    for case in result["cases"]:
        name, runs = case["name"], case["runs"]
        outcomes.append(_outcome_row(f"{name}: loss", runs, "loss", scale=1, digits=4))
        if case["kind"] == "images":
            outcomes.append(_outcome_row(f"{name}: accuracy, %", runs, "accuracy", scale=100, digits=2))
        late = " / ".join(f"{_mean(runs, key):.2f}" for key in ("bins_late", "bins_late_simulated"))
        answered = f"{_mean(runs, 'answered_after'):.2f}" if "answered_after" in runs[0] else "waits"
        distances = [_largest(runs, key) for key in ("distance", "replayed_distance", "replayed_distance_same_kernels")]
        apart.append("| " + " | ".join([name, *distances, late, answered]) + " |")
    seeds = len(result["cases"][0]["runs"])
    note = (
        f"{seeds} seeds, judged on the test part; lr / momentum: "
        + "; ".join(f"{case['name']} {_chosen(case)}" for case in result["cases"] if case["kind"] == "images")
        + f"; DiLoCo {_chosen(result['cases'][-1])}, H = {DILOCO_ROUND}. Differences of parameters are relative to the "
        "largest parameter, and the largest of all seeds; recorded orders were played again for one seed. 0 means that "
        f"no bit differs. {result['date']}, {result['cores']} cores, torch {result['versions']['torch']}."
    )
    return "\n".join([*outcomes, "", *apart, "", *textwrap.wrap(note, 120)]) + "\n"


def _chosen(case: Mapping[str, Any]) -> str:
    outer = case["server"]["outer"]
    return f"{outer['lr']:g} / {outer['momentum']:g}"


def _outcome_row(title: str, runs: Sequence[Mapping[str, Any]], measure: str, *, scale: float, digits: int) -> str:
    real = [scale * run["real"][measure] for run in runs]
    simulated = [scale * run["simulated"][measure] for run in runs]
    differences = [one - other for one, other in zip(real, simulated, strict=True)]
    return "| " + " | ".join([title, *(spread(values, digits) for values in (real, simulated, differences))]) + " |"


def _mean(runs: Sequence[Mapping[str, Any]], key: str) -> float:
    return statistics.fmean(run[key] for run in runs)


def _largest(runs: Sequence[Mapping[str, Any]], key: str) -> str:
    """The largest of the seeds' numbers as text; empty where there are none."""
    numbers = [run[key] for run in runs if key in run]
    if not any(numbers):
        return "0" if numbers else ""
    return f"{max(numbers):.1e}"


def _short(run: Mapping[str, Any]) -> str:
    return (
        f"loss {run['real']['loss']:.4f} and {run['simulated']['loss']:.4f}, parameters {run['distance']:.1e} apart, "
        f"{run['step_ms']:.1f} ms a step, {run['overruns']:.0%} of them too long"
    )


def _ormo_points() -> dict[str, Settings]:
    """The settings that were chosen for OrMo's 4 equal workers, if they have been; nothing is played."""
    experiment = ormo(workers=(ORMO_WORKERS,))
    campaign = Campaign(experiment)
    if not campaign.is_complete:
        return dict(ORMO_POINTS)
    return {
        arm.name: point
        for arm, point in zip(experiment.arms, campaign.choices()[1], strict=True)
        if arm.cell == ORMO_CELL and arm.name in ORMO_POINTS
    }


def _ormo_case(arm: Arm, point: Settings) -> Case:
    """The arm of the experiment at one of its points."""
    trial = arm.trial
    server: dict[str, dict[str, Any]] = {"schedule": {"quota": ORMO_WORKERS}}
    for dotted, value in {**dict(trial.server), **dict(point)}.items():
        section, _, key = dotted.partition(".")
        server.setdefault(section, {})[key] = value
    setting = Setting(
        kind=trial.task.kind,
        inner=trial.task.inner,
        inner_lr=trial.task.inner_lr,
        num_workers=ORMO_WORKERS,
        server=server,
        rounds=ORMO_GRADIENTS // ORMO_WORKERS,
        step_s=UNPACED_STEP_S if server["schedule"]["kind"] == "barrier" else PACED_STEP_S[ORMO_WORKERS],
        jitter=ORMO_JITTER,
    )
    return Case(name=f"{arm.name}, K = {ORMO_WORKERS}", setting=setting)


def _diloco_case(num_workers: int, overlap: Literal["eager", "blocking"], own_weight: str) -> Case:
    exact = {"uplink": "fp32", "downlink": "fp32", "dynamic_inner_steps": False}
    step_s = UNPACED_STEP_S if overlap == "blocking" else PACED_STEP_S[num_workers]
    setting = Setting(
        kind="text",
        inner="adamw",
        inner_lr=0.004,
        num_workers=num_workers,
        server={
            "outer": DILOCO_OUTER,
            "schedule": {"kind": "barrier", "quota": num_workers},
            "exchange": {**exact, "inner_steps": DILOCO_ROUND, "own_weight": own_weight},
        },
        overlap=overlap,
        rounds=DILOCO_STEPS // DILOCO_ROUND,
        step_s=step_s,
        delay_s=0.0 if overlap == "blocking" else LINK_PART * DILOCO_ROUND * step_s / 2,
    )
    kind = overlap if overlap == "blocking" else f"{overlap}, own weight {own_weight}"
    return Case(name=f"DiLoCo {kind}, M = {num_workers}", setting=setting)


if __name__ == "__main__":
    main()
