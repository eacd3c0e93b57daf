"""Puts the tables of the experiments into docs/results.md, between its marks, and their plots beside it."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from experiments.campaign import Tuned
from experiments.report import Measure, bars, cells_of, replace_section, settings_table, spread, table
from experiments.trial import Outcome


def write_pages(docs: Path, results: Mapping[str, Sequence[Tuned]]) -> None:
    """Write tables and plots of these experiments; the text between them is written by hand."""
    for name, tuned in results.items():
        sections = {"ormo": _ormo, "diloco": _diloco, "codecs": _codecs, "late": _late}.get(name, _losses)(tuned)
        for part, content in sections.items():
            replace_section(docs / "results.md", f"{name} {part}", content)
        replace_section(docs / "results.md", f"{name} settings", _settings(tuned))
        measure: Measure = _accuracy if name == "ormo" else _loss
        label = "test accuracy, %" if name == "ormo" else "test loss, nats"
        bars(tuned, cells_of(tuned), measure, docs / "plots" / f"convergence-{name}.png", label=label)


def _loss(outcome: Outcome) -> float:
    return outcome.loss


def _accuracy(outcome: Outcome) -> float:
    return 100 * outcome.accuracy


def _end(outcome: Outcome) -> float:
    return outcome.end_s


def _losses(tuned: Sequence[Tuned]) -> dict[str, str]:
    return {"loss": table(tuned, cells_of(tuned), _loss)}


def _ormo(tuned: Sequence[Tuned]) -> dict[str, str]:
    cells = cells_of(tuned)
    return {
        "accuracy": table(tuned, cells, _accuracy, digits=2, low_is_good=False),
        "loss": table(tuned, cells, _loss),
        "time": table(tuned, cells, _end, digits=0),
    }


def _diloco(tuned: Sequence[Tuned]) -> dict[str, str]:
    cells = cells_of(tuned)
    workers = dict.fromkeys(cell.split(",")[0] for cell in cells)
    return {
        f"loss {of.replace(' ', '')}": table(tuned, [cell for cell in cells if cell.startswith(f"{of},")], _loss)
        for of in workers
    }


def _codecs(tuned: Sequence[Tuned]) -> dict[str, str]:
    sections = {}
    for cell in cells_of(tuned):
        rows = ["| codec | loss | up, MB | down, MB |", "|---|---|---|---|"]
        for result in (result for result in tuned if result.arm.cell == cell):
            first = result.outcomes[0]
            rows.append(
                f"| {result.arm.name} | {spread(result.losses)} | {first.bytes_up / 1e6:.2f} | "
                f"{first.bytes_down / 1e6:.2f} |"
            )
        sections[cell] = "\n".join(rows) + "\n"
    return sections


def _late(tuned: Sequence[Tuned]) -> dict[str, str]:
    """The loss at the end, and the greatest rise of the loss between two looks after the worker came back."""
    cells = cells_of(tuned)

    def jump(outcome: Outcome) -> float:
        losses = [point[2] for point in outcome.curve if point[0] > COMES_BACK_S]
        return max(after - before for before, after in pairwise(losses))

    return {"loss": table(tuned, cells, _loss), "jump": table(tuned, cells, jump)}


COMES_BACK_S = 290.0
"""No absence of the experiment ends before."""


def _settings(tuned: Sequence[Tuned]) -> str:
    return settings_table(tuned, cells_of(tuned))
