"""The operator's commands: `paceline admin drain`, `evict`, `admit`, `snapshot`, `set` and `audit`.

Each talks to every shard of the run and says what became of each. torch and grpc are imported by the functions that
need them: `paceline --help` loads this module too.
"""

import asyncio
import json
import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from paceline.cli import exit_code_of
from paceline.commands import REACH_S, connection_options, outcome_mapping

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from paceline.shards import Outcome, Stub
    from paceline_wire.v1 import admin_pb2

LONG_CALL_S = 3600.0
"""Seconds that a snapshot or a drain may take before the command gives up waiting; the shard goes on."""

LONGEST_S = 100 * 365.25 * 86400
"""The longest eviction that is not for ever: what the message can hold is not much more."""

_DURATION = re.compile(r"(?P<count>[0-9]+(\.[0-9]+)?)(?P<unit>[smhd]?)")
_UNIT_S = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}

KEYS = {"outer.lr": "lr", "exchange.inner_steps": "inner_steps", "schedule.quota": "quota"}
"""The keys of the configuration that can change while a run goes on, and their fields in ConfigureRequest."""


class _Duration(click.ParamType[float]):
    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        match = _DURATION.fullmatch(str(value))
        duration_s = 0.0 if match is None else float(match["count"]) * _UNIT_S[match["unit"]]
        if not 0 < duration_s <= LONGEST_S:
            self.fail(f"{value!r} is no duration; write it like 90s, 30m, 12h or 7d, a century at most", param, ctx)
        return duration_s


class _Setting(click.ParamType[tuple[str, float | int]]):
    name = "key=value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, float | int]:
        key, _, text = str(value).partition("=")
        if key not in KEYS:
            self.fail(f"{key!r} cannot change while a run goes on; these can: {', '.join(KEYS)}", param, ctx)
        try:
            if key == "outer.lr":
                return key, float(text)
            number = 0 if key == "schedule.quota" and not text else int(text)
        except ValueError:
            self.fail(f"{text!r} is no value for {key}", param, ctx)
        if not (0 <= number < 2**32) or (number == 0 and text):
            self.fail(f"{key} should be a whole number above 0", param, ctx)
        return key, number


def _json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("as_json", "--json", is_flag=True, help="Print one JSON object.")(command)


@click.group()
def admin() -> None:
    """What an operator does to a running server: every act is in its audit log.

    Each command takes the address of any shard, acts on all shards of the run, and says what became of each. It ends
    with 0 if all did it.
    """


@admin.command()
@connection_options
@click.option("--discard", is_flag=True, help="Drain servers without a data directory, too: their state is lost.")
@_json_option
def drain(address: str, token: str | None, tls: bool, tls_ca: str | None, discard: bool, as_json: bool) -> None:
    """Take no new pushes, finish, write a snapshot, and end the server with exit code 0.

    Workers wait until it is started again.
    """
    from paceline_wire.v1 import admin_pb2

    request = admin_pb2.DrainRequest(discard_state=discard)
    outcomes = _on_every_shard(
        address,
        token,
        tls_ca or tls,
        lambda stub, metadata: stub.Drain(request, timeout=LONG_CALL_S, metadata=metadata),
    )
    _report(outcomes, as_json, _drained_text)


@admin.command()
@connection_options
@click.argument("worker")
@click.option("--reason", default="", help="What the worker is told, and the audit log: one line.")
@click.option("duration_s", "--for", type=_Duration(), help="For so long, such as 30m. Left out: until admitted.")
@_json_option
def evict(
    address: str,
    token: str | None,
    tls: bool,
    tls_ca: str | None,
    worker: str,
    reason: str,
    duration_s: float | None,
    as_json: bool,
) -> None:
    """End WORKER's membership, and refuse its name for a time or until `paceline admin admit`."""
    from paceline.calls import CALL_S
    from paceline_wire.v1 import admin_pb2

    duration_ms = None if duration_s is None else max(1, round(duration_s * 1000))
    request = admin_pb2.EvictRequest(worker_id=worker, reason=reason, duration_ms=duration_ms)
    outcomes = _on_every_shard(
        address, token, tls_ca or tls, lambda stub, metadata: stub.Evict(request, timeout=CALL_S, metadata=metadata)
    )
    _report(outcomes, as_json, _evicted_text)


@admin.command()
@connection_options
@click.argument("worker")
@_json_option
def admit(address: str, token: str | None, tls: bool, tls_ca: str | None, worker: str, as_json: bool) -> None:
    """Let WORKER join again that was evicted or is in quarantine."""
    from paceline.calls import CALL_S
    from paceline_wire.v1 import admin_pb2

    request = admin_pb2.AdmitRequest(worker_id=worker)
    outcomes = _on_every_shard(
        address, token, tls_ca or tls, lambda stub, metadata: stub.Admit(request, timeout=CALL_S, metadata=metadata)
    )
    _report(outcomes, as_json, lambda answer: "may join" if answer.was_kept_out else "was not kept out")


@admin.command()
@connection_options
@_json_option
def snapshot(address: str, token: str | None, tls: bool, tls_ca: str | None, as_json: bool) -> None:
    """Write a snapshot now; says where on the server's host, and how many bytes."""
    from paceline_wire.v1 import admin_pb2

    request = admin_pb2.SnapshotRequest()
    outcomes = _on_every_shard(
        address,
        token,
        tls_ca or tls,
        lambda stub, metadata: stub.Snapshot(request, timeout=LONG_CALL_S, metadata=metadata),
    )
    _report(outcomes, as_json, _snapshot_text)


