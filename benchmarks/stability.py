"""Where runs are stable by the linear model: tables as JSON and pictures for the documentation.

Nothing is measured: the same limits come out on every machine. What they mean is in docs/algorithms.md, section 9, and
in paceline_server/stability.py. Writes benchmarks/results/stability.json and docs/plots/stability-*.png.
"""

import argparse
import itertools
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from paceline_server.stability import (
    Estimate,
    StabilitySetting,
    largest_stable_contraction,
    largest_stable_lr,
)

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "stability.json"
PLOTS = ROOT / "docs" / "plots"

USUAL = ((0.7, 0.9), (0.4, 0.9), (0.7, 0.5), (0.4, 0.5))
"""Outer lr and momentum of the table in docs/algorithms.md; the third is the default."""

BETAS = (0.0, 0.5, 0.8, 0.9)
ESTIMATES: tuple[Estimate, ...] = ("delayed", "1/M", "1", "local", "predicted")
WORKERS = 4
"""Workers where their number is not what is looked at."""

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000")
"""From Okabe and Ito's palette, which colour-blind readers can tell apart."""
MARKERS = ("o", "s", "^", "D", "v")

CASES: tuple[tuple[str, int, int, Estimate], ...] = (
    ("blocking", 4, 0, "1"),
    ("eager, own weight 1/M, M = 2", 2, 1, "1/M"),
    ("eager, own weight 1/M, M = 4", 4, 1, "1/M"),
    ("eager, own weight 1/M, M = 8", 8, 1, "1/M"),
    ("eager, own weight 1, M = 8", 8, 1, "1"),
    ("delayed, M = 8", 8, 1, "delayed"),
)
"""What a map is drawn of: its title, workers, delay in rounds, estimate."""


LOCAL_CAVEATS = {
    "barrier": "workers' differences neither grow nor fade at contraction 1, so that it is on the edge at every lr",
    "async": "no lr is stable at contraction 1 once answers are two rounds late",
}
"""What the lines of `local` do not show."""


def together(lr: float, beta: float, workers: int, delay: int, estimate: Estimate) -> StabilitySetting:
    """All push together and answers look ahead: the defaults of a barrier."""
    return StabilitySetting(lr=lr, momentum=beta, workers=workers, look_ahead=True, delay=delay, estimate=estimate)


def one_after_another(lr: float, beta: float, workers: int, delay: int, estimate: Estimate) -> StabilitySetting:
    """Pushes evenly spaced and answered at once, without look-ahead: the defaults of the asynchronous schedule."""
    return StabilitySetting(
        lr=lr, momentum=beta, workers=workers, look_ahead=False, delay=delay, estimate=estimate, groups=workers
    )


RHYTHMS: dict[str, Callable[[float, float, int, int, Estimate], StabilitySetting]] = {
    "barrier": together,
    "async": one_after_another,
}
IN_WORDS = {
    "barrier": "all push together and answers look ahead (barrier)",
    "async": "pushes come one after another and are answered at once, without look-ahead (async)",
}


def lr_by_arrival_with_the_same_memory(beta: float, workers: int) -> float:
    """The largest stable lr of momentum by arrival that remembers as long, in rounds, and ends in the same place.

    Its coefficient is beta ** (1 / K), so that K arrivals forget what a bin does, and its rate is scaled so that a push
    moves w by lr / K / (1 - beta) in the end, as in ordered momentum. In units of ordered momentum's lr.
    """
    by_arrival = math.pow(beta, 1 / workers)
    setting = replace(one_after_another(1.0, by_arrival, workers, 0, "1"), ordered=False)
    return largest_stable_lr(setting) * (1 - beta) / (1 - by_arrival)


def tables() -> dict[str, Any]:
    """Compute all tables."""
    return {
        "model": "linear, equal workers; see docs/algorithms.md, section 9, and paceline_server/stability.py",
        "largest_stable_contraction": _contractions(),
        "largest_stable_lr_at_contraction_1": _rates(),
        "ordered_and_by_arrival": _ordering(),
    }


