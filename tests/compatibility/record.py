"""Records what an earlier version said and kept, so that today's can be tried against it.

    git archive COMMIT | tar -x -C OLD
    python tests/compatibility/record.py OLD tests/compatibility/earlier/NAME --commit COMMIT

OLD's own client trains against OLD's own server, through a relay that writes down every message. What comes of it:

    descriptors.binpb     the messages and services, as a FileDescriptorSet
    conversation.json     the client's calls: messages up and down in base64, in their order
    data.tar.gz           the data directory afterwards, unless the version has none (--in-memory)
    about.json            the commit, and the server's flags
"""

import argparse
import asyncio
import base64
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from grpc_tools import protoc  # type: ignore[import-untyped]  # it has no types

SERVICE = "paceline_wire.v1.ParameterServerService"
FLAGS = (
    *("--schedule.quota", "1", "--outer.momentum", "0.5", "--outer.lr", "0.5"),
    *("--exchange.uplink", "fp32", "--exchange.downlink", "fp32", "--exchange.fragment-elements", "256"),
)
_CLIENT = """
import asyncio, sys, torch, paceline
async def main():
    async with paceline.connect(sys.argv[1], worker_id="old") as client:
        await client.initialize({"x": torch.linspace(-1, 1, 600)})
        base = await client.fetch()
        for number in (1, 2, 3):
            base = await client.exchange({"x": 0.25 * base.tensors["x"] + number}, base)
asyncio.run(main())
"""


class Relay(grpc.GenericRpcHandler):
    """Passes every call on to the server, and writes down what goes either way."""

    def __init__(self, upstream: grpc.aio.Channel, describe_answer: Any) -> None:
        self.calls: list[dict[str, Any]] = []
        self._upstream = upstream
        self._describe_answer = describe_answer
        self.port = 0

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """Any method, as a stream of bytes both ways."""

        async def relayed(request: AsyncIterator[bytes], context: Any) -> None:
            await self._relayed(handler_call_details.method, request, context)

        return grpc.stream_stream_rpc_method_handler(relayed)

    async def _relayed(self, method: str, request: AsyncIterator[bytes], context: Any) -> None:
        messages: list[list[str]] = []
        if not method.endswith("/Heartbeat"):
            self.calls.append({"method": method.rpartition("/")[2], "messages": messages})

        async def up() -> AsyncIterator[bytes]:
            async for message in request:
                messages.append(["up", base64.b64encode(message).decode()])
                yield message

        relay: grpc.aio.StreamStreamMultiCallable[bytes, bytes] = self._upstream.stream_stream(method)
        call = relay(up())
        async for message in call:
            messages.append(["down", base64.b64encode(message).decode()])
            await context.write(self._here(message) if method.endswith("/Describe") else message)

    def _here(self, message: bytes) -> bytes:
        """A description that says that the shard is where the relay is."""
        description = self._describe_answer.FromString(message)
        for shard in description.shards:
            shard.port = self.port
        return bytes(description.SerializeToString())


def descriptors(old: Path) -> descriptor_pb2.FileDescriptorSet:
    """What the old version's .proto files say."""
    root = old / "proto"
    sources = [path.relative_to(root).as_posix() for path in sorted((root / "paceline_wire" / "v1").glob("*.proto"))]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "set"
        if protoc.main(["protoc", f"--proto_path={root}", f"--descriptor_set_out={out}", *sources]) != 0:
            sys.exit("protoc failed")
        return descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes())


async def record(old: Path, data_dir: Path | None, described: descriptor_pb2.FileDescriptorSet) -> list[dict[str, Any]]:
    """Let the old client train against the old server; returns the calls."""
    pool = descriptor_pool.DescriptorPool()
    for file in described.file:
        pool.AddSerializedFile(file.SerializeToString())
    answer = message_factory.GetMessageClass(pool.FindMessageTypeByName("paceline_wire.v1.DescribeResponse"))
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(str(old / side) for side in ("proto", "client", "server"))}
    command = [sys.executable, "-m", "paceline", "serve", "--json", "--listen", "127.0.0.1:0"]
    command += [*FLAGS, *([] if data_dir is None else ["--storage.data-dir", str(data_dir)])]
    server = await asyncio.create_subprocess_exec(*command, env=environ, stdout=subprocess.PIPE)
    assert server.stdout is not None
    address = json.loads(await server.stdout.readline())["address"]
    async with grpc.aio.insecure_channel(address) as upstream:
        relay, relaying = Relay(upstream, answer), grpc.aio.server()
        relaying.add_generic_rpc_handlers((relay,))
        relay.port = relaying.add_insecure_port("127.0.0.1:0")
        await relaying.start()
        client = await asyncio.create_subprocess_exec(
            sys.executable, "-c", _CLIENT, f"127.0.0.1:{relay.port}", env=environ
        )
        code = await client.wait()
        await relaying.stop(None)
    server.send_signal(signal.SIGTERM)
    await server.wait()
    if code != 0:
        sys.exit("the old client failed")
    return relay.calls


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--commit", required=True)
    parser.add_argument("--in-memory", action="store_true")
    arguments = parser.parse_args()
    target: Path = arguments.target
    target.mkdir(parents=True, exist_ok=True)
    described = descriptors(arguments.old)
    (target / "descriptors.binpb").write_bytes(described.SerializeToString(deterministic=True))
    with tempfile.TemporaryDirectory() as folder:
        data_dir = None if arguments.in_memory else Path(folder) / "data"
        calls = asyncio.run(record(arguments.old, data_dir, described))
        (target / "conversation.json").write_text(json.dumps(calls, indent=1) + "\n")
        if data_dir is not None:
            with tarfile.open(target / "data.tar.gz", "w:gz", compresslevel=9) as archive:
                archive.add(data_dir, "data")
    (target / "about.json").write_text(json.dumps({"commit": arguments.commit, "flags": FLAGS}, indent=1) + "\n")


if __name__ == "__main__":
    main()