@admin.command(name="set")
@connection_options
@click.argument("settings", nargs=-1, required=True, type=_Setting())
@_json_option
def set_(
    address: str,
    token: str | None,
    tls: bool,
    tls_ca: str | None,
    settings: Sequence[tuple[str, float | int]],
    as_json: bool,
) -> None:
    """Change settings of the running server: outer.lr=0.35, exchange.inner_steps=100, schedule.quota=8.

    Pushes that are decided from then on enter by the new values, and workers learn them with their next answers. They
    hold across restarts, until they are set again or the server is started with another value for them. Without a
    value, `schedule.quota=` leaves the quota to the number of active workers.

    Nothing is changed unless every shard answers. Should one fail all the same in the midst of it, the command says
    which; give it again.
    """
    from paceline.calls import CALL_S
    from paceline_wire.v1 import admin_pb2

    request = admin_pb2.ConfigureRequest()
    for key, value in settings:
        setattr(request, KEYS[key], value)
    outcomes = _on_every_shard(
        address,
        token,
        tls_ca or tls,
        lambda stub, metadata: stub.Configure(request, timeout=CALL_S, metadata=metadata),
        only_if_all=True,
    )
    _report(outcomes, as_json, _changed_text)


@admin.command()
@connection_options
@click.option("--last", default=100, show_default=True, type=click.IntRange(1, 1000), help="So many entries a shard.")
@_json_option
def audit(address: str, token: str | None, tls: bool, tls_ca: str | None, last: int, as_json: bool) -> None:
    """Show what operators did: who, what, when, from which value to which, and with what result."""
    from paceline.calls import CALL_S
    from paceline_wire.v1 import admin_pb2

    request = admin_pb2.AuditRequest(num_entries=last)
    outcomes = _on_every_shard(
        address, token, tls_ca or tls, lambda stub, metadata: stub.Audit(request, timeout=CALL_S, metadata=metadata)
    )
    _report(outcomes, as_json, _audit_text)


def _on_every_shard(
    address: str,
    token: str | None,
    tls: str | bool,
    call: "Callable[[Stub, tuple[tuple[str, str], ...]], Awaitable[Any]]",
    *,
    only_if_all: bool = False,
) -> "list[Outcome[Any]]":
    from paceline.channels import Access
    from paceline.shards import on_every_shard

    access = Access.of(tls, token)
    return asyncio.run(on_every_shard(address, access, call, reach_s=REACH_S, only_if_all=only_if_all))


def _report(outcomes: "list[Outcome[Any]]", as_json: bool, text: Callable[[Any], str]) -> None:
    """Print what became of each shard, and end with the exit code of the first that failed."""
    if as_json:
        click.echo(json.dumps({"shards": [outcome_mapping(outcome) for outcome in outcomes]}, indent=2))
    for outcome in outcomes:
        if outcome.error is not None:
            click.echo(f"shard {outcome.shard} ({outcome.target}): {outcome.error}", err=True)
        elif not as_json:
            click.echo(f"shard {outcome.shard} ({outcome.target}): {text(outcome.answer)}")
    failed = [outcome.error for outcome in outcomes if outcome.error is not None]
    if failed:
        if len(failed) < len(outcomes):
            click.echo("Error: not all shards did it; give the command again once they answer", err=True)
        raise click.exceptions.Exit(exit_code_of(failed[0]))


def _drained_text(answer: "admin_pb2.DrainResponse") -> str:
    if not answer.HasField("snapshot"):
        return f"drained, and ends; {answer.problem}"
    return f"drained, and ends; {_snapshot_text(answer.snapshot)}"


def _evicted_text(answer: "admin_pb2.EvictResponse") -> str:
    if answer.was_evicted:
        return "was evicted already; the new reason and time count"
    return "evicted" if answer.was_member else "was no member; its name is refused from now on"


def _snapshot_text(answer: "admin_pb2.SnapshotResponse") -> str:
    manner = "the newest snapshot has everything" if answer.existed else "snapshot written"
    return f"{manner}: {answer.path}, {answer.num_bytes:,} bytes"


def _changed_text(answer: "admin_pb2.ConfigureResponse") -> str:
    changes = [
        f"{key} {_value(answer.before, field)} -> {_value(answer.after, field)}"
        for key, field in KEYS.items()
        if _value(answer.before, field) != _value(answer.after, field)
    ]
    kept = "holds across restarts" if answer.is_kept else "until the server is started again"
    return f"{', '.join(changes) or 'as it was'}; {kept}"


def _value(settings: "admin_pb2.LiveSettings", field: str) -> str:
    if field == "quota" and not settings.HasField("quota"):
        return "left out"
    return f"{getattr(settings, field):g}"


def _audit_text(answer: "admin_pb2.AuditResponse") -> str:
    return "".join(f"\n  {_entry_text(entry)}" for entry in answer.entries) or "nothing was done yet"


def _entry_text(entry: "admin_pb2.AuditEntry") -> str:
    time = datetime.fromtimestamp(entry.time_us / 1e6, UTC).isoformat(timespec="milliseconds")
    change = f" from {entry.old or 'nothing'} to {entry.new or 'nothing'}" if entry.old or entry.new else ""
    subject = f" {entry.subject}" if entry.subject else ""
    return f"{time} {entry.who or 'unnamed'} ({entry.peer}): {entry.act}{subject}{change}: {entry.result}"
