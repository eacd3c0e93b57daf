"""An outcome for people: lines for a terminal, and a section for docs/reliability.md."""

import os
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from paceline_chaos.outcome import Outcome
from paceline_chaos.plan import MEANINGS, Kind

BEGIN, END = "<!-- chaos:begin -->", "<!-- chaos:end -->"

_LIBRARIES = ("grpcio", "protobuf", "torch", "numpy")


def machine() -> dict[str, Any]:
    """Where and when this is, and with which versions."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "python": sys.version.split()[0],
        "system": platform.system(),
        "versions": {name: version(name) for name in _LIBRARIES},
    }


def section(outcome: Outcome, where: dict[str, Any]) -> str:
    """The outcome as Markdown: faults, pushes, verdicts, times of recovery."""
    kills = outcome.count(Kind.SERVER_KILL).fired
    others = sum(count.fired for kind, count in outcome.counts.items() if not kind.on_server)
    versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
    lines = [
        f"`make chaos`, seed {outcome.seed}: {kills} kills of the server and {others} faults of workers and links in "
        f"{outcome.took_s / 60:.0f} minutes, on {where['cores']} cores of {where['cpu']}, {where['system']}, Python "
        f"{where['python']}, {versions}, {where['date']}.",
        "",
        "| fault | what happens | times | survived | bytes touched | pushing again after, at most |",
        "|---|---|---|---|---|---|",
    ]
    for kind in Kind:
        if kind in outcome.skipped:
            lines.append(f"| {kind.value} | {MEANINGS[kind]} | skipped: {outcome.skipped[kind]} | | | |")
        elif kind in outcome.counts:
            count = outcome.counts[kind]
            touched = f"{count.num_bytes:,}" if count.num_bytes else ""
            cells = (kind.value, MEANINGS[kind], count.fired, count.survived, touched, f"{count.longest_s:.1f} s")
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join([*lines, "", *_findings(outcome)]) + "\n"


def write_section(page: Path, text: str) -> None:
    """Put a section between the markers of a page; a page that is missing is made."""
    if not page.exists():
        page.write_text(f"# Reliability\n\n{BEGIN}\n{END}\n", encoding="utf-8")
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        before, after = before.rstrip() + "\n\n", "\n"
    page.write_text(f"{before}{BEGIN}\n{text}{END}{after}", encoding="utf-8")


def lines(outcome: Outcome) -> list[str]:
    """The outcome for a terminal."""
    found = [
        f"{kind.value:<14}{count.fired:>6} times, survived {count.survived:>4}, "
        f"pushing again after {count.longest_s:4.1f} s at most"
        + (f", {count.num_bytes:,} bytes touched" if count.num_bytes else "")
        for kind, count in sorted(outcome.counts.items(), key=lambda item: list(Kind).index(item[0]))
        if kind not in outcome.skipped
    ]
    found += [f"{kind.value:<14} skipped: {reason}" for kind, reason in outcome.skipped.items()]
    return found + [line.removeprefix("- ") for line in _findings(outcome)]


def _findings(outcome: Outcome) -> list[str]:
    found = []
    verdict, recovery = outcome.verdict, outcome.recovery()
    if verdict is not None:
        found.append(
            f"- pushes: {verdict.acknowledged:,} acknowledged, {verdict.found:,} of them found, once and with the same "
            f"payload; {verdict.in_flight} more had arrived without their worker learning of it, "
            f"{verdict.refused} were refused"
        )
        if outcome.looks:
            found.append(
                f"- {outcome.looks} times the stopped server's directory was recovered and compared with a replica "
                f"that had followed all {verdict.records:,} records without ever being restarted"
            )
        if verdict.distance is not None:
            found.append(f"- parameters and momentum are within {verdict.distance:.1e} of the closed form in float64")
    if recovery is not None:
        found.append(
            f"- from SIGKILL to serving again: {recovery['min']:.2f} s at least, {recovery['median']:.2f} s in the "
            f"median, {recovery['max']:.2f} s at most"
        )
    if outcome.ends:
        found.append(
            f"- {len(outcome.ends)} times a worker ended, since its connection was garbled or no server was there "
            "when it started; each was started again"
        )
    if outcome.held:
        return [*found, "- nothing that was acknowledged was lost, nothing was counted twice, no bit differs"]
    return [*found, *(f"- **lost**: {sentence}" for sentence in outcome.lost)]


def _cpu() -> str:
    try:
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    except OSError:
        names = []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()
