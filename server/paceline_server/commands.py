"""The server's commands: serve.

torch and grpc are imported by the functions that need them: `paceline --help` loads this module too.
"""

import json
import signal
import socket
import sys
import threading
from typing import Any

import click
import uvloop

from paceline_server.config import ServerConfig
from paceline_server.options import server_config_options
from paceline_server.processes import ShardProcesses
from paceline_server.readiness import tell_ready

LOOK_EVERY_S = 0.2
"""Seconds between looks at whether every shard's process is still there."""

ENDED_BY_ITSELF = 70
"""Exit code when a shard's process ended without being asked: an internal failure, as in `paceline --help`."""


@click.command()
@server_config_options
@click.option("as_json", "--json", is_flag=True, help="Announce the address as one JSON object on stdout.")
def serve(config: ServerConfig, as_json: bool) -> None:
    """Serve one run until SIGTERM or Ctrl-C.

    With --shards N, N processes listen on N ports in a row; clients find them all from any one. With --shard-addresses
    and --shard-index this is one shard of several, each started on its own.
    """
    source = click.get_current_context().get_parameter_source("security__tokens")
    if source is click.core.ParameterSource.COMMANDLINE:
        click.echo("Warning: others on this machine can see the tokens in the list of processes; use a file.", err=True)
    if len(config.shard_indexes) == 1:
        sys.exit(uvloop.run(_serve_here(config, as_json)))
    else:
        sys.exit(_serve_in_processes(config, as_json))


async def _serve_here(config: ServerConfig, as_json: bool) -> int:
    from paceline_server.server import ShardServer
    from paceline_server.shard_process import pass_over_modules, recovery_report, shard_addresses, stop_signal

    stopping = stop_signal()
    server = ShardServer(config, config.shard_indexes[0])
    port = server.bind()
    await server.start(shard_addresses(config, [port]))
    pass_over_modules()
    _announce(config, [port], [recovery_report(server.recovered)], as_json)
    tell_ready()
    return await server.run_until(stopping)


def _serve_in_processes(config: ServerConfig, as_json: bool) -> int:
    """Serve with a process a shard; the exit code."""
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    shards = ShardProcesses(config)
    shards.start()
    _announce(config, shards.ports, shards.recoveries, as_json)
    tell_ready()
    while not stopping.wait(LOOK_EVERY_S) and not shards.failed() and not shards.drained():
        continue
    ended = shards.failed()
    code = shards.stop()
    if not ended:
        return code
    state = "its state is lost" if config.storage.data_dir is None else "start the server again to go on"
    click.echo(f"Error: shard {ended[0]} ended by itself, and the others were stopped; {state}", err=True)
    return ENDED_BY_ITSELF


def _announce(config: ServerConfig, ports: list[int], recoveries: list[dict[str, Any]], as_json: bool) -> None:
    host = f"[{config.host}]" if ":" in config.host else config.host
    addresses = [f"{host}:{port}" for port in ports]
    shards = [*config.shard_addresses] or addresses
    by_shard = list(zip(config.shard_indexes, recoveries, strict=True))
    durable = config.storage.data_dir is not None
    if as_json:
        listening = {"event": "listening", "address": addresses[0], "shards": shards, "durable": durable}
        recovered = [{"shard": shard, **recovery} for shard, recovery in by_shard if recovery]
        click.echo(json.dumps({**listening, "recovered": recovered} if durable else listening))
        return
    if durable:
        click.echo(f"serving on {', '.join(addresses)}; the state is kept in {config.storage.data_dir}")
    else:
        click.echo(f"serving on {', '.join(addresses)}; the state is held in memory and ends with this process")
    for shard, recovery in by_shard:
        _announce_recovery(shard, recovery)
    arguments = [repr(_reachable(config, addresses[0])), "model", "optimizer"]
    arguments += ["token=..."] if config.security.asks_for_tokens else []
    arguments += ["tls=..."] if config.security.tls_cert else []
    click.echo(f"workers join with: paceline.join({', '.join(arguments)})")


def _reachable(config: ServerConfig, address: str) -> str:
    """Where workers probably reach this server."""
    if config.shard_index is not None:
        return config.shard_addresses[config.shard_index]
    if config.host in ("0.0.0.0", "::"):  # noqa: S104
        return f"{socket.gethostname()}:{address.rpartition(':')[2]}"
    return address


def _announce_recovery(shard: int, recovery: dict[str, Any]) -> None:
    if not recovery.get("recovered_records"):
        return
    click.echo(
        f"shard {shard} is where it was at record {recovery['recovered_records']}: "
        f"{recovery['replayed_records']} records replayed, in {recovery['recovery_ms'] / 1000:.1f} s"
    )
    for note in recovery["notes"]:
        click.echo(f"shard {shard}: {note}", err=True)
