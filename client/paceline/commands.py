"""The client's commands that look at a run: status and export.

torch and grpc are imported by the functions that need them: `paceline --help` loads this module too.
"""

import asyncio
import functools
import json
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from paceline.cli import exit_code_of
from paceline_wire.errors import InvalidInputError, NotInitializedError

if TYPE_CHECKING:
    import torch
    from google.protobuf.message import Message

    from paceline.channels import TLS
    from paceline.shards import Outcome
    from paceline_wire.manifest import Manifest
    from paceline_wire.v1 import admin_pb2

REACH_S = 5.0
"""Seconds that an operator waits for a server that cannot be reached."""


def connection_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the address and the options that every connection needs."""
    advice = "The run's token. Others on this machine can see flags, but not variables; or PACELINE_TOKEN_FILE=FILE."
    ca = click.Path(exists=True, dir_okay=False)

    @functools.wraps(command)
    def connecting(
        *args: Any, tls_cert: str | None, tls_key: str | None, tls_server_name: str | None, **arguments: Any
    ) -> Any:
        context = click.get_current_context()
        if context.get_parameter_source("token") is click.core.ParameterSource.COMMANDLINE:
            click.echo("Warning: whoever is on this machine can see the token in the list of processes.", err=True)
        if tls_cert or tls_key or tls_server_name:
            from paceline.channels import TLS

            ca = arguments["tls_ca"]
            arguments["tls_ca"] = TLS(ca=ca, cert=tls_cert, key=tls_key, server_name=tls_server_name)
        return command(*args, **arguments)

    decorated: Callable[..., Any] = connecting
    name = "The name in the server's certificate, if it is not the address's: behind a tunnel, or on Ray."
    for option in (
        click.option("--tls-server-name", metavar="NAME", help=name),
        click.option("--tls-key", type=ca, help="The private key of that certificate."),
        click.option("--tls-cert", type=ca, help="Certificate to show to a server that asks for one."),
        click.option("--tls-ca", type=ca, help="CA file to verify the server with."),
        click.option("--tls", is_flag=True, help="Use TLS and verify with the system's authorities."),
        click.option("--token", envvar="PACELINE_TOKEN", show_envvar=True, help=advice),
        click.argument("address"),
    ):
        decorated = option(decorated)
    return decorated


@click.command()
@connection_options
@click.option("as_json", "--json", is_flag=True, help="Print one JSON object.")
def status(address: str, token: str | None, tls: bool, tls_ca: "TLS | str | None", as_json: bool) -> None:
    """One look at the run served at ADDRESS (host:port of any shard).

    A shard that does not answer is named beside those that do; the exit code is then 3.
    """
    outcomes = asyncio.run(_looks(address, token, tls_ca or tls))
    shards = [outcome.answer for outcome in outcomes if outcome.answer is not None]
    errors = [outcome.error for outcome in outcomes if outcome.error is not None]
    if not shards:
        raise errors[0]
    if as_json:
        click.echo(json.dumps({"shards": [outcome_mapping(outcome) for outcome in outcomes]}, indent=2))
    else:
        _show(shards)
    for outcome in outcomes:
        if outcome.error is not None:
            click.echo(f"shard {outcome.shard} ({outcome.target}): {outcome.error}", err=True)
    if errors:
        raise click.exceptions.Exit(exit_code_of(errors[0]))


def _show(shards: "Sequence[admin_pb2.StatusResponse]") -> None:
    for shard in shards:
        click.echo(_shard_text(shard))
        for warning in shard.warnings:
            click.echo(f"  warning: {warning}")
        for held in shard.quarantined:
            click.echo(_quarantined_text(held))
        for evicted in shard.evicted:
            click.echo(_evicted_text(evicted))
    for difference in _differences(shards):
        click.echo(f"  warning: {difference}")
    for member in shards[0].members:
        click.echo(_member_text(member))


@click.command()
@connection_options
@click.argument("output", type=click.Path(dir_okay=False, path_type=Path))
@click.option("as_json", "--json", is_flag=True, help="Print one JSON object about what was written.")
def export(address: str, token: str | None, tls: bool, tls_ca: "TLS | str | None", output: Path, as_json: bool) -> None:
    """Write the run's parameters to OUTPUT as safetensors, under the model's own names and in its dtypes.

    ADDRESS is host:port of a running server, or the data directory of a stopped one.
    """
    if not output.absolute().parent.is_dir():
        raise click.BadParameter(f"the folder {output.absolute().parent} does not exist", param_hint="OUTPUT")
    import safetensors.torch

    if Path(address).is_dir():
        tensors = _in_model_dtypes(*_data_directory_reader()(Path(address)))
    else:
        tensors = _in_model_dtypes(*asyncio.run(_parameters(address, token, tls_ca or tls)))
    safetensors.torch.save_file(tensors, output)
    elements = sum(tensor.numel() for tensor in tensors.values())
    if as_json:
        click.echo(json.dumps({"path": str(output), "tensors": len(tensors), "elements": elements}))
        return
    click.echo(f"wrote {len(tensors)} tensors with {elements:,} elements to {output}")


def _data_directory_reader() -> "Callable[[Path], tuple[Manifest, dict[str, torch.Tensor]]]":
    """What reads a data directory: the server's part of Paceline knows how, and offers it as an entry point."""
    found = list(entry_points(group="paceline.readers", name="data-directory"))
    if not found:
        raise InvalidInputError("reading a data directory needs the server's part of Paceline, which is not installed")
    reader: Callable[[Path], tuple[Manifest, dict[str, torch.Tensor]]] = found[0].load()
    return reader