def _contractions() -> list[dict[str, Any]]:
    rows = []
    for (rhythm, make), (lr, beta), estimate in itertools.product(RHYTHMS.items(), USUAL, ESTIMATES):
        for delay in (0, 1, 2):
            # Asynchronous matrices grow with both; these would take minutes and say what fewer workers say.
            counts = [count for count in (2, 4, 8, 16) if make is together or count * delay <= 16]
            limits = [largest_stable_contraction(make(lr, beta, count, delay, estimate)) for count in counts]
            rows.append(
                {
                    "rhythm": rhythm,
                    "lr": lr,
                    "momentum": beta,
                    "estimate": estimate,
                    "delay_rounds": delay,
                    "limit_by_workers": {str(c): round(limit, 4) for c, limit in zip(counts, limits, strict=True)},
                }
            )
    return rows


def _rates() -> list[dict[str, Any]]:
    return [
        {
            "rhythm": rhythm,
            "momentum": beta,
            "estimate": estimate,
            "workers": WORKERS,
            "largest_stable_lr_by_delay_rounds": [
                round(largest_stable_lr(make(1.0, beta, WORKERS, delay, estimate)), 4) for delay in range(most + 1)
            ],
        }
        for (rhythm, make), most in zip(RHYTHMS.items(), (8, 4), strict=True)
        for beta in BETAS
        for estimate in ESTIMATES
    ]


def _ordering() -> list[dict[str, Any]]:
    rows = []
    for workers in (1, 2, 4, 8, 16):
        for beta in BETAS:
            setting = one_after_another(1.0, beta, workers, 0, "1")
            rows.append(
                {
                    "workers": workers,
                    "momentum": beta,
                    "ordered": round(largest_stable_lr(setting), 4),
                    "by_arrival": round(largest_stable_lr(replace(setting, ordered=False)), 4),
                    "by_arrival_same_memory": round(lr_by_arrival_with_the_same_memory(beta, workers), 4),
                }
            )
    return rows


# --- Pictures.


def draw_regions(rhythm: str) -> Figure:
    """Draw the largest stable contraction over lr and momentum, a map for each case.

    Save for `local`, which is not drawn, only the product of lr and contraction counts, so one limit for each momentum
    gives the whole map.
    """
    make = RHYTHMS[rhythm]
    lrs, betas = np.linspace(0.1, 1.5, 141), np.linspace(0.0, 0.98, 50)
    figure = Figure(figsize=(10.5, 6.6), layout="constrained")
    panels = figure.subplots(2, 3, sharex=True, sharey=True)
    levels = [0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0]
    for axes, (title, workers, delay, estimate) in zip(panels.flat, CASES, strict=True):
        limits = np.array([largest_stable_lr(make(1.0, float(beta), workers, delay, estimate)) for beta in betas])
        largest = np.minimum(2.0, limits[:, None] / lrs)
        filled = axes.contourf(lrs, betas, largest, levels=levels, cmap="cividis")
        axes.plot(limits, betas, color="white", linewidth=2.5)
        for (lr, beta), marker in zip(USUAL, MARKERS, strict=False):
            axes.plot(lr, beta, marker=marker, color="#D55E00", markeredgecolor="white", markersize=9, linestyle="none")
        axes.set_xlim(lrs[0], lrs[-1])
        axes.set_ylim(betas[0], betas[-1])
        axes.set_title(title, loc="left", fontsize=10)
    for axes in panels[-1]:
        axes.set_xlabel("outer learning rate lr")
    for axes in panels[:, 0]:
        axes.set_ylabel("outer momentum")
    bar = figure.colorbar(filled, ax=panels, shrink=0.8)
    bar.set_label("largest stable part of a distance that a round may remove")
    figure.suptitle(
        f"Where {IN_WORDS[rhythm]}. White line: a fresh model (1.0) is stable to the left of it.\n"
        "Marked: lr 0.7 and 0.4 with momentum 0.9 (circle, square) and 0.5 (triangle: the default; diamond)",
        fontsize=10,
    )
    return figure


def draw_delays(rates: list[dict[str, Any]], rhythm: str) -> Figure:
    """Draw the largest stable lr against the delay, a panel for each momentum and a line for each estimate."""
    figure = Figure(figsize=(10.5, 3.9), layout="constrained")
    panels = figure.subplots(1, len(BETAS), sharey=True)
    for axes, beta in zip(panels, BETAS, strict=True):
        rows = {row["estimate"]: row for row in rates if row["rhythm"] == rhythm and row["momentum"] == beta}
        lines: dict[str, list[float]] = {name: rows[name]["largest_stable_lr_by_delay_rounds"] for name in ESTIMATES}
        _draw_lines(axes, range(len(lines["1"])), lines)
        axes.set_title(f"momentum {beta:g}", loc="left", fontsize=10)
        axes.set_xlabel("answers late, rounds")
    panels[0].set_ylabel("largest stable lr at contraction 1")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    figure.suptitle(
        f"{WORKERS} workers, {IN_WORDS[rhythm]}; lines by own weight; dotted: the default lr.\n"
        f"With local, {LOCAL_CAVEATS[rhythm]}",
        fontsize=10,
    )
    return figure


