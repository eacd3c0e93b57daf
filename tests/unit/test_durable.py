"""The journal on disk: numbers in the order of the calls, commits together, and what a disk that fails does to them."""

import asyncio
import os
import sqlite3
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from paceline_server.engine import Engine
from paceline_server.journal import FragmentInitialized, Record
from paceline_server.storage import durable
from paceline_server.storage.directory import ShardDirectory
from paceline_server.storage.durable import DurableJournal
from paceline_server.storage.recovery import read_records
from paceline_server.storage.segment import SegmentWriter, Sync
from paceline_wire.errors import StorageError, StorageFullError, UnavailableError
from support_storage import MANIFEST, PlayedShard


@pytest.fixture
def directory(tmp_path: Path) -> ShardDirectory:
    """An empty directory of shard 0."""
    found = ShardDirectory(tmp_path, 0)
    found.create()
    return found


def numbered(seed: int) -> FragmentInitialized:
    """A record that can be told from others."""
    return FragmentInitialized(fragment=seed, payload=torch.full((4,), seed, dtype=torch.uint8))


def kept(directory: ShardDirectory) -> list[int]:
    """Which records the journal has, in order."""
    return [record.fragment for _, record in read_records(directory) if isinstance(record, FragmentInitialized)]


class Counted(SegmentWriter):
    """A file of the journal that counts its commits, and fails them when told to."""

    commits: list[int]
    error: StorageError | None

    def append(self, records: Sequence[Record]) -> tuple[int, int]:
        """Keep records, or fail."""
        if Counted.error is not None:
            raise Counted.error
        Counted.commits.append(len(records))
        return super().append(records)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> type[Counted]:
    """Counts the commits of journals made in this test."""
    Counted.commits, Counted.error = [], None
    monkeypatch.setattr(durable, "SegmentWriter", Counted)
    return Counted


async def test_numbers_are_in_the_order_of_the_calls(directory: ShardDirectory, counted: type[Counted]) -> None:
    """Appended at once, records are numbered as they were appended, in fewer commits than there are of them."""
    journal = DurableJournal(directory, 1)
    numbers = await asyncio.gather(*(journal.append(numbered(seed)) for seed in range(100)))
    await journal.close()
    assert numbers == list(range(1, 101))
    assert kept(directory) == list(range(100))
    assert sum(counted.commits) == 100
    assert len(counted.commits) < 100


async def test_a_rotation_comes_between_commits(directory: ShardDirectory) -> None:
    """What was appended before a rotation is in the older file, what comes later in the newer; none is lost."""
    journal = DurableJournal(directory, 1)
    firsts = []
    for seed in range(0, 30, 3):
        await journal.append(numbered(seed))
        later = [asyncio.create_task(journal.append(numbered(seed + more))) for more in (1, 2)]
        firsts.append(await journal.rotate())
        await asyncio.gather(*later)
    await journal.close()
    assert kept(directory) == list(range(30))
    assert directory.segment_numbers() == [1, *firsts]


async def test_an_empty_file_is_not_rotated(directory: ShardDirectory) -> None:
    """Without a record since the last rotation there is nothing to begin anew."""
    journal = DurableJournal(directory, 1)
    await journal.append(numbered(0))
    assert await journal.rotate() == 2
    assert await journal.rotate() == 2
    await journal.close()
    assert directory.segment_numbers() == [1, 2]


async def test_a_full_disk_refuses_until_there_is_room(
    directory: ShardDirectory, counted: type[Counted], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While there is no room every append fails with the reason; with room the next record gets the next number."""
    journal = DurableJournal(directory, 1)
    await journal.append(numbered(0))
    counted.error = StorageFullError("no room")
    with pytest.raises(StorageFullError, match="no room"):
        await journal.append(numbered(1))
    assert journal.problem == "no room"
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result((4096, 4096, 10, 10, 10, 1, 1, 1, 0, 255)))
    with pytest.raises(StorageFullError, match="no room"):
        journal.refuse_when_full()
    monkeypatch.undo()
    counted.error = None
    journal.refuse_when_full()
    assert await journal.append(numbered(2)) == 2
    assert journal.problem is None
    await journal.close()
    assert kept(directory) == [0, 2]


async def test_a_journal_that_failed_stays_failed(directory: ShardDirectory, counted: type[Counted]) -> None:
    """After an error that does not pass by itself nothing is kept any more, since nobody knows what the disk has."""
    journal = DurableJournal(directory, 1)
    counted.error = StorageError("broken")
    with pytest.raises(StorageError, match="broken"):
        await journal.append(numbered(0))
    counted.error = None
    with pytest.raises(StorageError, match="broken"):
        await journal.append(numbered(1))
    await journal.close()
    assert kept(directory) == []


async def test_a_shard_ends_with_its_journal(directory: ShardDirectory, counted: type[Counted]) -> None:
    """A shard whose journal failed tells workers to come again, and ends, before anybody is told what is not kept."""
    shard = PlayedShard(directory)
    shard.close()
    engine = Engine(shard.shard, DurableJournal(directory, 2))
    counted.error = StorageError("broken")
    with pytest.raises(UnavailableError, match="broken"):
        await engine.begin_initialization(MANIFEST, 7)
    assert await engine.failed == "broken"
    await engine.finish()


@pytest.mark.parametrize("sync", [Sync.INTERVAL, Sync.NEVER])
async def test_what_is_not_forced_to_the_disk_can_be_read_by_others(directory: ShardDirectory, sync: Sync) -> None:
    """Under the lax policies a killed process has lost nothing: its records are in the files as the system has them."""
    journal = DurableJournal(directory, 1, sync, 0.01)
    for seed in range(5):
        await journal.append(numbered(seed))
    await journal.flush()
    snapshot = directory.path / "as-killed"
    snapshot.mkdir()
    for path in directory.journal.iterdir():
        (snapshot / path.name).write_bytes(path.read_bytes())
    await journal.close()
    connection = sqlite3.connect(next(iter(sorted(snapshot.glob("*.db")))))
    assert connection.execute("SELECT count(*) FROM records").fetchone() == (5,)
    connection.close()
