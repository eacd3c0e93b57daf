"""One file of the journal: an SQLite database to which records are appended in order.

SQLite has the hard part: a commit is whole or not there, whatever is killed or loses power when. How safe a commit is
depends on `Sync`:

    commit      journal_mode=TRUNCATE, synchronous=FULL: on the disk before `append` returns. In this mode SQLite writes
                an appended page once, which is faster here than WAL, and a page that goes bad later is noticed as such.
    interval    journal_mode=WAL, synchronous=NORMAL, and `flush` from time to time: a killed process loses nothing, a
    and never   power failure loses the newest commits and nothing before them.

Every record has a CRC-32 of its own, since SQLite checks the structure of its pages and not their content.
"""

import contextlib
import os
import sqlite3
from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import Path

from paceline_server.journal import Record
from paceline_server.storage.directory import sync_directory
from paceline_server.storage.encoding import Written, read_record, write_record
from paceline_wire.checksum import crc32
from paceline_wire.errors import StorageError, StorageFullError

FORMAT_VERSION = 1
"""Of the tables and of what is in them; kept as SQLite's user_version."""

_APPLICATION_ID = 0x50434C4A
"""What tells a journal from any other SQLite database ("PCLJ")."""

_PAGE_BYTES = 65536
"""SQLite's largest: a push is megabytes, and a page is what each step of reading and writing it costs."""

_CACHE_KIB = 16384

_RECORDS = """
CREATE TABLE records (
    number INTEGER PRIMARY KEY,
    kind TEXT NOT NULL,
    said TEXT NOT NULL,
    payload BLOB NOT NULL,
    crc32 INTEGER NOT NULL
)
"""


class Sync(Enum):
    """When what is appended is forced to the disk."""

    COMMIT = "commit"
    INTERVAL = "interval"
    NEVER = "never"


class DamagedSegmentError(StorageError):
    """A file of the journal cannot be read to its end.

    Attributes:
        path: The file.
        good: The number of the last record before the damage.
        reason: What is wrong.
    """

    def __init__(self, path: Path, good: int, reason: str) -> None:
        super().__init__(f"the journal is damaged after record {good}, in {path}: {reason}")
        self.path = path
        self.good = good
        self.reason = reason


class SegmentWriter:
    """Appends to one file of the journal. Belongs to one thread.

    Args:
        path: The file; made if it is not there.
        first: The number of its first record.
        sync: When what is appended is forced to the disk.

    Raises:
        StorageError: The file cannot be made or opened.
    """

    def __init__(self, path: Path, first: int, sync: Sync) -> None:
        self._path = path
        self._next = first
        self._sync = sync
        try:
            if not path.exists():
                _make(path)
            self._connection = _opened(path)
            self._prepare()
        except sqlite3.Error as error:
            raise _storage_error(path, error) from error

    @property
    def next_number(self) -> int:
        """The number that the next record will have."""
        return self._next

    def append(self, records: Sequence[Record]) -> tuple[int, int]:
        """Keep records, all or none; returns the number of the first, and the bytes that were kept.

        Raises:
            StorageFullError: There is no room; nothing was kept.
            StorageError: The file cannot be written, for good.
        """
        num_bytes = 0
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            for number, record in enumerate(records, start=self._next):
                written = write_record(record)
                num_bytes += len(written.said) + len(written.payload)
                self._connection.execute(
                    "INSERT INTO records (number, kind, said, payload, crc32) VALUES (?, ?, ?, ?, ?)",
                    (number, written.kind, written.said.decode(), written.payload, _crc32(written)),
                )
            self._connection.execute("COMMIT")
        except sqlite3.Error as error:
            self._roll_back(error)
            raise _storage_error(self._path, error) from error
        first, self._next = self._next, self._next + len(records)
        return first, num_bytes

    def flush(self) -> None:
        """Force what was appended to the disk.

        Raises:
            StorageError: The disk does not take it.
        """
        if self._sync is Sync.COMMIT:
            return
        for path in (self._path, self._path.with_name(self._path.name + "-wal")):
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except FileNotFoundError:
                continue
            try:
                os.fdatasync(descriptor)
            except OSError as error:
                raise StorageError(f"the journal {path} cannot be forced to the disk: {error.strerror}") from error
            finally:
                os.close(descriptor)

    def close(self) -> None:
        """Bring all to the disk and let go of the file.

        Raises:
            StorageError: The disk does not take it.
        """
        self.flush()
        try:
            self._connection.close()
        except sqlite3.Error as error:
            raise _storage_error(self._path, error) from error

    def _prepare(self) -> None:
        mode, synchronous = ("TRUNCATE", "FULL") if self._sync is Sync.COMMIT else ("WAL", "NORMAL")
        self._connection.execute(f"PRAGMA journal_mode = {mode}")
        self._connection.execute(f"PRAGMA synchronous = {synchronous}")
        self._connection.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
        (newest,) = self._connection.execute("SELECT max(number) FROM records").fetchone()
        self._next = self._next if newest is None else newest + 1

    def _roll_back(self, error: sqlite3.Error) -> None:
        """Undo the unfinished commit; where that fails too, the next start does it."""
        if not self._connection.in_transaction:
            return
        try:
            self._connection.execute("ROLLBACK")
        except sqlite3.Error as second:
            raise StorageError(
                f"the journal {self._path} failed ({error}) and could not be put in order ({second}); start the "
                "server again once the disk works"
            ) from error


