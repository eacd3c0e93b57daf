"""The server's commands: serve.

torch and grpc are imported by the functions that need them: `paceline --help` loads this module too.
"""

import json
import signal
import socket
import sys
import threading

import click
import uvloop

from paceline_server.config import ServerConfig
from paceline_server.options import server_config_options
from paceline_server.processes import ShardProcesses

LOOK_EVERY_S = 0.2
"""Seconds between looks at whether every shard's process is still there."""

ENDED_BY_ITSELF = 70
"""Exit code when a shard's process ended without being asked: an internal failure, as in `paceline --help`."""


@click.command()
@server_config_options
@click.option("as_json", "--json", is_flag=True, help="Announce the address as one JSON object on stdout.")
def serve(config: ServerConfig, as_json: bool) -> None:
    """Serve one run until SIGTERM or Ctrl-C.

    With --shards N, N processes listen on N ports in a row; clients find them all from any one.
    """
    if config.shards == 1:
        uvloop.run(_serve_here(config, as_json))
    else:
        sys.exit(_serve_in_processes(config, as_json))


async def _serve_here(config: ServerConfig, as_json: bool) -> None:
    from paceline_server.server import ShardServer
    from paceline_server.shard_process import shard_addresses, stop_signal

    stopping = stop_signal()
    server = ShardServer(config, index=0)
    port = server.bind()
    await server.start(shard_addresses(config, [port]))
    _announce(config, [port], as_json)
    await stopping.wait()
    await server.drain()


def _serve_in_processes(config: ServerConfig, as_json: bool) -> int:
    """Serve with a process a shard; the exit code."""
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    shards = ShardProcesses(config)
    shards.start()
    _announce(config, shards.ports, as_json)
    while not stopping.wait(LOOK_EVERY_S) and not shards.ended():
        continue
    ended = shards.ended()
    code = shards.stop()
    if not ended:
        return code
    click.echo(f"Error: shard {ended[0]} ended by itself; its state is lost, and the others were stopped", err=True)
    return ENDED_BY_ITSELF


def _announce(config: ServerConfig, ports: list[int], as_json: bool) -> None:
    host = f"[{config.host}]" if ":" in config.host else config.host
    addresses = [f"{host}:{port}" for port in ports]
    if as_json:
        click.echo(json.dumps({"event": "listening", "address": addresses[0], "shards": addresses, "durable": False}))
        return
    click.echo(f"serving on {', '.join(addresses)}; the state is held in memory and ends with this process")
    reachable = f"{socket.gethostname()}:{ports[0]}" if config.host in ("0.0.0.0", "::") else addresses[0]  # noqa: S104
    arguments = [repr(reachable), "model", "optimizer"]
    arguments += ["token=..."] if config.security.accepted_tokens() else []
    arguments += ["tls=..."] if config.security.tls_cert else []
    click.echo(f"workers join with: paceline.join({', '.join(arguments)})")
