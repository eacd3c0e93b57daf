"""The snapshotter goes on counting what a restart would have to replay, whatever becomes of an attempt."""

from pathlib import Path

import pytest
import torch

import paceline
from paceline_server.hosted import FragmentCopy
from paceline_server.server import ShardServer
from paceline_server.settings import config_from_mapping
from paceline_server.storage.snapshot import SnapshotWriter
from paceline_wire.errors import StorageError, StorageFullError
from paceline_wire.v1 import parameter_server_pb2 as pb


async def test_what_a_failed_snapshot_did_not_cover_is_due_still(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is full for a moment must not double the time that a restart takes."""
    monkeypatch.setattr("paceline_server.storage.snapshotter.RETRY_S", 0.0)
    monkeypatch.setattr("paceline_server.storage.snapshotter.PAUSE_FACTOR", 0.0)
    monkeypatch.setattr("paceline_server.storage.snapshotter.LOOK_EVERY_S", 3600.0)
    config = {"listen": "127.0.0.1:0", "storage": {"data_dir": str(tmp_path)}, "schedule": {"quota": 1}}
    server = ShardServer(config_from_mapping(config), 0)
    port = server.bind()
    await server.start([pb.Shard(port=port)])
    snapshotter = server._snapshotter
    assert snapshotter is not None
    async with paceline.connect(f"127.0.0.1:{port}", worker_id="a") as worker:
        await worker.initialize({"x": torch.zeros(1000)})
        await snapshotter.write()
        await worker.exchange({"x": torch.ones(1000)}, await worker.fetch())
    server._engine.replay_s = 1000.0
    num_bytes = snapshotter.journal_bytes
    added = SnapshotWriter.add

    def full(self: SnapshotWriter, index: int, copy: FragmentCopy) -> None:
        raise StorageFullError("no room")

    assert snapshotter.due()
    monkeypatch.setattr(SnapshotWriter, "add", full)
    with pytest.raises(StorageError):
        await snapshotter.write()
    assert snapshotter.due()
    assert snapshotter.journal_bytes == num_bytes > 0
    monkeypatch.setattr(SnapshotWriter, "add", added)
    assert not (await snapshotter.write()).existed
    assert not snapshotter.due()
    assert snapshotter.journal_bytes < num_bytes
    await server.drain()
