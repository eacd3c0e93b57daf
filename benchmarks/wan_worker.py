"""The worker of wan.py, in a host of the emulated link: exchanges, and as many bytes over raw TCP in between.

Prints one JSON object.
"""

import argparse
import asyncio
import json
import time
from typing import Any

import torch

import paceline
import raw_tcp
from paceline_wire import codecs

TENSOR_ELEMENTS = 4 * 1024 * 1024


def sizes_of(parameters: int) -> list[int]:
    """Elements of each tensor."""
    return [min(TENSOR_ELEMENTS, parameters - start) for start in range(0, parameters, TENSOR_ELEMENTS)]


def payload_bytes(parameters: int, uplink: str, downlink: str) -> tuple[int, int]:
    """Payload bytes of a round, up and down."""
    up, down = codecs.codec(uplink), codecs.codec(downlink)
    sizes = sizes_of(parameters)
    return sum(up.encoded_bytes(size) for size in sizes), sum(down.encoded_bytes(size) for size in sizes)


async def work(arguments: argparse.Namespace) -> dict[str, Any]:
    """Warm up, then alternate exchanges and raw rounds."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"layer{index:03}": torch.randn(size, generator=generator)
        for index, size in enumerate(sizes_of(arguments.parameters))
    }
    outer_gradient = {name: tensor * 0.01 for name, tensor in tensors.items()}
    up, down = payload_bytes(arguments.parameters, arguments.uplink, arguments.downlink)
    exchange_s: list[float] = []
    raw_s: list[float] = []
    tried: list[int] = []
    async with paceline.connect(arguments.server, worker_id="bench") as client:
        await client.initialize(tensors)
        base = await client.fetch()
        warm_until_s = time.monotonic() + arguments.warm_s
        while time.monotonic() < warm_until_s:
            base = await client.exchange(outer_gradient, base)
            tried.append(client.connections)
        num_raw = arguments.raw_connections or client.connections
        with raw_tcp.Client(arguments.server.rpartition(":")[0], num_raw) as raw:
            await asyncio.to_thread(raw.round, up, down)
            for _ in range(arguments.rounds):
                began_s = time.monotonic()
                base = await client.exchange(outer_gradient, base)
                exchange_s.append(time.monotonic() - began_s)
                raw_s.append(await asyncio.to_thread(raw.round, up, down))
        return {
            "connections": client.connections,
            "connections_tried": tried,
            "raw_connections": num_raw,
            "exchange_s": exchange_s,
            "raw_s": raw_s,
        }


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--server", required=True)
    parser.add_argument("--parameters", type=int, required=True)
    parser.add_argument("--uplink", required=True)
    parser.add_argument("--downlink", required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--warm-s", type=float, required=True)
    parser.add_argument("--raw-connections", type=int)
    print(json.dumps(asyncio.run(work(parser.parse_args()))))


if __name__ == "__main__":
    main()
