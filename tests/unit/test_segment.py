"""Files of the journal: what is appended is read again, whole or not at all, and damage never passes for content."""

import shutil
import sqlite3
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline_server.journal import FragmentInitialized, Record
from paceline_server.storage.segment import (
    DamagedSegmentError,
    SegmentWriter,
    Sync,
    read_segment,
    unfinished_bytes,
)
from paceline_wire.errors import StorageError, StorageFullError
from support_core import normal
from support_storage import assert_same_record, flipped, records


def numbers_of(size: int, seed: int) -> FragmentInitialized:
    """A record with numbers of so many bytes."""
    return FragmentInitialized(fragment=seed, payload=normal(size, seed).mul(50).to(torch.uint8))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of the journal that is not there yet."""
    return tmp_path / "1.db"


@pytest.mark.parametrize("sync", Sync)
@settings(max_examples=25, deadline=None)
@given(batches=st.lists(st.lists(records, min_size=1, max_size=3), max_size=4))
def test_what_is_appended_is_read(sync: Sync, batches: list[list[Record]]) -> None:
    """Records of all kinds come back as they were, in order, with numbers without gaps, under every policy."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "5.db"
        writer = SegmentWriter(path, 5, sync)
        for batch in batches:
            writer.append(batch)
        writer.close()
        read = list(read_segment(path, 5))
    appended = [record for batch in batches for record in batch]
    assert [number for number, _ in read] == list(range(5, 5 + len(appended)))
    for expected, (_, actual) in zip(appended, read, strict=True):
        assert_same_record(expected, actual)


