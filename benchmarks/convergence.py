"""Convergence experiments in virtual time: plays and tunes every method, and writes tables and plots of the results.

    python benchmarks/convergence.py                  all experiments, then docs/results.md and docs/plots
    python benchmarks/convergence.py diloco codecs    only these
    python benchmarks/convergence.py --report         only the tables and plots, from the outcomes that are kept
    python benchmarks/convergence.py --small          a few minutes' version, kept apart, printed and not written down

Outcomes are kept in benchmarks/results/convergence/, one file an experiment; what is there is not played again.
"""

import argparse
import json
import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch

from experiments.campaign import RESULTS, Campaign, Experiment, Tuned
from experiments.definitions import EXPERIMENTS, SMALL
from experiments.pages import write_pages
from experiments.report import cells_of, settings_table, table

DOCS = Path(__file__).parents[1] / "docs"


def main() -> None:
    """Run what the command line asks for."""
    parser = _parser()
    arguments = parser.parse_args()
    unknown = [name for name in arguments.experiments if name not in EXPERIMENTS]
    if unknown:
        parser.error(f"no such experiment: {', '.join(unknown)}; there are {', '.join(EXPERIMENTS)}")
    torch.set_num_threads(1)
    chosen = {
        name: (SMALL if arguments.small else EXPERIMENTS)[name]() for name in arguments.experiments or EXPERIMENTS
    }
    results = {}
    for name, experiment in chosen.items():
        campaign = Campaign(experiment, RESULTS / "small" if arguments.small else RESULTS, arguments.processes)
        if arguments.report and not campaign.is_complete:
            print(f"{name}: not all outcomes are kept; left out", file=sys.stderr)
            continue
        results[name] = campaign.tune()
        print(f"{name}: {campaign.cpu_s / 3600:.2f} processor hours of outcomes", file=sys.stderr)
    summary = {"machine": _machine(), "experiments": {name: _summary(found) for name, found in results.items()}}
    if arguments.json:
        print(json.dumps(summary))
    else:
        _print(chosen, results)
    if not arguments.small:
        write_pages(DOCS, results)
        if not arguments.experiments:
            (RESULTS / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = f"any of {', '.join(EXPERIMENTS)}; left out: all"
    parser.add_argument("experiments", nargs="*", metavar="NAME", help=names)
    parser.add_argument("--report", action="store_true", help="play nothing; write tables and plots from what is kept")
    parser.add_argument("--small", action="store_true", help="a version of a few minutes")
    parser.add_argument("--json", action="store_true", help="print a summary as JSON")
    parser.add_argument("--processes", type=int, default=None, help="trials at once; left out: one a core")
    return parser


def _print(chosen: dict[str, Experiment], results: dict[str, list[Tuned]]) -> None:
    for name, tuned in results.items():
        print(f"\n## {chosen[name].title}\n")
        for cell in cells_of(tuned):
            print(table(tuned, [cell], lambda outcome: outcome.loss))
        print(settings_table(tuned, cells_of(tuned)))


def _summary(tuned: list[Tuned]) -> list[dict[str, object]]:
    return [
        {
            "cell": result.arm.cell,
            "method": result.arm.name,
            "settings": dict(result.point),
            "validation": result.tried,
            "losses": result.losses,
            "mean": result.loss,
            "standard_error": result.error,
            "accuracies": [outcome.accuracy for outcome in result.outcomes],
        }
        for result in tuned
    ]


def _machine() -> dict[str, object]:
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cores": os.cpu_count(),
    }


if __name__ == "__main__":
    main()
