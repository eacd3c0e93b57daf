"""How fast `exchange` moves bytes over loopback, beside a bare grpc.aio stream of the same bytes in the same run.

Both have one client and one server process. The bare stream sends the same number of bytes each way in messages of the
same size, without serializers, and does nothing with them: what it takes is what gRPC in Python takes.
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import grpc.aio
import torch

import paceline
import paceline_server
from paceline_wire import codecs
from paceline_wire.memory import keep_large_buffers
from paceline_wire.transfer import MAX_MESSAGE_BYTES, MESSAGE_BYTES

BARE_METHOD = "/bare/Stream"
TENSOR_ELEMENTS = 4 * 1024 * 1024
WARM_UP_ROUNDS = 3
"""Rounds of each that do not count: they pay for fresh memory and a cold connection."""


async def serve_bare() -> None:
    """Serve the bare stream: take `up` bytes, send `down` bytes, both at once, again and again."""
    keep_large_buffers()

    async def stream(messages: AsyncIterator[bytes], context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        piece = bytes(MESSAGE_BYTES)
        metadata = dict(context.invocation_metadata() or ())
        up, down = int(metadata["up"]), int(metadata["down"])
        received = sent = 0
        async for message in messages:
            received += len(message)
            # As much of a round's answer as of its question: both directions are busy together.
            while sent * up < received * down:
                part = min(MESSAGE_BYTES, down - sent)
                await context.write(piece[:part])
                sent += part
            if received == up:
                received = sent = 0

    handler = grpc.method_handlers_generic_handler("bare", {"Stream": grpc.stream_stream_rpc_method_handler(stream)})
    server = grpc.aio.server(options=_options())
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


async def bare_round(call: Any, up: int, down: int) -> float:
    """Seconds that one round of bare bytes takes."""
    piece = bytes(MESSAGE_BYTES)

    async def send() -> None:
        sent = 0
        while sent < up:
            part = min(MESSAGE_BYTES, up - sent)
            await call.write(piece[:part])
            sent += part

    async def receive() -> None:
        received = 0
        while received < down:
            received += len(await call.read())

    began_s = time.perf_counter()
    await asyncio.gather(send(), receive())
    return time.perf_counter() - began_s


async def measure(
    address: str, bare_target: str, parameters: int, rounds: int, uplink: str, downlink: str
) -> dict[str, Any]:
    """Alternate exchanges and bare rounds, and compare them pair by pair."""
    sizes = [min(TENSOR_ELEMENTS, parameters - start) for start in range(0, parameters, TENSOR_ELEMENTS)]
    up = sum(codecs.codec(uplink).encoded_bytes(size) for size in sizes)
    down = sum(codecs.codec(downlink).encoded_bytes(size) for size in sizes)
    generator = torch.Generator().manual_seed(0)
    tensors = {f"layer{index:03}": torch.randn(size, generator=generator) for index, size in enumerate(sizes)}
    outer_gradient = {name: tensor * 0.01 for name, tensor in tensors.items()}
    exchange_s: list[float] = []
    bare_s: list[float] = []
    async with (
        paceline.connect(address, worker_id="bench") as client,
        grpc.aio.insecure_channel(bare_target, options=_options()) as channel,
    ):
        await client.initialize(tensors)
        base = await client.fetch()
        call: Any = channel.stream_stream(BARE_METHOD)(metadata=(("up", str(up)), ("down", str(down))))
        for number in range(WARM_UP_ROUNDS + rounds):
            began_s = time.perf_counter()
            base = await client.exchange(outer_gradient, base)
            took_s = time.perf_counter() - began_s
            bare_took_s = await bare_round(call, up, down)
            if number >= WARM_UP_ROUNDS:
                exchange_s.append(took_s)
                bare_s.append(bare_took_s)
        call.cancel()
    megabytes = (up + down) / 1e6
    ratios = [bare / exchange for exchange, bare in zip(exchange_s, bare_s, strict=True)]
    return {
        "parameters": parameters,
        "uplink": uplink,
        "downlink": downlink,
        "megabytes_up": up / 1e6,
        "megabytes_down": down / 1e6,
        "rounds": rounds,
        "exchange_s": statistics.median(exchange_s),
        "exchange_megabytes_per_s": megabytes / statistics.median(exchange_s),
        "bare_s": statistics.median(bare_s),
        "bare_megabytes_per_s": megabytes / statistics.median(bare_s),
        "share_of_bare": statistics.median(ratios),
        "share_of_bare_min": min(ratios),
        "share_of_bare_max": max(ratios),
        "date": datetime.now(UTC).date().isoformat(),
        "cores": os.cpu_count(),
        "versions": {name: version(name) for name in ("grpcio", "protobuf", "torch")}
        | {"python": platform.python_version()},
    }


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parameters", type=int, default=100_000_000)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--uplink", default="int8")
    parser.add_argument("--downlink", default="bf16")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--bare-server", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.bare_server:
        asyncio.run(serve_bare())
        return
    result = _run(arguments)
    if arguments.json:
        print(json.dumps(result))
        return
    print(
        f"{result['parameters']:,} parameters, {result['uplink']} up and {result['downlink']} down, over loopback:\n"
        f"  exchange    {result['exchange_s']:.3f} s a round, {result['exchange_megabytes_per_s']:.0f} MB/s\n"
        f"  bare stream {result['bare_s']:.3f} s for the same bytes, {result['bare_megabytes_per_s']:.0f} MB/s\n"
        f"  exchange moves {result['share_of_bare']:.2f} of the bare stream "
        f"(median of {result['rounds']} pairs; {result['share_of_bare_min']:.2f} to {result['share_of_bare_max']:.2f})"
    )


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    config = {"exchange": {"uplink": arguments.uplink, "downlink": arguments.downlink}, "schedule": {"quota": 1}}
    command = [sys.executable, __file__, "--bare-server"]
    with (
        paceline_server.local(config) as address,
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as bare,
    ):
        try:
            port = bare.stdout.readline().strip() if bare.stdout is not None else ""
            work = measure(
                address,
                f"127.0.0.1:{port}",
                arguments.parameters,
                arguments.rounds,
                arguments.uplink,
                arguments.downlink,
            )
            return asyncio.run(work)
        finally:
            bare.terminate()


def _options() -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ]


if __name__ == "__main__":
    main()
