"""Writes down in which order pushes arrive, so that the simulator can play a real run again (`storage.arrivals`)."""

import asyncio
import json
import logging
from pathlib import Path

from paceline_server.journal import Decided, Journal, Record
from paceline_server.ledger import PushRequest
from paceline_wire.errors import ConfigurationError

_log = logging.getLogger(__name__)


class ArrivalRecorder:
    """A journal that also writes who pushed what when, one JSON object a line, and no numbers.

    Args:
        journal: What keeps the records.
        path: The file to append to.

    Raises:
        ConfigurationError: The file cannot be written.
    """

    def __init__(self, journal: Journal, path: Path) -> None:
        self._journal = journal
        self._path = path
        self._failed = False
        try:
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise ConfigurationError(f"storage.arrivals: {path} cannot be written: {error.strerror}") from error

    async def append(self, record: Record) -> int:
        """Keep a record, and write a line if it is of a push. A disk that is full ends the lines, not the run."""
        number = await self._journal.append(record)
        if not self._failed and isinstance(record, Decided) and record.push is not None:
            self._write_line(record, record.push)
        return number

    def refuse_when_full(self) -> None:
        """As the journal says."""
        self._journal.refuse_when_full()

    def _write_line(self, record: Decided, push: PushRequest) -> None:
        line = {
            "time_s": record.time_s,
            "fragment": record.fragment,
            "worker": push.worker,
            "incarnation": push.incarnation,
            "seq": push.seq,
            "base_bin": push.base_bin,
            "outcome": record.decision.outcome.value,
        }
        try:
            self._file.write(json.dumps(line) + "\n")
        except OSError as error:
            self._give_up(error)

    async def close(self) -> None:
        """Bring records and lines to the disk."""
        await self._journal.close()
        try:
            await asyncio.to_thread(self._file.close)
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        if not self._failed:
            _log.error("storage.arrivals: %s cannot be written any more: %s", self._path, error.strerror)
        self._failed = True
