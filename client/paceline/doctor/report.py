"""An examination as a person reads it, with rich where it is installed, and as JSON."""

from dataclasses import asdict
from typing import Any

import click

from paceline.doctor.advice import Expectation, Finding, Level
from paceline.doctor.examination import Examination
from paceline.doctor.probing import Rate
from paceline.sizing import TARGET, Setting, megabits

_COLORS = {Level.FINE: "green", Level.WARNING: "yellow", Level.PROBLEM: "red"}


def as_mapping(found: Examination) -> dict[str, Any]:
    """All figures, of values that JSON has; seconds, bytes and shares of 1, as the names say."""
    told = asdict(found)
    told["findings"] = [{**asdict(finding), "level": finding.level.value} for finding in found.findings]
    told["error"] = None if found.error is None else type(found.error).__name__
    return told


def show(found: Examination) -> None:
    """Print it."""
    for finding in found.findings:
        mark = click.style(f"{finding.level.value:>8}", fg=_COLORS[finding.level])
        click.echo(f"{mark}  {finding.about}: {finding.text}")
    if found.rates:
        click.echo("")
        _show_table(found.rates)
    if found.expected is not None:
        click.echo("")
        click.echo(_expectation_text(found.expected))


def _show_table(rates: tuple[Rate, ...]) -> None:
    head = ("connections", "up", "down")
    rows = [
        (str(rate.connections), megabits(8 * rate.up_bytes_per_s), megabits(8 * rate.down_bytes_per_s))
        for rate in rates
    ]
    try:
        from rich.console import Console
        from rich.table import Table
    except ModuleNotFoundError:
        for row in (head, *rows):
            click.echo("  " + "".join(cell.rjust(16) for cell in row))
        return
    table = Table(*head)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _expectation_text(expected: Expectation) -> str:
    model, now, choice = expected.model, expected.configured, expected.recommended
    return (
        f"For {model.num_elements:,} parameters and steps of {model.step_s:.3g} s ({model.source}):\n"
        f"  as the run is configured: {now.uplink} up, {now.downlink} down, H = {now.inner_steps}, "
        f"{_connections(now)}: utilization {100 * now.utilization:.0f} %, an exchange {now.exchange_s:.3g} s"
        f"; H = {expected.configured_needs} gives {100 * TARGET:.0f} %\n"
        f"  recommended: {choice.uplink} up, {choice.downlink} down, H = {choice.inner_steps}, "
        f"{_connections(choice)}: utilization {100 * choice.utilization:.0f} %, an exchange {choice.exchange_s:.3g} s"
    )


def _connections(setting: Setting) -> str:
    return "1 connection" if setting.connections == 1 else f"{setting.connections} connections"


def worst(findings: list[Finding]) -> Level:
    """The level of the worst of them."""
    levels = [finding.level for finding in findings]
    return next((level for level in (Level.PROBLEM, Level.WARNING) if level in levels), Level.FINE)