def read_segment(path: Path, first: int) -> Iterator[tuple[int, Record]]:
    """Read the records of one file in order, with their numbers.

    A commit that was not finished is rolled back first, as SQLite does it. The caller holds the directory's lock.

    Args:
        path: The file.
        first: The number that its first record must have.

    Raises:
        DamagedSegmentError: A record is missing, or is not what was written.
    """
    good = first - 1
    try:
        with contextlib.closing(_opened(path)) as connection:
            _require_version(path, connection, good)
            for number, kind, said, payload, crc32 in connection.execute(
                "SELECT number, kind, said, payload, crc32 FROM records ORDER BY number"
            ):
                if not (isinstance(kind, str) and isinstance(said, str) and isinstance(payload, bytes)):
                    raise DamagedSegmentError(path, good, f"record {number} is not of the form of records")
                written = Written(kind, said.encode(), payload)
                if number != good + 1:
                    raise DamagedSegmentError(path, good, f"record {number} follows")
                if _crc32(written) != crc32:
                    raise DamagedSegmentError(path, good, f"the checksum of record {number} does not fit")
                try:
                    record = read_record(written)
                except ValueError as error:
                    raise DamagedSegmentError(path, good, f"record {number}: {error}") from error
                good = number
                yield number, record
            _require_sound(path, connection, good)
    except sqlite3.Error as error:
        raise DamagedSegmentError(path, good, f"SQLite says: {error}") from error
    except UnicodeError as error:
        raise DamagedSegmentError(path, good, f"the text of record {good + 1} is not UTF-8") from error


def unfinished_bytes(path: Path) -> int:
    """Size of what a killed process left of a commit beside a file of the journal; opening the file undoes it."""
    try:
        return path.with_name(path.name + "-journal").stat().st_size
    except FileNotFoundError:
        return 0


def _make(path: Path) -> None:
    """Make a file without records, whole or not at all: a process that is killed meanwhile leaves nothing of its name.

    Raises:
        StorageError: The folder takes no files.
        sqlite3.Error: The disk does not take it.
    """
    unfinished = path.with_name(f"{path.name}.new")
    try:
        for left in (unfinished, unfinished.with_name(f"{unfinished.name}-journal")):
            left.unlink(missing_ok=True)
        with contextlib.closing(_opened(unfinished)) as connection:
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("BEGIN IMMEDIATE")
            connection.execute(_RECORDS)
            connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {FORMAT_VERSION}")
            connection.execute("COMMIT")
        unfinished.replace(path)
        sync_directory(path.parent)
    except OSError as error:
        raise StorageError(f"the journal {path} cannot be made: {error.strerror}") from error


def _opened(path: Path) -> sqlite3.Connection:
    # Transactions are begun and ended here, not by the module's own rules. Another process that only looks (the sqlite3
    # shell, say) is waited for a little.
    connection = sqlite3.connect(path, isolation_level=None, timeout=5.0, check_same_thread=False)
    connection.execute(f"PRAGMA page_size = {_PAGE_BYTES}")
    connection.execute("PRAGMA locking_mode = EXCLUSIVE")
    return connection


def _require_version(path: Path, connection: sqlite3.Connection, good: int) -> None:
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if (application, version) == (0, 0):
        raise DamagedSegmentError(path, good, "it is an SQLite database without records")
    if application != _APPLICATION_ID or not 1 <= version <= FORMAT_VERSION:
        raise StorageError(
            f"{path} is not a journal of this version: application_id {application:#x}, version {version}; this "
            f"version reads {FORMAT_VERSION}"
        )


def _require_sound(path: Path, connection: sqlite3.Connection, good: int) -> None:
    # The records' checksums cannot tell of records that are no longer there: a page that lost its count of them ends
    # the file early, and looks like a shorter journal.
    (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if verdict != "ok":
        raise DamagedSegmentError(path, good, f"SQLite says: {verdict}")


def _crc32(written: Written) -> int:
    head = crc32(written.said, crc32(written.kind.encode()))
    return crc32(written.payload, head)


def _storage_error(path: Path, error: sqlite3.Error) -> StorageError:
    """The error of a failed write: one that passes once there is room, or one for good."""
    if error.sqlite_errorcode in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE):
        return StorageFullError(
            f"the disk of {path.parent} has no room for the journal ({error}): make room; nothing was lost, and what "
            "was refused is sent again"
        )
    return StorageError(f"the journal {path} cannot be written: {error}")
