"""The layout of a data directory, and the lock that keeps a second server out of it.

DATA_DIR/shard-0/lock                           held by the process that serves or reads the shard
                 journal/00000000000000000001.db    records from 1 on; the name is the first record's number
                 snapshots/00000000000000000412/    the state up to record 411, and a little beyond
                 evidence/                          pushes that were refused as outlying
                 damaged/                           what `paceline repair` set aside
                 settings.json                      what operators changed of the configuration, and still counts
                 audit.jsonl                        what operators did
DATA_DIR/shard-1/...
"""

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from paceline_wire.errors import StorageError

_NUMBER_DIGITS = 20
_SHARD = re.compile(r"shard-([0-9]+)")
_SEGMENT = re.compile(rf"([0-9]{{{_NUMBER_DIGITS}}})\.db")
_SNAPSHOT = re.compile(rf"([0-9]{{{_NUMBER_DIGITS}}})")


class ShardDirectory:
    """The part of a data directory that belongs to one shard.

    Args:
        data_dir: The data directory.
        index: The shard's index.
    """

    def __init__(self, data_dir: Path, index: int) -> None:
        self.index = index
        self.path = data_dir / f"shard-{index}"
        self.journal = self.path / "journal"
        self.snapshots = self.path / "snapshots"
        self.evidence = self.path / "evidence"
        self.damaged = self.path / "damaged"
        self.settings = self.path / "settings.json"
        self.audit = self.path / "audit.jsonl"

    def create(self) -> None:
        """Make the folders that are missing.

        Raises:
            StorageError: They cannot be made.
        """
        try:
            for folder in (self.journal, self.snapshots):
                folder.mkdir(parents=True, exist_ok=True)
            for folder in (self.path, self.path.parent):
                sync_directory(folder)
        except OSError as error:
            raise StorageError(f"the data directory {self.path} cannot be made: {error.strerror}") from error

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory for as long as the context lasts; the lock ends with the process, however it ends.

        Raises:
            StorageError: Another process holds it, or the directory cannot be written.
        """
        try:
            descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise StorageError(f"the data directory {self.path} cannot be written: {error.strerror}") from error
        try:
            self._lock(descriptor)
            yield
        finally:
            os.close(descriptor)

    def segment_path(self, first: int) -> Path:
        """The journal's file whose first record has that number."""
        return self.journal / f"{first:0{_NUMBER_DIGITS}d}.db"

    def snapshot_path(self, first_record: int) -> Path:
        """The snapshot that needs the journal from that record on."""
        return self.snapshots / f"{first_record:0{_NUMBER_DIGITS}d}"

    def segment_numbers(self) -> list[int]:
        """The first records' numbers of the journal's files, ascending."""
        return _numbers(self.journal, _SEGMENT)

    def snapshot_numbers(self) -> list[int]:
        """The numbers of the snapshots that were finished, ascending."""
        return _numbers(self.snapshots, _SNAPSHOT)

    def _lock(self, descriptor: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
            raise StorageError(
                f"the data directory {self.path} is in use by process {holder}: stop it, or ask the running server"
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)


def shard_directories(data_dir: Path) -> list[ShardDirectory]:
    """The shards that have a part in a data directory, by index.

    Raises:
        StorageError: It cannot be read, or there is none; the text says what a data directory looks like.
    """
    indexes = _numbers(data_dir, _SHARD)
    if not indexes:
        raise StorageError(f"{data_dir} is no data directory: it has no folder shard-0 (see storage.data_dir)")
    if indexes != list(range(len(indexes))):
        missing = next(index for index in range(len(indexes)) if index not in indexes)
        raise StorageError(f"{data_dir} is not complete: it has no folder shard-{missing}")
    return [ShardDirectory(data_dir, index) for index in indexes]


def sync_directory(path: Path) -> None:
    """Bring a folder's entries to the disk, so that a file made or renamed in it is there after a power failure."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _numbers(folder: Path, pattern: re.Pattern[str]) -> list[int]:
    try:
        names = [entry.name for entry in folder.iterdir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StorageError(f"the folder {folder} cannot be read: {error.strerror}") from error
    return sorted(int(match[1]) for name in names if (match := pattern.fullmatch(name)))
