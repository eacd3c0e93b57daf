"""From tuned arms to tables in Markdown and plots."""

import math
import re
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.campaign import Tuned, mean, standard_error
from experiments.trial import Outcome

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DIVERGED = 4.0
"""A final loss above this counts as diverged; untrained models begin at 5.5 (text) and 2.3 (images)."""

Measure = Callable[[Outcome], float]


def cells_of(tuned: Sequence[Tuned]) -> list[str]:
    """Return the cells in order of appearance."""
    return list(dict.fromkeys(result.arm.cell for result in tuned))


def names_of(tuned: Sequence[Tuned]) -> list[str]:
    """Return the arms' names in order of appearance."""
    return list(dict.fromkeys(result.arm.name for result in tuned))


def table(
    tuned: Sequence[Tuned], cells: Sequence[str], measure: Measure, *, digits: int = 3, low_is_good: bool = True
) -> str:
    """Return a table with a row for each arm and a column for each cell: mean and standard error, the best in bold."""
    lines = ["| | " + " | ".join(cells) + " |", "|---|" + "---|" * len(cells)]
    found = {(result.arm.name, result.arm.cell): result for result in tuned}
    best = {
        cell: _best([found[key] for key in found if key[1] == cell], measure, low_is_good=low_is_good) for cell in cells
    }
    for name in names_of(tuned):
        entries = []
        for cell in cells:
            result = found.get((name, cell))
            text = "" if result is None else spread([measure(outcome) for outcome in result.outcomes], digits)
            entries.append(f"**{text}**" if result is not None and result is best[cell] else text)
        if any(entries):
            lines.append(f"| {name} | " + " | ".join(entries) + " |")
    return "\n".join(lines) + "\n"


def settings_table(tuned: Sequence[Tuned], cells: Sequence[str]) -> str:
    """Return what was chosen for each arm: learning rate / momentum, marked where it lies at an edge of the grid."""
    lines = ["| | " + " | ".join(cells) + " |", "|---|" + "---|" * len(cells)]
    found = {(result.arm.name, result.arm.cell): result for result in tuned}
    for name in names_of(tuned):
        entries = [chosen(found[name, cell]) if (name, cell) in found else "" for cell in cells]
        lines.append(f"| {name} | " + " | ".join(entries) + " |")
    return "\n".join(lines) + "\n"


def chosen(result: Tuned) -> str:
    """Return the chosen settings, with a star where the learning rate is the least or the greatest tried."""
    point = dict(result.point)
    rates = sorted(
        dict(other)["outer.lr"]
        for other in result.arm.grid
        if dict(other).get("outer.momentum") == point.get("outer.momentum")
    )
    edge = "*" if len(rates) > 1 and point["outer.lr"] in (rates[0], rates[-1]) else ""
    momentum = point.get("outer.momentum")
    return f"{point['outer.lr']:g}{edge}" + (f" / {momentum:g}" if momentum is not None else "")


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Return the mean and standard error of values as text."""
    if not all(math.isfinite(value) for value in values):
        return "diverged"
    error = f" ± {standard_error(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{error}"


def paired(one: Tuned, other: Tuned) -> str:
    """Return the mean difference one - other over their common seeds, with its standard error."""
    return spread([a - b for a, b in zip(one.losses, other.losses, strict=True)])


def replace_section(page: Path, name: str, content: str) -> None:
    """Put content between the page's marks <!-- name --> and <!-- /name -->.

    Raises:
        ValueError: The page lacks the marks.
    """
    text = page.read_text(encoding="utf-8")
    pattern = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- /{re.escape(name)} -->)", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"{page} has no marks for {name}")
    page.write_text(pattern.sub(lambda match: f"{match[1]}{content}{match[2]}", text), encoding="utf-8")


def bars(tuned: Sequence[Tuned], cells: Sequence[str], measure: Measure, path: Path, *, label: str) -> None:
    """Draw each cell as a panel of horizontal points with error bars, one row an arm."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    columns = min(3, len(cells))
    rows = math.ceil(len(cells) / columns)
    height = 0.8 + 0.24 * len(names_of(tuned))
    figure, axes = plt.subplots(rows, columns, figsize=(4.6 * columns, height * rows), squeeze=False, sharey=True)
    for axis, cell in zip(axes.flat, cells, strict=False):
        _panel(axis, [result for result in tuned if result.arm.cell == cell], names_of(tuned), measure)
        axis.set_title(textwrap.fill(cell, 42), fontsize=9)
        axis.set_xlabel(label, fontsize=8)
    for axis in axes.flat[len(cells) :]:
        axis.set_visible(False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _panel(axis: "Axes", results: Sequence[Tuned], names: Sequence[str], measure: Measure) -> None:
    for result in results:
        row = len(names) - 1 - names.index(result.arm.name)
        values = [measure(outcome) for outcome in result.outcomes]
        if not all(math.isfinite(value) for value in values):
            continue
        axis.errorbar(mean(values), row, xerr=standard_error(values), fmt="o", color="#0072b2", markersize=4, capsize=2)
        axis.plot(values, [row] * len(values), "|", color="#999999", markersize=5)
    axis.set_yticks(range(len(names)), list(reversed(names)), fontsize=7)
    axis.tick_params(axis="x", labelsize=7)
    axis.grid(axis="x", alpha=0.3)


def _best(results: Sequence[Tuned], measure: Measure, *, low_is_good: bool) -> Tuned | None:
    scored = [(mean([measure(outcome) for outcome in result.outcomes]), result) for result in results]
    finite = [(score, result) for score, result in scored if math.isfinite(score)]
    if not finite:
        return None
    return (min if low_is_good else max)(finite, key=lambda pair: pair[0])[1]
