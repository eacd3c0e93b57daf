"""The command `paceline chaos`: break a deployment in every way that it must survive, and check that it did.

torch and grpc are imported by the functions that need them: `paceline --help` loads this module too.
"""

import asyncio
import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from paceline_chaos.plan import Kind

if TYPE_CHECKING:
    from paceline_chaos.outcome import Outcome

KILLS = 10
"""Kills of the server, unless said otherwise."""

FAULTS = 50
"""Faults of workers and links, unless said otherwise: each kind a few times."""

FOREIGN_KINDS = tuple(kind for kind in Kind if not kind.on_server or kind is Kind.SERVER_KILL)
"""What can be done to a server that was not started here."""

_names = [kind.value for kind in Kind]


@click.command(short_help="Break a deployment in every way that it must survive, and check that nothing was lost.")
@click.option("--seed", default=0, show_default=True, help="Decides the faults and what is pushed.")
@click.option("--kills", type=click.IntRange(0), help=f"Kills of the server.  [default: {KILLS}, or by --seconds]")
@click.option("--faults", type=click.IntRange(0), help=f"Others.  [default: {FAULTS}, or by --seconds]")
@click.option("--seconds", type=click.FloatRange(0, min_open=True), help="Begin no further fault after so long.")
@click.option("--kinds", metavar="KIND,KIND,...", help=f"Only these: {', '.join(_names)}.  [default: all that can be]")
@click.option("--workers", default=4, show_default=True, type=click.IntRange(1, 64), help="Workers that push.")
@click.option("--shards", default=1, show_default=True, type=click.IntRange(1, 16), help="Shards of the local server.")
@click.option(
    "--data-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="The server's data directory: with --address, if it can be read here, the journal is compared too; "
    "otherwise a new folder for the local server.",
)
@click.option("--address", help="host:port of a deployment of your own; it needs a run of its own.")
@click.option("--token", envvar="PACELINE_TOKEN", show_envvar=True, help="Its token.")
@click.option("--tls-ca", type=click.Path(exists=True, dir_okay=False), help="CA file to verify it with.")
@click.option("--kill-command", help="Ends it with SIGKILL, such as 'docker compose kill -s SIGKILL server'.")
@click.option("--start-command", help="Starts it, such as 'docker compose start server'.")
@click.option("--report", type=click.Path(dir_okay=False, path_type=Path), help="Markdown file; see below.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="Write the JSON to a file too.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else; progress on stderr.")
def chaos(report: Path | None, output: Path | None, as_json: bool, **asked: Any) -> None:
    """Break a deployment in every way that it must survive, and check that nothing acknowledged was lost.

    Without --address, a server and workers are started on this machine. Workers push through links that are cut, slow,
    silent or garbling; they and the server are killed and stopped. Whenever the server is down, its journal is compared
    with what the workers were told. --report puts the tables between the markers of a Markdown file. Exit code 0: all
    held; 1: something was lost, and what.
    """
    from paceline_chaos.report import lines, machine, section, write_section

    # A full disk, a lost connection and the like are the purpose here, and would be told a thousand times.
    logging.getLogger("paceline_server").setLevel(logging.CRITICAL)
    outcome = asyncio.run(_tried(_tell(to_stderr=as_json), **asked))
    where = machine()
    mapping = {**where, "workers": asked["workers"], **outcome.as_mapping()}
    if output is not None:
        output.write_text(json.dumps(mapping, indent=2) + "\n", encoding="utf-8")
    if report is not None:
        write_section(report, section(outcome, where))
    click.echo(json.dumps(mapping) if as_json else "\n".join(lines(outcome)))
    sys.exit(0 if outcome.held else 1)


async def _tried(tell: Any, **asked: Any) -> "Outcome":
    from paceline_chaos.deployments import Request, try_foreign, try_own

    address, kill, start = asked["address"], asked["kill_command"], asked["start_command"]
    _require_sense(address, kill, start, asked["data_dir"])
    unbounded = asked["seconds"] is not None
    request = Request(
        seed=asked["seed"],
        kinds=_kinds(asked["kinds"], foreign=address is not None, killable=kill is not None),
        kills=asked["kills"] if asked["kills"] is not None or unbounded else KILLS,
        faults=asked["faults"] if asked["faults"] is not None or unbounded else FAULTS,
        seconds=asked["seconds"],
        workers=asked["workers"],
        shards=asked["shards"],
        data_dir=asked["data_dir"],
    )
    if address is None:
        return await try_own(request, tell)
    access = {"token": asked["token"], "tls_ca": asked["tls_ca"]}
    return await try_foreign(request, tell, address=address, kill_command=kill, start_command=start, **access)


def _require_sense(address: str | None, kill: str | None, start: str | None, data_dir: Path | None) -> None:
    if (kill is None) != (start is None):
        raise click.UsageError("--kill-command and --start-command belong together")
    if kill is not None and address is None:
        raise click.UsageError("--kill-command is for a deployment of your own: give its --address")
    if address is None and data_dir is not None and data_dir.exists() and any(data_dir.iterdir()):
        raise click.UsageError(f"{data_dir} is not empty: chaos needs a run of its own, in a new folder")


def _kinds(text: str | None, *, foreign: bool, killable: bool) -> list[Kind]:
    possible = [kind for kind in FOREIGN_KINDS if killable or not kind.on_server] if foreign else list(Kind)
    if text is None:
        return possible
    names = text.split(",")
    unknown = [name for name in names if name not in _names]
    if unknown:
        raise click.BadParameter(f"{unknown[0]!r} is no fault; there are {', '.join(_names)}", param_hint="--kinds")
    chosen = [Kind(name) for name in dict.fromkeys(names)]
    impossible = [kind.value for kind in chosen if kind not in possible]
    if impossible:
        raise click.BadParameter(
            f"{impossible[0]} cannot be done to a server that was not started here"
            + (" without --kill-command" if impossible[0] == Kind.SERVER_KILL.value else ""),
            param_hint="--kinds",
        )
    return chosen


def _tell(*, to_stderr: bool) -> Any:
    def tell(line: str) -> None:
        click.echo(line, err=to_stderr)

    return tell
