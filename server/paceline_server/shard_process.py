"""One shard's process among several: `python -m paceline_server.shard_process`, spoken to in lines of JSON.

processes.py starts it and holds the other end:

1. stdin: {"config": {...}, "index": i, "log_level": l}  secrets included, so that none is in the process list
2. stdout: {"port": p}                      the port is taken; or {"error": class, "reason": "..."} and exit code 2
3. stdin: {"ports": [p0, p1, ...]}          the ports of all shards, on this host;
   or {"shards": ["host:port", ...]}        where all shards listen, this one among them
4. stdout: {"event": "serving", ...}        the shard answers; with a data directory, what was recovered from it
5. stdin: {"shards": ["host:port", ...]}    at any time: a shard has moved, and clients are told the new addresses
6. SIGTERM, SIGINT or the end of stdin: the shard finishes what has begun and exits with 0.
"""

import asyncio
import gc
import json
import logging
import signal
import sys
from typing import Any

import uvloop

from paceline_server.config import ServerConfig
from paceline_server.config_base import split_address
from paceline_server.server import ShardServer
from paceline_server.settings import config_from_mapping
from paceline_server.storage.recovery import Recovered
from paceline_wire.errors import ERRORS_BY_NAME, ConfigurationError, StorageError
from paceline_wire.v1 import parameter_server_pb2 as pb

LONGEST_LINE_BYTES = 16 * 1024 * 1024
"""Of what the starter says: the configuration has all tokens in it."""


def stop_signal() -> asyncio.Event:
    """An event that SIGTERM and SIGINT set. Call it inside the running loop."""
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    return stopping


def pass_over_modules() -> None:
    """Let garbage collections pass over all that is there now: modules, mostly, which stay as long as the process.

    A full collection takes a fifth of a second with them, in which the event loop stands still.
    """
    gc.freeze()


def shard_addresses(config: ServerConfig, ports: list[int]) -> list[pb.Shard]:
    """What clients are told of where all shards of the run are; ports are those of the shards that are served here."""
    places = [split_address(address) for address in config.shard_addresses]
    return [_wire_shard(host, port) for host, port in places or [(config.advertise_host, port) for port in ports]]


def _wire_shard(host: str, port: int) -> pb.Shard:
    return pb.Shard(host=f"[{host}]" if ":" in host else host, port=port)


def recovery_report(recovered: Recovered | None) -> dict[str, Any]:
    """What a shard tells of its recovery when it begins to serve; empty if its state is in memory."""
    if recovered is None:
        return {}
    return {
        "recovered_records": recovered.newest_record,
        "replayed_records": recovered.replayed,
        "recovery_ms": round(recovered.took_s * 1000),
        "notes": recovered.notes,
    }


async def _serve() -> int:
    stopping = stop_signal()
    stdin = asyncio.StreamReader(limit=LONGEST_LINE_BYTES)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(stdin), sys.stdin)
    first = json.loads(await stdin.readline())
    config = config_from_mapping(first["config"])
    logging.basicConfig(format=f"%(asctime)s %(levelname)s shard {first['index']}: %(message)s")
    logging.getLogger("paceline_server").setLevel(first["log_level"])
    server = ShardServer(config, first["index"])
    _tell(port=server.bind())
    shards = _told(config, await stdin.readline())
    if shards is None:
        return 0
    await server.start(shards)
    pass_over_modules()
    _tell(event="serving", **recovery_report(server.recovered))
    starter_ended = asyncio.create_task(_follow(config, stdin, server))
    starter_ended.add_done_callback(lambda _: stopping.set())
    code = await server.run_until(stopping)
    starter_ended.cancel()
    return code


async def _follow(config: ServerConfig, stdin: asyncio.StreamReader, server: ShardServer) -> None:
    """Hear of shards that move, until the starter ends."""
    while line := await stdin.readline():
        shards = _told(config, line)
        if shards is not None:
            server.shards_moved(shards)


def _told(config: ServerConfig, line: bytes) -> list[pb.Shard] | None:
    """Where a line of the starter says that the shards are; None if it says nothing of that."""
    message = json.loads(line or "{}")
    if "shards" in message:
        return [_wire_shard(*split_address(address)) for address in message["shards"]]
    return shard_addresses(config, message["ports"]) if "ports" in message else None


def _tell(**message: Any) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    try:
        sys.exit(uvloop.run(_serve()))
    except (ConfigurationError, StorageError) as error:
        named = next(cls.__name__ for cls in type(error).__mro__ if cls.__name__ in ERRORS_BY_NAME)
        _tell(error=named, reason=str(error))
        sys.exit(2)
