"""The audit log: what operators did to a shard, one JSON object a line, only ever appended to.

It lies in the shard's data directory; without one the newest entries are held in memory. Every entry is in the log of
the process, too, whatever its level.
"""

import asyncio
import json
import logging
import os
from collections import deque
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from pydantic import TypeAdapter

_log = logging.getLogger(__name__)

MOST_ENTRIES = 1000
"""Entries that are read, or held in memory, at most."""

TAIL_BYTES = 2 * 1024 * 1024
"""The end of the file that is looked at for them: an entry has a few hundred bytes, and at most about two thousand."""


@dataclass(frozen=True, kw_only=True)
class AuditEntry:
    """One act.

    Attributes:
        time: When it ended, in UTC, as ISO 8601 with microseconds.
        shard: The shard's index.
        who: Whom the caller's credential names; empty: nobody.
        peer: From where the call came.
        act: What was done, or refused.
        subject: To what; empty: the shard.
        old: The value before; empty: none.
        new: The value from then on; empty: none.
        result: "done", or "refused: " and why.
    """

    time: str
    shard: int
    who: str
    peer: str
    act: str
    subject: str = ""
    old: str = ""
    new: str = ""
    result: str

    @property
    def time_us(self) -> int:
        """Microseconds since 1970."""
        return round(datetime.fromisoformat(self.time).timestamp() * 1e6)


_ENTRY = TypeAdapter(AuditEntry)


def utc_now() -> str:
    """The time of an entry that is made now."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


class AuditLog:
    """One shard's audit log.

    Args:
        path: The file; None: in memory.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._memory: deque[AuditEntry] = deque(maxlen=MOST_ENTRIES)
        self._writing = asyncio.Lock()

    async def add(self, entry: AuditEntry) -> None:
        """Keep an entry, on the disk when this returns. A disk that does not take it does not undo the act."""
        line = json.dumps(asdict(entry), ensure_ascii=True)
        _log.warning("audit: %s", line)
        if self._path is None:
            self._memory.append(entry)
            return
        path = self._path
        try:
            async with self._writing:
                await asyncio.to_thread(_append, path, line)
        except OSError as error:
            _log.error("the audit log %s cannot be written: %s", path, error.strerror)

    async def newest(self, count: int) -> list[AuditEntry]:
        """The newest entries, the newest last; lines that are damaged are left out."""
        if self._path is None:
            return list(self._memory)[-count:]
        return (await asyncio.to_thread(_read, self._path))[-count:]


def _append(path: Path, line: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640)
    try:
        # A line of its own even behind one that a power failure cut.
        broken = os.fstat(descriptor).st_size > 0 and not _ends_whole(path)
        os.write(descriptor, f"{chr(10) if broken else ''}{line}\n".encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _ends_whole(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def _read(path: Path) -> list[AuditEntry]:
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            lines = file.read().splitlines()
    except FileNotFoundError:
        return []
    entries = []
    for line in lines[-MOST_ENTRIES:]:
        try:
            entries.append(_entry(line))
        except (ValueError, OverflowError):  # a damaged line hides no other
            _log.warning("a line of the audit log %s cannot be read", path)
    return entries


def _entry(line: bytes) -> AuditEntry:
    """The entry in a line, as far as it can be sent on.

    Raises:
        ValueError: It is none.
        OverflowError: Its time is none.
    """
    entry = _ENTRY.validate_json(line)
    if entry.time_us < 0:
        raise ValueError(f"{entry.time} is before 1970")
    return entry