@pytest.mark.parametrize("sync", Sync)
def test_a_process_killed_while_it_makes_a_file_leaves_none(
    tmp_path: Path, sync: Sync, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever statement was the last, the file has its tables or is not there, and the next writer makes it."""
    folder, connect = tmp_path / "journal", sqlite3.connect
    copies: list[Path] = []

    class Watched(sqlite3.Connection):
        """Keeps what is on the disk after each statement, which is what a killed process leaves."""

        def execute(self, *arguments: Any) -> sqlite3.Cursor:
            done = super().execute(*arguments)
            copies.append(shutil.copytree(folder, tmp_path / f"copy-{len(copies)}"))
            return done

    folder.mkdir()
    monkeypatch.setattr(sqlite3, "connect", lambda *given, **options: connect(*given, factory=Watched, **options))
    SegmentWriter(folder / "1.db", 1, sync).close()
    monkeypatch.undo()
    unmade = [copy / "1.db" for copy in copies if not (copy / "1.db").exists()]
    assert len(copies) > len(unmade) > 5
    for copy in copies:
        if (copy / "1.db") not in unmade:
            assert list(read_segment(copy / "1.db", 1)) == []
        writer = SegmentWriter(copy / "1.db", 1, sync)
        writer.append([numbers_of(10, 1)])
        writer.close()
        assert len(list(read_segment(copy / "1.db", 1))) == 1


@pytest.mark.parametrize("sync", Sync)
def test_a_file_goes_on_where_it_ended(path: Path, sync: Sync) -> None:
    """Opened again, a file takes the next number."""
    writer = SegmentWriter(path, 1, sync)
    writer.append([numbers_of(10, 1), numbers_of(10, 2)])
    writer.close()
    again = SegmentWriter(path, 1, sync)
    assert again.next_number == 3
    assert again.append([numbers_of(10, 3)])[0] == 3
    again.close()
    assert [record.fragment for _, record in read_segment(path, 1) if isinstance(record, FragmentInitialized)] == [
        1,
        2,
        3,
    ]


def test_an_unfinished_commit_is_undone(path: Path, tmp_path: Path) -> None:
    """What a killed process leaves in the middle of a commit, its rollback journal, is undone and can be reported."""
    writer = SegmentWriter(path, 1, Sync.COMMIT)
    writer.append([numbers_of(10, 1)])
    connection = writer._connection  # what a kill would interrupt
    connection.execute("PRAGMA cache_size = 1")
    connection.execute("BEGIN IMMEDIATE")
    connection.execute("UPDATE records SET payload = zeroblob(4000000)")
    torn = tmp_path / "torn.db"
    for suffix in ("", "-journal"):
        shutil.copy(path.with_name(path.name + suffix), torn.with_name(torn.name + suffix))
    connection.execute("ROLLBACK")
    writer.close()
    assert unfinished_bytes(path) == 0
    assert unfinished_bytes(torn) > 0
    ((number, record),) = read_segment(torn, 1)
    assert number == 1
    assert_same_record(numbers_of(10, 1), record)


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Record]]:
    """A file with records of several pages, and those records."""
    path = tmp_path_factory.mktemp("segment") / "1.db"
    written: list[Record] = [numbers_of(size, seed) for seed, size in enumerate((10, 40_000, 500, 90_000, 20))]
    writer = SegmentWriter(path, 1, Sync.COMMIT)
    for record in written:
        writer.append([record])
    writer.close()
    return path, written


@settings(max_examples=300, deadline=None)
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_never_passes_for_content(intact: tuple[Path, list[Record]], where: float, bit: int) -> None:
    """With any one bit turned, the records are read as they were, or reading stops where they no longer are."""
    path, written = intact
    with flipped(path, int(where * path.stat().st_size), bit):
        assert_intact_up_to_damage(path, written)


@settings(max_examples=64, deadline=None)
@given(position=st.integers(0, 511), bit=st.integers(0, 7))
def test_a_flipped_bit_in_the_header_never_passes_for_content(
    intact: tuple[Path, list[Record]], position: int, bit: int
) -> None:
    """The same for the bytes that say what the file is, which a random choice would hardly ever hit."""
    path, written = intact
    with flipped(path, position, bit):
        assert_intact_up_to_damage(path, written)


@settings(max_examples=64, deadline=None)
@given(page=st.integers(1, 3), position=st.integers(0, 63), bit=st.integers(0, 7))
def test_a_flipped_bit_at_the_head_of_a_page_never_passes_for_content(
    intact: tuple[Path, list[Record]], page: int, position: int, bit: int
) -> None:
    """The same for the heads of pages, which say what they hold."""
    path, written = intact
    with flipped(path, 65536 * (page % (path.stat().st_size // 65536)) + position, bit):
        assert_intact_up_to_damage(path, written)


def test_a_truncated_file_is_damaged(intact: tuple[Path, list[Record]], tmp_path: Path) -> None:
    """A file that lost its end does not pass for a shorter one."""
    path, written = intact
    for size in range(1, path.stat().st_size, 60_000):
        shorter = tmp_path / f"{size}.db"
        shorter.write_bytes(path.read_bytes()[:size])
        with pytest.raises(StorageError):
            list(read_segment(shorter, 1))
    assert len(list(read_segment(path, 1))) == len(written)


def test_a_missing_record_is_damage(path: Path) -> None:
    """A gap in the numbers is named."""
    writer = SegmentWriter(path, 1, Sync.COMMIT)
    writer.append([numbers_of(10, seed) for seed in range(3)])
    writer.close()
    with sqlite3.connect(path) as connection:
        connection.execute("DELETE FROM records WHERE number = 2")
    connection.close()
    with pytest.raises(DamagedSegmentError, match=r"after record 1.*record 3 follows"):
        list(read_segment(path, 1))


def test_another_database_is_no_journal(path: Path) -> None:
    """A database of something else, or of a later version, is refused."""
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 9")
    connection.close()
    with pytest.raises(StorageError, match="is not a journal of this version"):
        list(read_segment(path, 1))


def test_a_full_disk_keeps_nothing_of_a_commit(path: Path) -> None:
    """When there is no room, nothing of a commit is kept, and the next one that fits has the number."""
    writer = SegmentWriter(path, 1, Sync.COMMIT)
    writer.append([numbers_of(10, 1)])
    (pages,) = writer._connection.execute("PRAGMA page_count").fetchone()
    writer._connection.execute(f"PRAGMA max_page_count = {pages + 1}")  # the same error as a disk without room
    with pytest.raises(StorageFullError, match="make room"):
        writer.append([numbers_of(10, 2), numbers_of(1_000_000, 3)])
    assert writer.append([numbers_of(10, 4)])[0] == 2
    writer.close()
    assert [record.fragment for _, record in read_segment(path, 1) if isinstance(record, FragmentInitialized)] == [1, 4]


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    """A file that cannot be made says so."""
    with pytest.raises(StorageError, match="cannot be written"):
        SegmentWriter(tmp_path / "nowhere" / "1.db", 1, Sync.COMMIT)
    assert not list(tmp_path.iterdir())


def assert_intact_up_to_damage(path: Path, written: list[Record]) -> None:
    """What is read are the first of the records that were written; if not all, reading ended with an error."""
    read: list[tuple[int, Record]] = []
    try:
        for numbered in read_segment(path, 1):
            read.append(numbered)  # noqa: PERF402  # what was read before an error counts
    except StorageError:
        pass
    else:
        assert len(read) == len(written)
    for position, (number, record) in enumerate(read):
        assert number == position + 1
        assert_same_record(written[position], record)
