"""Files that are read again when they change, while a shard runs."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from paceline_wire.errors import ConfigurationError

_log = logging.getLogger(__name__)
_Content = TypeVar("_Content")
_Stamp = tuple[tuple[int, ...] | None, ...]


class WatchedFiles(Generic[_Content]):
    """What some files say together. Once read, what they said stays until they say something else that can be used.

    Args:
        paths: The files.
        read: Reads them all.

    Attributes:
        content: What they said last.

    Raises:
        ConfigurationError: They cannot be used from the start.
    """

    def __init__(self, paths: Sequence[Path], read: Callable[[], _Content]) -> None:
        self._paths = paths
        self._read = read
        self._stamp = self._now()
        self._problem: str | None = None
        self.content = read()

    def look(self) -> bool:
        """Read them again if they have changed; returns whether there is something new. Blocks on the disk.

        What cannot be used is tried again at each look: the fault may be none of the file's. It is told once.
        """
        stamp = self._now()
        has_changed = stamp != self._stamp
        if not has_changed and self._problem is None:
            return False
        self._stamp = stamp
        try:
            self.content = self._read()
        except Exception as error:  # noqa: BLE001  # whatever a broken file makes of a parser, the others are looked at
            problem = str(error) if isinstance(error, ConfigurationError) else f"{type(error).__name__}: {error}"
            if has_changed or problem != self._problem:
                _log.error("a file has changed and cannot be used, so what it said before stays: %s", problem)
            self._problem = problem
            return False
        self._problem = None
        _log.info("read again: %s", ", ".join(map(str, self._paths)))
        return True

    def _now(self) -> _Stamp:
        return tuple(map(_stamp, self._paths))


def _stamp(path: Path) -> tuple[int, ...] | None:
    """What changes when a file is written or replaced or its mode is set, links followed; None: it is not there."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_size
