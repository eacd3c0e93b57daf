"""How much memory a shard takes with many slow workers, beside what it may take: 8 bytes per parameter and its buffer.

A real server process; raw workers, which speak the protocol and keep no model, each behind an emulated link of its own.
Most are slow, some so slow that nearly nothing passes. Every worker fetches the parameters, all at once, and then
pushes every fragment and reads the updates, round after round. Meanwhile the server's resident memory is read from
/proc.
"""

import argparse
import asyncio
import contextlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import grpc
import grpc.aio
import torch

from paceline.channels import Access
from paceline_server.config import DEFAULT_BUFFER_MIB
from paceline_server.processes import ShardProcesses
from paceline_server.settings import config_from_mapping
from paceline_wire import PROTOCOL_VERSION, codecs
from paceline_wire.manifest import Fragment, Manifest
from paceline_wire.transfer import Outgoing, outgoing, pieces
from paceline_wire.v1 import admin_pb2, admin_pb2_grpc
from paceline_wire.v1 import parameter_server_pb2 as pb
from paceline_wire.v1 import parameter_server_pb2_grpc as pb_grpc
from resident import MIB, peak_resident_mib, resident_mib

SAMPLE_S = 1.0
HEARTBEAT_S = 10.0
RECONNECT_S = 1.0
ACCESS = Access(tls=None, token=None)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is measured."""

    parameters: int
    workers: int
    stalled: int
    rate_mbit: float
    stalled_rate_mbit: float
    delay_ms: float
    buffer_mib: int
    uplink: str
    downlink: str
    seconds: float


@contextmanager
def links(target: str, count: int, rate_mbit: float, delay_ms: float) -> Iterator[list[str]]:
    """Addresses of links to the target, each with a rate of its own."""
    if count == 0:
        yield []
        return
    command = [sys.executable, "-m", "paceline.relay", "--target", target, "--links", str(count)]
    command += ["--rate-mbit", str(rate_mbit), "--delay-ms", str(delay_ms)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as relay:
        try:
            line = relay.stdout.readline() if relay.stdout is not None else ""
            yield [f"127.0.0.1:{port}" for port in json.loads(line)["ports"]]
        finally:
            relay.terminate()


class SlowWorker:
    """A worker that pushes the same bytes every round, and drops what it reads.

    Args:
        address: Its link's end.
        name: Its name.
        pushes: The payload of a push to each fragment.
        downlink: The codec of its updates.
    """

    def __init__(self, address: str, name: str, pushes: dict[int, Outgoing], downlink: str) -> None:
        self.rounds = 0
        self.bytes_read = 0
        self.reconnects = 0
        self._pushes = pushes
        self._worker = pb.Worker(worker_id=name, incarnation=time.time_ns())
        self._codec = codecs.wire_value(codecs.codec(downlink))
        self._channel = ACCESS.channel(address)
        self._stub = pb_grpc.ParameterServerServiceStub(self._channel)
        self._bins = dict.fromkeys(pushes, 0)

    async def work(self) -> None:
        """Join, fetch, and exchange until cancelled; a connection that is lost is resumed."""
        heartbeats = asyncio.create_task(self._heartbeats())
        try:
            while True:
                try:
                    await self._stub.Join(pb.JoinRequest(protocol_version=PROTOCOL_VERSION, worker=self._worker))
                    if self.rounds == 0:
                        await self._fetch()
                    await self._exchange()
                except (grpc.RpcError, asyncio.InvalidStateError):
                    # Pings on a link with minutes of queue come back too late, and the server hangs up.
                    self.reconnects += 1
                    await asyncio.sleep(RECONNECT_S)
        finally:
            heartbeats.cancel()

    async def close(self) -> None:
        """End the connection."""
        await self._channel.close()

    async def _heartbeats(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            with contextlib.suppress(grpc.RpcError):  # a nearly stalled link delays it; the next one may pass
                await self._stub.Heartbeat(pb.HeartbeatRequest(worker=self._worker))

    async def _fetch(self) -> None:
        async for message in self._stub.Fetch(pb.FetchRequest(codec=self._codec)):
            self.bytes_read += len(message.data)
            if message.HasField("fragment"):
                self._bins[message.fragment.fragment] = message.fragment.bin

    async def _exchange(self) -> None:
        call = self._stub.Exchange()
        await call.write(pb.ExchangeRequest(open=pb.ExchangeOpen(worker=self._worker, downlink=self._codec)))
        try:
            while True:
                await asyncio.gather(self._push_all(call, self.rounds + 1), self._read_all(call))
                self.rounds += 1
        finally:
            call.cancel()

    async def _push_all(self, call: Any, seq: int) -> None:
        for fragment, push in self._pushes.items():
            announced: pb.Push | None = pb.Push(
                fragment=fragment, seq=seq, base_bin=self._bins[fragment], payload=push.announced
            )
            for piece in pieces(push.payload):
                await call.write(pb.ExchangeRequest(push=announced, data=bytes(piece)))
                announced = None

    async def _read_all(self, call: Any) -> None:
        missing = 0
        for _ in self._pushes:
            while True:
                message = await call.read()
                if message is grpc.aio.EOF:
                    raise asyncio.InvalidStateError("the server ended the stream")
                self.bytes_read += len(message.data)
                if message.HasField("update"):
                    missing = message.update.payload.num_bytes
                    self._bins[message.update.fragment] = message.update.bin
                missing -= len(message.data)
                if missing == 0:
                    break


async def initialize(address: str, manifest: Manifest) -> None:
    """Give the run its first parameters, zeros."""

    async def messages() -> AsyncIterator[pb.InitializeRequest]:
        start = pb.InitializeStart(protocol_version=PROTOCOL_VERSION, manifest=manifest.to_wire(), initialization_id=1)
        yield pb.InitializeRequest(start=start)
        for fragment in manifest.fragments:
            values = outgoing(codecs.codec("fp32"), torch.zeros(4 * fragment.num_elements, dtype=torch.uint8))
            announced: pb.InitializeFragment | None = pb.InitializeFragment(
                fragment=fragment.index, payload=values.announced
            )
            for piece in pieces(values.payload):
                yield pb.InitializeRequest(fragment=announced, data=bytes(piece))
                announced = None

    async with ACCESS.channel(address) as channel:
        await pb_grpc.ParameterServerServiceStub(channel).Initialize(messages())


async def measure(setting: Setting, pid: int, address: str, fast: list[str], stalled: list[str]) -> dict[str, Any]:
    """Let the workers work, and look at the server meanwhile."""
    baseline_mib = resident_mib(pid)
    tensor = pb.Tensor(name="x", shape=[setting.parameters], dtype=pb.DTYPE_FLOAT32, role=pb.ROLE_PARAMETER)
    elements = config_from_mapping({}).exchange.fragment_elements
    manifest = Manifest.from_wire(pb.Manifest(tensors=[tensor], fragment_elements=elements))
    await initialize(address, manifest)
    pushes = {fragment.index: _push(fragment, setting.uplink) for fragment in manifest.fragments}
    workers = [
        SlowWorker(link, f"worker-{number}", pushes, setting.downlink) for number, link in enumerate([*fast, *stalled])
    ]
    working = [asyncio.create_task(worker.work()) for worker in workers]
    began_s, samples = time.monotonic(), []
    while time.monotonic() < began_s + setting.seconds:
        await asyncio.sleep(SAMPLE_S)
        failed = [task.exception() for task in working if task.done()]
        if failed:
            raise RuntimeError(f"a worker ended early: {failed[0]!r}")
        samples.append((round(time.monotonic() - began_s, 1), round(resident_mib(pid), 1)))
    status = await _status(address)
    for task in working:
        task.cancel()
    await asyncio.gather(*working, return_exceptions=True)
    await asyncio.gather(*(worker.close() for worker in workers))
    state_mib = 8 * setting.parameters / MIB
    bound_mib = baseline_mib + state_mib + setting.buffer_mib
    peak_mib = peak_resident_mib(pid)
    return {
        "setting": asdict(setting),
        "baseline_mib": round(baseline_mib, 1),
        "state_mib": round(state_mib, 1),
        "buffer_mib": setting.buffer_mib,
        "bound_mib": round(bound_mib, 1),
        "peak_mib": round(peak_mib, 1),
        "above_state_and_baseline_mib": round(peak_mib - state_mib - baseline_mib, 1),
        "held": peak_mib <= bound_mib,
        "rounds_of_each_worker": [worker.rounds for worker in workers],
        "reconnects": sum(worker.reconnects for worker in workers),
        "megabytes_read": round(sum(worker.bytes_read for worker in workers) / 1e6),
        "pushes_applied": status.pushes_applied,
        "resident_mib_by_second": samples,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
        "versions": {name: version(name) for name in ("grpcio", "protobuf", "torch")}
        | {"python": platform.python_version()},
    }


def _push(fragment: Fragment, uplink: str) -> Outgoing:
    codec = codecs.codec(uplink)
    return outgoing(codec, codecs.encode(codec, torch.zeros(fragment.num_elements)))


async def _status(address: str) -> admin_pb2.StatusResponse:
    async with ACCESS.channel(address) as channel:
        return await admin_pb2_grpc.AdminServiceStub(channel).Status(admin_pb2.StatusRequest())


def run(setting: Setting) -> dict[str, Any]:
    """Start the server and the links, and measure."""
    exchange = {"uplink": setting.uplink, "downlink": setting.downlink, "buffer_mib": setting.buffer_mib}
    config = {"listen": "127.0.0.1:0", "exchange": exchange, "schedule": {"quota": setting.workers}}
    shards = ShardProcesses(config_from_mapping(config))
    shards.start()
    try:
        address = f"127.0.0.1:{shards.ports[0]}"
        num_fast = setting.workers - setting.stalled
        with (
            links(address, num_fast, setting.rate_mbit, setting.delay_ms) as fast,
            links(address, setting.stalled, setting.stalled_rate_mbit, setting.delay_ms) as stalled,
        ):
            return asyncio.run(measure(setting, shards.processes[0].pid, address, fast, stalled))
    finally:
        shards.stop()


def main() -> None:
    """Entry point; exits with 1 if the bound did not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parameters", type=int, default=25_000_000)
    parser.add_argument("--workers", type=int, default=32)
    parser.add_argument("--stalled", type=int, default=4, help="how many of them are nearly stalled")
    parser.add_argument("--rate-mbit", type=float, default=20.0)
    parser.add_argument("--stalled-rate-mbit", type=float, default=0.2)
    parser.add_argument("--delay-ms", type=float, default=20.0)
    parser.add_argument("--buffer-mib", type=int, default=DEFAULT_BUFFER_MIB)
    parser.add_argument("--uplink", default="int4")
    parser.add_argument("--downlink", default="bf16")
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = vars(parser.parse_args())
    as_json = arguments.pop("json")
    result = run(Setting(**arguments))
    if as_json:
        print(json.dumps(result))
    else:
        _print(result)
    sys.exit(0 if result["held"] else 1)


def _print(result: dict[str, Any]) -> None:
    setting = result["setting"]
    rounds = result["rounds_of_each_worker"]
    print(
        f"{setting['parameters']:,} parameters, {setting['workers']} workers at {setting['rate_mbit']:g} Mbit/s, "
        f"{setting['stalled']} of them at {setting['stalled_rate_mbit']:g}:\n"
        f"  resident at most {result['peak_mib']:.0f} MiB; the bound is {result['bound_mib']:.0f}: process "
        f"{result['baseline_mib']:.0f}, 8 bytes a parameter {result['state_mib']:.0f}, buffer {result['buffer_mib']}\n"
        f"  {'held' if result['held'] else 'EXCEEDED'}; {result['pushes_applied']} pushes applied, "
        f"{min(rounds)} to {max(rounds)} rounds a worker"
    )


if __name__ == "__main__":
    main()