async def _looks(address: str, token: str | None, tls: "TLS | str | bool") -> "list[Outcome[admin_pb2.StatusResponse]]":
    # Not through `connect`: a look at a run needs no torch, which takes seconds to import.
    from paceline.channels import Access
    from paceline.shards import on_every_shard, status_of

    return await on_every_shard(address, Access.of(tls, token), status_of, reach_s=REACH_S)


async def _parameters(
    address: str, token: str | None, tls: "TLS | str | bool"
) -> "tuple[Manifest, dict[str, torch.Tensor]]":
    from paceline.client import connect

    async with connect(address, token=token, tls=tls, reach_s=REACH_S) as client:
        base = await client.fetch("fp32")
        if client.manifest is None:
            raise NotInitializedError(f"the run at {address} has no parameters yet")
        return client.manifest, base.tensors


def _in_model_dtypes(manifest: "Manifest", tensors: "dict[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
    import torch

    return {spec.name: tensors[spec.name].to(getattr(torch, spec.dtype)) for spec in manifest.tensors}


def outcome_mapping(outcome: "Outcome[Any]") -> dict[str, Any]:
    """What became of a call to a shard, as JSON has it."""
    told: dict[str, Any] = {"shard_index": outcome.shard, "target": outcome.target}
    if outcome.error is not None:
        told.update(error=type(outcome.error).__name__, reason=str(outcome.error))
    if outcome.answer is not None:
        told.update(as_mapping(outcome.answer))
    return told


def as_mapping(message: "Message") -> dict[str, Any]:
    """A message as JSON has it, with its fields' own names."""
    from google.protobuf.json_format import MessageToDict

    # protobuf writes 64-bit numbers as strings; scripts want numbers.
    mapping = MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    return {key: _number(value) for key, value in mapping.items()}


def _number(value: Any) -> Any:
    if isinstance(value, list):
        return [_number(item) for item in value]
    if isinstance(value, dict):
        return {key: field if key == "worker_id" else _number(field) for key, field in value.items()}
    return int(value) if isinstance(value, str) and value.isdecimal() else value


def _shard_text(shard: "admin_pb2.StatusResponse") -> str:
    if not shard.initialized:
        return f"shard {shard.shard_index}: not initialized; the first worker to join gives it its parameters"
    quota = f"quota {shard.settings.quota}" if shard.settings.HasField("quota") else "quota left to the active workers"
    late = shard.bins_late_total / max(shard.pushes_applied, 1)
    return (
        f"shard {shard.shard_index}: {shard.num_fragments} fragments, {shard.num_elements:,} elements, "
        f"bins {shard.min_bin}-{shard.max_bin}, up {shard.uptime_ms / 1000:.0f} s\n"
        f"  pushes: {shard.pushes_applied} applied ({late:.2f} bins late on average), "
        f"{shard.pushes_duplicate} seen again, {shard.pushes_refused} refused, {shard.pushes_outlying} of them for "
        f"their norm\n"
        f"  bytes: {shard.bytes_received:,} received, {shard.bytes_sent:,} sent\n"
        f"  settings: lr {shard.settings.lr:g}, {shard.settings.inner_steps} inner steps, {quota}\n"
        f"  state: {_storage_text(shard)}" + ("; draining" if shard.draining else "")
    )


def _storage_text(shard: "admin_pb2.StatusResponse") -> str:
    if not shard.HasField("storage"):
        return "in memory, ends with the process"
    storage = shard.storage
    age = f"{storage.snapshot_age_ms / 1000:.0f} s ago" if storage.HasField("snapshot_age_ms") else "none yet"
    return (
        f"at record {storage.newest_record}, sync {storage.sync}; newest snapshot {age}, "
        f"{storage.journal_bytes:,} bytes of journal after it"
    )


def _member_text(member: "admin_pb2.MemberStatus") -> str:
    speed = (
        f"{member.inner_step_us / 1000:.1f} ms a step" if member.HasField("inner_step_us") else "speed not known yet"
    )
    return (
        f"worker {member.worker_index} {member.worker_id}: {speed}, {member.inner_steps} inner steps a round, "
        f"{member.pushes_applied} pushes, {member.pushes_refused} refused, silent for {member.silent_ms / 1000:.1f} s "
        f"of {member.allowed_silence_ms / 1000:.1f} s"
    )


def _quarantined_text(held: "admin_pb2.QuarantinedWorker") -> str:
    return f"  in quarantine for {held.remaining_ms / 1000:.0f} s more: worker {held.worker_id}: {held.reason}"


def _evicted_text(held: "admin_pb2.EvictedWorker") -> str:
    time = f"for {held.remaining_ms / 1000:.0f} s more" if held.HasField("remaining_ms") else "until admitted"
    return f"  evicted {time}: worker {held.worker_id}" + (f": {held.reason}" if held.reason else "")


def _differences(shards: "Sequence[admin_pb2.StatusResponse]") -> list[str]:
    """In which settings shards differ that should have the same, as when one was away while they were set."""
    first = shards[0]
    return [
        f"shard {shard.shard_index} has other settings than shard 0; set them again: `paceline admin set`"
        for shard in shards[1:]
        if shard.settings != first.settings
    ]
