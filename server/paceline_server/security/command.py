"""The command `paceline certs`: a run's certificates and tokens; authority.py does the work."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from paceline_wire.errors import InvalidInputError

if TYPE_CHECKING:
    from paceline_server.security.authority import Authority, Issued

_FOLDER = click.argument("folder", metavar="DIR", type=click.Path(file_okay=False, path_type=Path))
_JSON = click.option("as_json", "--json", is_flag=True, help="Print one JSON object.")
_LASTING = click.FloatRange(min=0, max=3650, min_open=True)
_DAYS = click.option("--days", type=_LASTING, default=90.0, show_default=True, help="How long they last.")


def _identities(command: Callable[..., Any]) -> Callable[..., Any]:
    for role, what in (("admin", "may do everything"), ("observer", "may only look"), ("worker", "trains, as itself")):
        option = click.option(
            f"--{role}", f"{role}s", metavar="NAME", multiple=True, help=f"Name of one that {what}; may be repeated."
        )
        command = option(command)
    return command


@click.group()
def certs() -> None:
    """Make a run's authority, certificates and tokens, and add, renew and revoke them."""


@certs.command()
@_FOLDER
@click.option("--server", "names", metavar="NAME", multiple=True, required=True, help="Name or IP address at which "
              "workers reach the server; may be repeated.")  # fmt: skip
@_identities
@click.option("--credentials", type=click.Choice(["token", "certificate"]), default="token", show_default=True,
              help="What workers show: signed tokens, or client certificates (mutual TLS).")  # fmt: skip
@_DAYS
@click.option("--server-days", type=_LASTING, default=365.0, show_default=True,
              help="How long the server's certificate lasts.")  # fmt: skip
@_JSON
def make(
    folder: Path,
    names: tuple[str, ...],
    credentials: str,
    days: float,
    server_days: float,
    as_json: bool,
    **identities: tuple[str, ...],
) -> None:
    """Make everything that a run needs in DIR, and say how to use it."""
    from paceline_server.security.authority import Authority
    from paceline_server.security.issuing import refuse_names, refuse_server_names

    # Before anything is made: half an authority would have to be finished by other commands.
    refuse_server_names(names)
    refuse_names([name for given in identities.values() for name in given])
    authority = Authority(folder)
    authority.begin(credentials)
    issued = [authority.issue_server(names, server_days), *_issue(authority, identities, days)]
    _tell(authority, folder, issued, as_json)
    if not as_json:
        click.echo(f"the authority is in {folder / 'authority'}: keep it safe, and off the server")
        click.echo(f"start the server with:\n  {_serve_command(folder, credentials)}")


@certs.command()
@_FOLDER
@_identities
@_DAYS
@_JSON
def add(folder: Path, days: float, as_json: bool, **identities: tuple[str, ...]) -> None:
    """Make credentials for further workers, observers and admins. The running server takes them as they are."""
    from paceline_server.security.authority import Authority

    if not any(identities.values()):
        raise InvalidInputError("say for whom: --worker NAME, --observer NAME or --admin NAME")
    authority = Authority(folder)
    _tell(authority, folder, _issue(authority, identities, days), as_json)


@certs.command()
@_FOLDER
@click.argument("names", metavar="[NAME]...", nargs=-1)
@click.option("--server", "server_names", metavar="NAME", multiple=True, help="New names of the server's certificate; "
              "left out, it keeps its own.")  # fmt: skip
@click.option("--days", type=_LASTING, help="How long they last; left out: 90, and 365 "
              "for the server's certificate.")  # fmt: skip
@_JSON
def renew(
    folder: Path, names: tuple[str, ...], server_names: tuple[str, ...], days: float | None, as_json: bool
) -> None:
    """Replace the credentials of NAMEs by new ones; without NAMEs, the server's certificate.

    The old ones stay valid until they end or are revoked. A running server takes its new certificate by itself.
    """
    from paceline_server.security.authority import Authority
    from paceline_server.security.identity import Role
    from paceline_server.security.issuing import refuse_server_names

    refuse_server_names(server_names)
    authority = Authority(folder)
    newest = {each.name: each for each in authority.issued if each.role != "server"}
    if unknown := sorted(set(names) - set(newest)):
        raise InvalidInputError(f"nothing was given out to {', '.join(map(repr, unknown))}")
    issued = [authority.issue(name, Role(newest[name].role), days or 90.0, renew=True) for name in names]
    if server_names or not names:
        before = next((each.names for each in reversed(authority.issued) if each.role == "server"), ())
        issued.append(authority.issue_server(server_names or before, days or 365.0, renew=True))
    _tell(authority, folder, issued, as_json)


@certs.command()
@_FOLDER
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@_JSON
def revoke(folder: Path, names: tuple[str, ...], as_json: bool) -> None:
    """Let the credentials of NAMEs count no more: copy DIR/server/revoked to the server, which reads it by itself."""
    from paceline_server.security.authority import Authority

    gone = Authority(folder).revoke(names)
    if as_json:
        click.echo(json.dumps({"revoked": [asdict(each) for each in gone]}, indent=1))
        return
    for each in gone:
        click.echo(f"revoked the {each.kind} {each.id} of {each.role} {each.name}")
    click.echo(f"the server learns it from {folder / 'server' / 'revoked'}, within seconds")


@certs.command("list")
@_FOLDER
@_JSON
def list_(folder: Path, as_json: bool) -> None:
    """Say what was given out, to whom, and until when."""
    from paceline_server.security.authority import Authority

    issued = Authority(folder).issued
    if as_json:
        click.echo(json.dumps({"issued": [asdict(each) for each in issued]}, indent=1))
        return
    for each in issued:
        state = "revoked" if each.revoked else f"until {each.expires}"
        click.echo(f"{each.role} {each.name}: {each.kind} {each.id}, {state}")


def _issue(authority: "Authority", identities: "dict[str, tuple[str, ...]]", days: float) -> "list[Issued]":
    from paceline_server.security.identity import Role

    wanted: Sequence[tuple[str, Role]] = [(name, role) for role in Role for name in identities[f"{role.value}s"]]
    return [authority.issue(name, role, days) for name, role in wanted]


def _tell(authority: "Authority", folder: Path, issued: "list[Issued]", as_json: bool) -> None:
    from paceline_server.security.identity import Role

    places = [
        authority.server_folder if each.role == "server" else authority.folder_of(each.name, Role(each.role))
        for each in issued
    ]
    if as_json:
        told = [{**asdict(each), "folder": str(place)} for each, place in zip(issued, places, strict=True)]
        click.echo(json.dumps({"folder": str(folder), "issued": told}, indent=1))
        return
    for each, place in zip(issued, places, strict=True):
        whom = "the server" if each.role == "server" else f"{each.role} {each.name}"
        click.echo(f"{place}: for {whom}, a {each.kind} until {each.expires}")


def _serve_command(folder: Path, credentials: str) -> str:
    server = folder / "server"
    asks = f"--security.token-key {server / 'token.pub'}"
    if credentials == "certificate":
        asks = f"--security.client-ca {server / 'ca.pem'}"
    return (
        f"paceline serve --listen 0.0.0.0:7070 --tls-cert {server / 'server.pem'} --tls-key {server / 'server.key'} "
        f"{asks} --security.revoked {server / 'revoked'}"
    )
