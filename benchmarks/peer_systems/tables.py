"""The tables of docs/peers.md, made of the measured cells, and put between their markers in the page."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Cell = Mapping[str, Any]


def exchange_table(cells: Sequence[Cell]) -> str:
    """A row for each system, and for each link and size: seconds, megabytes on the wire, memory."""
    chosen = [each for each in cells if each["what"] == "exchange"]
    columns = sorted({(each["link"] != "loopback", each["link"], each["parameters"]) for each in chosen})
    heads = [f"{size / 1e6:g} M, {link_in_words(link)}" for _, link, size in columns]
    return _table(chosen, heads, [(link, size) for _, link, size in columns], _exchange)


def utilization_table(cells: Sequence[Cell]) -> str:
    """A row for each system, and for each link and size the utilization."""
    chosen = [each for each in cells if each["what"] == "utilization"]
    columns = sorted({(each["parameters"], each["link"]) for each in chosen})
    heads = [f"{size / 1e6:g} M, {link_in_words(link)}" for size, link in columns]
    return _table(chosen, heads, [(link, size) for size, link in columns], _utilization)


def cost_table(cells: Sequence[Cell]) -> str:
    """What the largest exchange over loopback takes of CPU and memory."""
    chosen = [each for each in cells if each["what"] == "exchange" and each["link"] == "loopback"]
    if not chosen:
        return ""
    size = max(each["parameters"] for each in chosen)
    heads = ["system", "CPU s, worker", "CPU s, coordinator", "MiB, worker", "MiB, coordinator"]
    rows = [
        [_name(each), *(_number(each.get(field), digits) for field, digits in COSTS)]
        for each in chosen
        if each["parameters"] == size and "not_run" not in each
    ]
    return f"At {size / 1e6:g} M parameters:\n\n" + _lines([heads, *rows])


COSTS = (("worker_cpu_s", 2), ("coordinator_cpu_s", 2), ("worker_mib", 0), ("coordinator_mib", 0))


def link_in_words(link: str) -> str:
    """What the tables call a link: "1000:20" is "1 Gbit/s, 20 ms"."""
    if link == "loopback":
        return link
    rate_mbit, rtt_ms = link.split(":")
    rate = f"{float(rate_mbit) / 1000:g} Gbit/s" if float(rate_mbit) >= 1000 else f"{rate_mbit} Mbit/s"
    return f"{rate}, {rtt_ms} ms"


def fill(root: Path, others: Mapping[str, str]) -> None:
    """Put tables into docs/peers.md.

    Args:
        root: The repository.
        others: Tables that are not made of measured cells, by the name of their place in the page.
    """
    results = json.loads((root / "benchmarks" / "results" / "peers.json").read_text())
    page = root / "docs" / "peers.md"
    text = page.read_text()
    for name, table in TABLES.items():
        text = between(text, name, table(results["cells"]))
    for name, content in others.items():
        text = between(text, name, content)
    text = between(text, "machine", f"{results['machine']}; {_dates(results['cells'])}.\n")
    page.write_text(text)


def between(text: str, name: str, content: str) -> str:
    """The text with the content between the markers of that name.

    Raises:
        ValueError: The text has no such markers.
    """
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    replaced, count = re.subn(
        re.escape(begin) + ".*?" + re.escape(end), lambda _: begin + content + end, text, flags=re.DOTALL
    )
    if count != 1:
        raise ValueError(f"the page has {count} places for {name!r}; it needs one, between {begin.strip()} and {end}")
    return replaced


TABLES: dict[str, Callable[[Sequence[Cell]], str]] = {
    "exchange": exchange_table,
    "cost": cost_table,
    "utilization": utilization_table,
}


def _table(
    cells: Sequence[Cell], heads: Sequence[str], columns: Sequence[tuple[str, int]], show: Callable[[Cell], str]
) -> str:
    if not cells:
        return ""
    names = list(dict.fromkeys(each["system"] for each in cells))
    rows, reasons = [], []
    for name in names:
        of_system = {(each["link"], each["parameters"]): each for each in cells if each["system"] == name}
        first = next(iter(of_system.values()))
        row = [_name(next((each for each in of_system.values() if "version" in each), first))]
        for column in columns:
            each = of_system.get(column)
            row.append("" if each is None else show(each))
            if each is not None and "not_run" in each:
                where = f"{column[1] / 1e6:g} M, {link_in_words(column[0])}"
                reasons.append(f"- {each['label']}, {where}: {each['not_run']}")
        rows.append(row)
    table = _lines([["system", *heads], *rows])
    return table + ("\nNot run:\n\n" + "\n".join(reasons) + "\n" if reasons else "")


def _exchange(each: Cell) -> str:
    return "not run" if "not_run" in each else f"{each['step_s']:.3f} s, {each['wire_mb']:.0f} MB"


def _utilization(each: Cell) -> str:
    return (
        "not run"
        if "not_run" in each
        else f"{100 * each['utilization']:.1f} % ({100 * each['utilization_stated']:.1f})"
    )


def _name(each: Cell) -> str:
    version = f" {each['version']}" if each.get("version") else ""
    return f"{each['label']}{version} ({each['on_the_wire']})"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _dates(cells: Sequence[Cell]) -> str:
    dates = sorted({each["measured"] for each in cells})
    return dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"


def _lines(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, ["---"] * len(head), *body))
