"""A shard outlives gRPC's server: it listens again at its port, with its state, and workers resume."""

import asyncio
import struct

import pytest
import torch

import paceline
from integration.patience import PATIENCE_S, wait_until_async
from paceline_server.server import ShardServer, _again_and_again
from paceline_server.settings import config_from_mapping
from paceline_wire.v1 import parameter_server_pb2 as pb


async def test_a_grpc_server_that_ends_by_itself_is_started_again() -> None:
    """The client resumes, every push counts once, and the shard still ends in order when it is asked to."""
    exchange = {"uplink": "fp32", "downlink": "fp32", "fragment_elements": 256}
    outer = {"rule": "sgd", "lr": 0.5}
    config = {"listen": "127.0.0.1:0", "schedule": {"quota": 1}, "exchange": exchange, "outer": outer}
    server = ShardServer(config_from_mapping(config), 0)
    port = server.bind()
    await server.start([pb.Shard(port=port)])
    stopping = asyncio.Event()
    running = asyncio.create_task(server.run_until(stopping))
    async with asyncio.timeout(PATIENCE_S), paceline.connect(f"127.0.0.1:{port}", worker_id="a") as client:
        await client.initialize({"x": torch.zeros(600)})
        base = await client.fetch()
        admin = server._admin
        for number in (1, 2, 3):
            base = await client.exchange({"x": torch.ones(600)}, base)
            assert torch.equal(base.tensors["x"], torch.full((600,), -0.5 * number))
            await server._server.stop(None)
        (status,) = await client.statuses()
        assert (status.pushes_applied, status.pushes_refused) == (9, 0)
        assert server._admin is admin  # which knows since when the shard is up
    stopping.set()
    assert await asyncio.wait_for(running, PATIENCE_S) == 0


async def test_a_watch_that_ends_by_an_error_begins_anew(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without it nobody would be given up any more, and no revocation count; the log says what happened."""
    monkeypatch.setattr("paceline_server.server.WATCH_AGAIN_S", 0.0)
    begun: list[None] = []
    goes_on = asyncio.Event()

    async def watch() -> None:
        begun.append(None)
        if len(begun) < 3:
            raise ValueError("nobody foresaw this")
        goes_on.set()
        await asyncio.Event().wait()

    watching = asyncio.create_task(_again_and_again(watch))
    await asyncio.wait_for(goes_on.wait(), PATIENCE_S)
    assert caplog.text.count("ended, and begins anew") == 2
    watching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await watching


async def test_who_watches_the_health_and_reads_nothing_does_not_keep_a_shard_from_ending(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """HTTP/2's window of 0 holds the answer up for ever, and the health service its lock with it."""
    monkeypatch.setattr("paceline_server.server.DRAIN_S", 0.5)
    server = ShardServer(config_from_mapping({"listen": "127.0.0.1:0"}), 0)
    port = server.bind()
    await server.start([pb.Shard(port=port)])
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    no_window = _frame(4, 0, 0, struct.pack(">HI", 4, 0))
    call = _frame(1, 4, 1, _headers("/grpc.health.v1.Health/Watch")) + _frame(0, 1, 1, bytes(5))
    writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + no_window + call)

    async def is_watched() -> bool:
        condition = server._health._server_watchers.get("")
        return condition is not None and condition.locked()

    await wait_until_async(is_watched)
    await asyncio.wait_for(server.drain(), PATIENCE_S)
    writer.close()
    await writer.wait_closed()


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """A frame of HTTP/2."""
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def _headers(path: str) -> bytes:
    """The headers of a gRPC call, neither indexed nor compressed."""
    fields = {
        ":method": "POST",
        ":scheme": "http",
        ":path": path,
        ":authority": "x",
        "content-type": "application/grpc",
    }
    return b"".join(
        b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
        for name, value in {**fields, "te": "trailers"}.items()
    )
