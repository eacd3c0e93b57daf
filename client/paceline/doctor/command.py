"""The command doctor. torch and grpc are imported by what needs them: `paceline --help` loads this module too."""

import asyncio
import json
import sys
from typing import TYPE_CHECKING

import click

from paceline.cli import ExitCode, exit_code_of
from paceline.commands import connection_options

if TYPE_CHECKING:
    from paceline.doctor.examination import Examination


class _Count(click.ParamType[int]):
    name = "count"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        text = str(value).lower()
        factor = {"k": 1e3, "m": 1e6, "b": 1e9}.get(text[-1:], 1.0)
        try:
            count = float(text.rstrip("kmb")) * factor
        except ValueError:
            count = 0.0
        if not 1 <= count <= 1e13:
            self.fail(f"{value!r} is no number of parameters; write it like 125m, 7b or 1e9", param, ctx)
        return round(count)


@click.command()
@connection_options
@click.option("--parameters", type=_Count(), help="Size of the model, like 125m or 7b. Left out: the run's.")
@click.option("--step-seconds", type=click.FloatRange(min=0, min_open=True), help="An inner step. Left out: the run's.")
@click.option("--connections", default=8, show_default=True, type=click.IntRange(1, 8), help="To try at most.")
@click.option("--seconds", default=1.5, show_default=True, type=click.FloatRange(0.1, 10), help="Of each transfer.")
@click.option("as_json", "--json", is_flag=True, help="Print one JSON object.")
def doctor(
    address: str,
    token: str | None,
    tls: bool,
    tls_ca: str | None,
    parameters: int | None,
    step_seconds: float | None,
    connections: int,
    seconds: float,
    as_json: bool,
) -> None:
    """Probe the server at ADDRESS from here, and say what to expect of a run over this link.

    Looks at names, TCP, TLS, clocks, round trips, and what 1 to 8 connections carry each way; moves up to 1.5 GB on a
    fast link, and some seconds' worth on a slow one. Ends with 0 if all is well, 1 if something should be better, 3 if
    the server or one of its shards cannot be reached, 4 if it refuses, or its certificate does not verify.
    """
    from paceline.channels import Access
    from paceline.doctor.examination import Wishes, examine
    from paceline.doctor.report import as_mapping, show

    wishes = Wishes(num_elements=parameters, step_s=step_seconds, seconds=seconds, most_connections=connections)

    def tell(what: str) -> None:
        if not as_json and sys.stderr.isatty():
            click.echo(f"{what} ...", err=True)

    found = asyncio.run(examine(address, Access.of(tls_ca or tls, token), wishes, tell))
    if as_json:
        click.echo(json.dumps(as_mapping(found), indent=2))
    else:
        show(found)
    raise click.exceptions.Exit(_exit_code(found))


def _exit_code(found: "Examination") -> ExitCode:
    from paceline.doctor.advice import Level
    from paceline.doctor.report import worst

    if found.reach.failed is not None:
        return ExitCode.REFUSED if found.reach.failed == "tls" else ExitCode.UNREACHABLE
    if found.error is not None:
        return exit_code_of(found.error)
    level = worst(found.findings)
    if level is Level.PROBLEM:
        return ExitCode.UNREACHABLE
    return ExitCode.OK if level is Level.FINE else ExitCode.NEGATIVE
