"""Writes down in which order pushes arrive, so that the simulator can play a real run again (`storage.arrivals`)."""

import asyncio
import json
import logging
from pathlib import Path

from paceline_server.journal import Decided, Record
from paceline_wire.errors import ConfigurationError

_log = logging.getLogger(__name__)


class ArrivalRecorder:
    """A journal that keeps who pushed what when, one JSON object a line, and no numbers.

    Args:
        path: The file to append to.

    Raises:
        ConfigurationError: The file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._failed = False
        try:
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise ConfigurationError(f"storage.arrivals: {path} cannot be written: {error.strerror}") from error

    async def append(self, record: Record) -> None:
        """Write a line if the record is of a push. A disk that is full ends the record, not the run."""
        if self._failed or not isinstance(record, Decided) or record.push is None:
            return
        line = {
            "time_s": record.time_s,
            "fragment": record.fragment,
            "worker": record.push.worker,
            "incarnation": record.push.incarnation,
            "seq": record.push.seq,
            "base_bin": record.push.base_bin,
            "outcome": record.decision.outcome.value,
        }
        try:
            self._file.write(json.dumps(line) + "\n")
        except OSError as error:
            self._give_up(error)

    async def close(self) -> None:
        """Bring the lines to the disk."""
        try:
            await asyncio.to_thread(self._file.close)
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        if not self._failed:
            _log.error("storage.arrivals: %s cannot be written any more: %s", self._path, error.strerror)
        self._failed = True
