"""Gives one target many inputs, each within a deadline, and notes what came of them.

Inputs are changed copies of known ones. Nearly every refusal of the product has a sentence of its own, so what came of
an input, without its numbers and names, is taken for the place in the code that it reached: whatever leads to a new one
is kept, and changed in turn. All is drawn from one seed.
"""

import base64
import random
import re
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from types import FrameType

from fuzz.resources import Resources
from fuzz.target import Target, ViolationError

CORPUS = Path(__file__).with_name("corpus")
CORPUS_BYTES = 40_000
"""What the corpus of one target may take in the repository."""

DEADLINE_S = 5.0
"""Seconds for one input. The product takes milliseconds; the rest is for a machine that has other work too."""

MOST_FINDINGS, MOST_KEPT = 10, 1000
_NEWEST = 16
_VARIABLE = re.compile(r"0x[0-9a-fA-F]+|(?<![A-Za-z0-9])[0-9][0-9a-fA-Fx.e+-]*|'[^']*'|\"[^\"]*\"|\[[^\]]*\]|/[\w./-]+")
_LONGEST_OUTCOME = 120


class _LateError(BaseException):
    """An input took too long; no handler of the product takes it for something of its own."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """An input that did what none may.

    Attributes:
        target: The target's name.
        problem: What happened.
        data: The input, as small as it could be made.
    """

    target: str
    problem: str
    data: bytes


@dataclass(kw_only=True)
class Report:
    """What came of a target's inputs.

    Attributes:
        inputs: How many there were.
        seconds: How long they took.
        outcomes: How often each came, without its numbers and names.
        kept: The first input of each.
        findings: Those that must not be.
    """

    inputs: int = 0
    seconds: float = 0.0
    outcomes: dict[str, int] = field(default_factory=dict)
    kept: dict[str, bytes] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)


def corpus_of(name: str) -> list[bytes]:
    """The inputs that are kept for a target."""
    path = CORPUS / f"{name}.txt"
    return [base64.b64decode(line) for line in path.read_text().splitlines()] if path.exists() else []


def write_corpus(name: str, inputs: Sequence[bytes]) -> None:
    """Keep the shortest of these inputs for a target, as far as there is room, and no others."""
    lines = sorted({base64.b64encode(data).decode() for data in inputs}, key=lambda line: (len(line), line))
    sizes = accumulate(len(line) + 1 for line in lines)
    kept = [line for line, size in zip(lines, sizes, strict=True) if size <= CORPUS_BYTES]
    CORPUS.mkdir(exist_ok=True)
    (CORPUS / f"{name}.txt").write_text("".join(f"{line}\n" for line in kept))


def played(target: Target, data: bytes) -> tuple[str, bool]:
    """What came of an input, in general words, and whether it may.

    Anything but the target's errors may not; nor may an input take longer than its deadline.
    """
    try:
        with _deadline():
            return _general(target.run(data)), True
    except target.errors as error:
        return _general(f"{type(error).__name__}: {error}"), True
    except ViolationError as error:
        return f"violation: {error}", False
    except _LateError:
        return f"not done within {DEADLINE_S:g} s: {_innermost()}", False
    except Exception as error:  # noqa: BLE001  # whatever it is, it is what is looked for
        return f"{type(error).__name__}: {error}\n{traceback.format_exc(limit=-4)}", False


def fuzz(target: Target, *, inputs: int, seed: int, note: Callable[[bytes], None] = lambda _: None) -> Report:
    """Give a target so many inputs; note is told each before it is played.

    Besides each input's own outcome, what the process holds is looked at: it must be no more at the end than after a
    quarter of the inputs.
    """
    rng = random.Random(f"{seed}/{target.name}")
    known = [*target.seeds(), *corpus_of(target.name)]
    report, settled = Report(), None
    began_s = time.perf_counter()
    for data in _inputs(rng, target, known, inputs):
        note(data)
        outcome, allowed = played(target, data)
        report.inputs += 1
        if not allowed:
            report.findings.append(_finding(target, outcome, data))
        elif outcome not in report.outcomes and len(report.kept) < MOST_KEPT:
            known.append(data)
            report.kept[outcome] = data
        report.outcomes[outcome] = report.outcomes.get(outcome, 0) + 1
        if len(report.findings) >= MOST_FINDINGS:
            break
        if report.inputs == inputs // 4:
            settled = Resources.now()
    grown = settled.grown_since() if settled is not None else None
    if grown is not None:
        report.findings.append(Finding(target=target.name, problem=grown, data=b""))
    report.seconds = time.perf_counter() - began_s
    try:
        target.finish()
    except Exception as error:  # noqa: BLE001  # whatever it is, it is what is looked for
        report.findings.append(Finding(target=target.name, problem=f"at the end: {error!r}", data=b""))
    return report


def _inputs(rng: random.Random, target: Target, known: list[bytes], count: int) -> Iterator[bytes]:
    first = list(known[:count])
    yield from first
    for _ in range(count - len(first)):
        parent = rng.choice(known if rng.random() < 0.7 else known[-_NEWEST:])
        yield target.mutated(rng, parent, rng.choice(known))


def _finding(target: Target, problem: str, data: bytes) -> Finding:
    """A finding with an input that is as small as a few attempts can make it."""
    first_line = problem.partition("\n")[0]
    size = len(data) // 2
    while size and not problem.startswith("not done"):
        at = 0
        while at < len(data):
            shorter = data[:at] + data[at + size :]
            outcome, allowed = played(target, shorter)
            if not allowed and _general(outcome.partition("\n")[0]) == _general(first_line):
                data, problem = shorter, outcome
            else:
                at += size
        size //= 2
    return Finding(target=target.name, problem=problem, data=data)


def _general(outcome: str) -> str:
    return _VARIABLE.sub("#", outcome)[:_LONGEST_OUTCOME]


_interrupted: list[str] = []


def _innermost() -> str:
    return _interrupted.pop() if _interrupted else ""


def _late(_signal: int, frame: FrameType | None) -> None:
    _interrupted[:] = [" / ".join(line.strip() for line in traceback.format_stack(frame, limit=3))]
    raise _LateError


@contextmanager
def _deadline() -> Iterator[None]:
    signal.signal(signal.SIGALRM, _late)
    signal.setitimer(signal.ITIMER_REAL, DEADLINE_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
