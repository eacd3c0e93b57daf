"""A shard inside the test's own event loop, on a real port: starts at once, for clients that are asynchronous, too."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from paceline_server.server import ShardServer
from paceline_server.settings import config_from_mapping
from paceline_wire.v1 import parameter_server_pb2 as pb


@asynccontextmanager
async def serving(config: Mapping[str, Any]) -> AsyncIterator[str]:
    """Serve a configuration; the address is localhost's."""
    server = ShardServer(config_from_mapping({"listen": "127.0.0.1:0", **config}), 0)
    port = server.bind()
    await server.start([pb.Shard(host="localhost", port=port)])
    try:
        yield f"localhost:{port}"
    finally:
        await server.drain()
