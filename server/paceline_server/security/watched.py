"""Files that are read again when they change, while a shard runs."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

_log = logging.getLogger(__name__)
_Content = TypeVar("_Content")
_Stamp = tuple[tuple[int, int, int] | None, ...]


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
        self._unusable: _Stamp | None = None
        self.content = read()

    def look(self) -> bool:
        """Read them again if they have changed; returns whether there is something new. Blocks on the disk.

        What cannot be used is tried again at every look: it may be in the midst of being written, or lack a permission,
        which no stamp shows.
        """
        stamp = self._now()
        if stamp == self._stamp:
            return False
        try:
            self.content = self._read()
        except Exception as error:  # noqa: BLE001  # libraries raise their own, and the other files are read all the same
            if stamp != self._unusable:
                _log.error("a file has changed and cannot be used, so what it said before stays: %s", error)
            self._unusable = stamp
            return False
        self._stamp, self._unusable = stamp, None
        _log.info("read again: %s", ", ".join(map(str, self._paths)))
        return True

    def _now(self) -> _Stamp:
        return tuple(map(_stamp, self._paths))


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """What changes when a file is written or replaced, links followed; None: it is not there."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size