def draw_ordering(rows: list[dict[str, Any]]) -> Figure:
    """Draw the largest stable lr of ordered momentum and of momentum by arrival, a panel for each coefficient."""
    figure = Figure(figsize=(10.5, 3.9), layout="constrained")
    panels = figure.subplots(1, len(BETAS), sharey=True)
    names = {
        "ordered": "ordered momentum",
        "by_arrival": "by arrival, same coefficient",
        "by_arrival_same_memory": "by arrival, same memory and final step",
    }
    for axes, beta in zip(panels, BETAS, strict=True):
        chosen = [row for row in rows if row["momentum"] == beta]
        _draw_lines(
            axes,
            [row["workers"] for row in chosen],
            {label: [row[name] for row in chosen] for name, label in names.items()},
        )
        axes.set_xscale("log", base=2)
        axes.set_xticks([row["workers"] for row in chosen], [str(row["workers"]) for row in chosen])
        axes.set_title(f"momentum {beta:g}", loc="left", fontsize=10)
        axes.set_xlabel("workers")
    panels[0].set_ylabel("largest stable lr at contraction 1")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(
        "Asynchronous workers that wait for their answer, pushing one after another; dotted: the default lr",
        fontsize=10,
    )
    panels[0].set_ylim(0.08, 5)
    return figure


def _draw_lines(axes: Axes, places: Iterable[int], lines: dict[str, list[float]]) -> None:
    places = list(places)
    for (label, values), colour, marker in zip(lines.items(), COLOURS, MARKERS, strict=False):
        # A rate that no plot can show is not stable at all: the line ends there.
        shown = [value if value >= 0.005 else np.nan for value in values]
        axes.plot(places, shown, color=colour, marker=marker, markersize=5, label=label)
    axes.set_yscale("log")
    axes.set_yticks([0.01, 0.03, 0.1, 0.3, 1, 3], ["0.01", "0.03", "0.1", "0.3", "1", "3"])
    axes.minorticks_off()
    axes.axhline(0.7, color="gray", linewidth=1, linestyle=":")
    axes.grid(alpha=0.3)


def main() -> None:
    """Compute, write and draw everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the tables as JSON")
    arguments = parser.parse_args()
    result = tables()
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    # A row of a table on a line.
    text = json.dumps(result).replace("[{", "[\n {").replace("}, {", "},\n {").replace("}], ", "}\n],\n")
    RESULTS.write_text(text + "\n", encoding="utf-8")
    PLOTS.mkdir(parents=True, exist_ok=True)
    rates = result["largest_stable_lr_at_contraction_1"]
    figures = {
        "regions": draw_regions("barrier"),
        "regions-async": draw_regions("async"),
        "delay": draw_delays(rates, "barrier"),
        "delay-async": draw_delays(rates, "async"),
        "ordering": draw_ordering(result["ordered_and_by_arrival"]),
    }
    for name, figure in figures.items():
        figure.savefig(PLOTS / f"stability-{name}.png", dpi=110)
    if arguments.json:
        print(json.dumps(result))
        return
    _print_tables(result)


def _print_tables(result: dict[str, Any]) -> None:
    print("Largest stable part of a distance that a round may remove, by workers:")
    for row in result["largest_stable_contraction"]:
        run = f"{row['rhythm']:7}  lr {row['lr']:g}, momentum {row['momentum']:g}, {row['estimate']:9}"
        cells = "  ".join(f"{workers}: {limit:.2f}" for workers, limit in row["limit_by_workers"].items())
        print(f"  {run}  {row['delay_rounds']} rounds late  {cells}")
    print("Largest stable lr when asynchronous workers wait: ordered, by arrival, by arrival with the same memory:")
    for row in result["ordered_and_by_arrival"]:
        limits = f"{row['ordered']:.3f}  {row['by_arrival']:.3f}  {row['by_arrival_same_memory']:.3f}"
        print(f"  {row['workers']:2} workers, momentum {row['momentum']:g}  {limits}")


if __name__ == "__main__":
    main()
