"""`python -m fuzz`: gives every target its inputs, each target in a process of its own, and keeps what came of them.

Exit code 1: there were findings; their inputs are in the folder that --findings names.
"""

import contextlib
import json
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from fuzz.catalogue import TARGETS
from fuzz.engine import corpus_of, fuzz, write_corpus

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "fuzz.json"
HANG_S = 60.0
"""Seconds for an input beyond which its process is killed: the deadline inside did not end it."""

_NOTE_BYTES = 128 * 1024
_POLL_S = 0.25


class _Note:
    """The input that a process is at, in a file that survives the process."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("r+b")
        self._memory = mmap.mmap(self._file.fileno(), _NOTE_BYTES)

    def write(self, data: bytes) -> None:
        count = int.from_bytes(self._memory[:8], "little") + 1
        data = data[: _NOTE_BYTES - 12]
        self._memory[:12] = count.to_bytes(8, "little") + len(data).to_bytes(4, "little")
        self._memory[12 : 12 + len(data)] = data

    @property
    def count(self) -> int:
        return int.from_bytes(self._memory[:8], "little")

    @property
    def data(self) -> bytes:
        size = int.from_bytes(self._memory[8:12], "little")
        return bytes(self._memory[12 : 12 + size])


@dataclass(frozen=True, kw_only=True)
class Options:
    """What every target's run is given."""

    seed: int
    grow: bool
    findings: Path


@click.command()
@click.option("--target", "names", multiple=True, type=click.Choice(sorted(TARGETS)), help="Only these targets.")
@click.option("--inputs", type=click.IntRange(min=1), help="Inputs for each target, instead of its own number.")
@click.option("--scale", type=click.FloatRange(min=0.0, min_open=True), default=1.0, help="Times the own numbers.")
@click.option("--seed", type=int, default=1, show_default=True, help="All inputs are drawn from it.")
@click.option("--jobs", type=click.IntRange(min=1), default=os.cpu_count() or 1, help="Processes at once.")
@click.option("--grow", is_flag=True, help="Write the corpus anew: the first input that led to each outcome.")
@click.option("--output", type=click.Path(path_type=Path), help="File for the results; others in it stay.")
@click.option("--findings", type=click.Path(path_type=Path), default=Path("fuzz-findings"), show_default=True)
@click.option("--child", type=click.Choice(sorted(TARGETS)), hidden=True)
@click.option("--note", type=click.Path(path_type=Path), hidden=True)
def main(
    names: tuple[str, ...],
    inputs: int | None,
    scale: float,
    seed: int,
    jobs: int,
    grow: bool,
    output: Path | None,
    findings: Path,
    child: str | None,
    note: Path | None,
) -> None:
    """Give every target its inputs, and say what came of them."""
    if child is not None and note is not None and inputs is not None:
        _run_child(child, inputs, seed, note, grow=grow)
        return
    options = Options(seed=seed, grow=grow, findings=findings)
    counts = {name: inputs or max(1, round(TARGETS[name].inputs * scale)) for name in names or TARGETS}
    began_s = time.perf_counter()
    with ThreadPoolExecutor(jobs) as pool:
        results = dict(zip(counts, pool.map(lambda name: _watched(name, counts[name], options), counts), strict=True))
    total = sum(result["inputs"] for result in results.values())
    found = sum(len(result["findings"]) for result in results.values())
    click.echo(f"{total} inputs in {time.perf_counter() - began_s:.0f} s, {found} findings")
    if output is not None:
        _keep(output, results)
    sys.exit(1 if found else 0)


def _run_child(name: str, inputs: int, seed: int, note: Path, *, grow: bool) -> None:
    """Play one target in this process; the last line of the output is what came of it."""
    target = TARGETS[name]()
    report = fuzz(target, inputs=inputs, seed=seed, note=_Note(note).write)
    if grow:
        write_corpus(name, list(report.kept.values()))
    findings = [{"problem": finding.problem, "data": finding.data.hex()} for finding in report.findings]
    click.echo(
        json.dumps(
            {
                "inputs": report.inputs,
                "seconds": round(report.seconds, 1),
                "outcomes": len(report.outcomes),
                "corpus": len(corpus_of(name)),
                "findings": findings,
            }
        )
    )


def _watched(name: str, inputs: int, options: Options) -> dict[str, Any]:
    """Play one target in a process of its own, and say so if that crashes or hangs."""
    with tempfile.TemporaryDirectory() as folder:
        note_path, said_path = Path(folder) / "note", Path(folder) / "said"
        note_path.write_bytes(bytes(_NOTE_BYTES))
        command = [sys.executable, "-m", "fuzz", "--child", name, "--inputs", str(inputs), "--seed", str(options.seed)]
        command += ["--note", str(note_path), *(["--grow"] if options.grow else [])]
        errors_path = Path(folder) / "errors"
        with said_path.open("wb") as said, errors_path.open("wb") as errors:
            process = subprocess.Popen(command, stdout=said, stderr=errors, start_new_session=True)
        note = _Note(note_path)
        try:
            hung = _hangs(process, note)
        finally:
            # With the servers that it may have left.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        lines = said_path.read_text().splitlines()
        if process.returncode == 0 and lines:
            result: dict[str, Any] = json.loads(lines[-1])
        else:
            reason = f"no input was done for {HANG_S:g} s" if hung else f"the process ended with {process.returncode}"
            problem = f"{reason}\n{errors_path.read_text(errors='replace')[-4000:]}"
            result = {"inputs": note.count, "seconds": 0.0, "outcomes": 0, "corpus": 0}
            result["findings"] = [{"problem": problem, "data": note.data.hex()}]
    _tell(name, result, options.findings)
    return result


def _hangs(process: "subprocess.Popen[bytes]", note: _Note) -> bool:
    """Wait for a process to end; kill it when it stays at one input. Whether it did."""
    count, since_s = note.count, time.monotonic()
    while process.poll() is None:
        time.sleep(_POLL_S)
        if note.count != count or note.count == 0:
            count, since_s = note.count, time.monotonic()
        elif time.monotonic() - since_s > HANG_S:
            process.kill()
            process.wait()
            return True
    return False


def _tell(name: str, result: dict[str, Any], folder: Path) -> None:
    findings = result["findings"]
    said = f"{name}: {result['inputs']} inputs in {result['seconds']:.1f} s, {result['outcomes']} outcomes"
    click.echo(f"{said}, {len(findings)} findings")
    for number, finding in enumerate(findings, start=1):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}-{number}").write_bytes(bytes.fromhex(finding["data"]))
        (folder / f"{name}-{number}.txt").write_text(finding["problem"])
        click.echo(f"  {folder / name}-{number}: {finding['problem'].splitlines()[0]}")


def _keep(path: Path, results: dict[str, Any]) -> None:
    """Write the results, beside those of other targets that the file has."""
    known = json.loads(path.read_text())["targets"] if path.exists() else {}
    known.update(results)
    targets = {name: known[name] for name in sorted(known) if name in TARGETS}
    total = sum(result["inputs"] for result in targets.values())
    seconds = round(sum(result["seconds"] for result in targets.values()), 1)
    findings = sum(len(result["findings"]) for result in targets.values())
    summary = {"inputs": total, "processor_seconds": seconds, "findings": findings}
    path.write_text(json.dumps({"summary": summary, "targets": targets}, indent=2) + "\n")


main()
