"""Writes snapshots beside the running shard whenever a restart would otherwise have too much to replay."""

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from paceline_server.config import ServerConfig
from paceline_server.engine import Engine
from paceline_server.live_configuration import LiveConfiguration
from paceline_server.storage.directory import ShardDirectory
from paceline_server.storage.mirror import Mirror
from paceline_server.storage.snapshot import SnapshotWriter, remove_snapshots_before
from paceline_server.storage.store import Durable, kept_config
from paceline_wire.errors import NotInitializedError, PacelineError, StorageError

_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")

LOOK_EVERY_S = 0.5
"""Seconds between looks at whether a snapshot is due."""

PAUSE_FACTOR = 3.0
"""A snapshot is followed by a pause of so many times its own duration, so that it never takes most of the disk."""

RETRY_S = 10.0
"""Seconds before the next attempt after one that failed, when the disk is full for instance."""

JOURNAL_PER_STATE = 2.0
"""The journal may grow to so many times the size of the state, whatever replaying it would take..."""

SMALLEST_JOURNAL_BYTES = 256 * 1024 * 1024
"""...but no snapshot is written for less than this on that account."""


@dataclass(kw_only=True)
class SnapshotCounters:
    """What the snapshotter has done since the process began.

    Attributes:
        written: Snapshots that were finished.
        finished_s: When the newest was complete, in seconds of time.monotonic; None if there is none.
        problem: Why the last attempt failed, in a sentence; None if it did not.
    """

    written: int = 0
    finished_s: float | None = None
    problem: str | None = None


@dataclass(frozen=True, kw_only=True)
class WrittenSnapshot:
    """A snapshot that is complete.

    Attributes:
        path: Its folder.
        number: The first record of the journal that it may not include.
        num_bytes: Size of its files.
        existed: Whether nothing had changed since it was written, so that it was not written now.
    """

    path: Path
    number: int
    num_bytes: int
    existed: bool


class Snapshotter:
    """Watches one shard.

    Args:
        engine: The shard in operation.
        durable: Where it is kept.
        live: The run's configuration.
    """

    def __init__(self, engine: Engine, durable: Durable, live: LiveConfiguration) -> None:
        self.durable = durable
        self._engine = engine
        self._directory = durable.directory
        self._journal = durable.journal
        self._live = live
        self._config = config = live.config
        self._writing = asyncio.Lock()
        self._mirror = None
        if config.storage.mirror is not None:
            self._mirror = Mirror(config.storage.mirror, engine.shard.index, config.storage.keep_snapshots)
        self._newest = max(self._directory.snapshot_numbers(), default=None)
        self.counters = SnapshotCounters(finished_s=None if self._newest is None else self._finished_s(self._newest))
        # What an earlier process left to be replayed counts too: a server that is killed often must write some, too.
        engine.replay_s = durable.recovered.took_s if durable.recovered.replayed else 0.0
        self._older_bytes = _journal_bytes(self._directory, self._newest or 1)
        self._pause_until_s = 0.0
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="paceline-snapshot")

    async def run(self) -> None:
        """Write snapshots when they are due; runs until cancelled."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            if self.due():
                await self.attempt()

    def due(self) -> bool:
        """Whether a restart would have too much to replay, or the journal is too large."""
        shard = self._engine.shard
        if not shard.initialized or time.monotonic() < self._pause_until_s:
            return False
        if self._newest is None or self._engine.replay_s >= self._config.storage.replay_s:
            return True
        state_bytes = sum(hosted.values.num_bytes for hosted in shard.fragments.values() if hosted.values is not None)
        bound = max(JOURNAL_PER_STATE * state_bytes, SMALLEST_JOURNAL_BYTES)
        return self.journal_bytes >= bound

    @property
    def journal_bytes(self) -> int:
        """Bytes in the journal that the newest snapshot does not cover."""
        return self._older_bytes + self._journal.bytes_since_rotation

    async def attempt(self) -> None:
        """Write a snapshot; one that fails leaves the ones before and the journal as they are."""
        with suppress(PacelineError):
            await self.write()

    async def write(self) -> WrittenSnapshot:
        """Write a snapshot, unless nothing has changed since the newest; one that fails leaves all as it is.

        Raises:
            NotInitializedError: The shard's parameters are not complete.
            StorageError: It cannot be written.
        """
        async with self._writing:
            began_s = time.monotonic()
            try:
                number, existed = await self._write()
            except PacelineError as error:
                if self.counters.problem is None:
                    _log.warning("no snapshot could be written, the journal goes on: %s", error)
                self.counters.problem = str(error)
                self._pause_until_s = time.monotonic() + RETRY_S
                raise
            ended_s = time.monotonic()
            self.counters.problem = None
            if not existed:
                self.counters.finished_s = ended_s
                self._pause_until_s = ended_s + PAUSE_FACTOR * (ended_s - began_s)
            path = self._directory.snapshot_path(number)
            num_bytes = await self._in_thread(lambda: _size_of(path))
            return WrittenSnapshot(path=path, number=number, num_bytes=num_bytes, existed=existed)

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()

    async def _write(self) -> tuple[int, bool]:
        """Write a snapshot; its number, and whether it was there."""
        if not self._engine.shard.initialized:
            raise NotInitializedError("the run has no parameters yet: there is nothing to write a snapshot of")
        # Fragments are copied one by one, and replay brings each on from where it was copied: so it begins with the
        # configuration that counted before the first record that is replayed.
        async with self._live.changing:
            covered_s, covered_bytes = self._engine.replay_s, self.journal_bytes
            number = await self._journal.rotate()
            config = self._live.config
        if number == self._newest:
            return number, True
        self._engine.replay_s, self._older_bytes = 0.0, 0
        try:
            await self._fill(number, config)
        except BaseException:
            # All of it is still to be replayed, so another attempt is due.
            self._engine.replay_s += covered_s
            self._older_bytes += covered_bytes
            raise
        self._newest = number
        self.counters.written += 1
        await self._in_thread(lambda: _prune(self._directory, self._config.storage.keep_snapshots))
        if self._mirror is not None:
            await self._in_thread(lambda: self._mirrored(number))
        return number, False

    async def _fill(self, number: int, config: ServerConfig) -> None:
        writer = await self._in_thread(lambda: SnapshotWriter(self._directory, number))
        try:
            await self._fill_with(writer, config)
        except BaseException:
            self._thread.submit(writer.abandon)
            raise

    async def _fill_with(self, writer: SnapshotWriter, config: ServerConfig) -> None:
        engine, shard = self._engine, self._engine.shard
        manifest, initialization_id = shard.manifest, shard.initialization_id
        for index in shard.fragments:
            copy = await engine.copied(index)
            await self._in_thread(lambda copy=copy, index=index: writer.add(index, copy))  # type: ignore[misc]  # mypy: typed lambda defaults
        if manifest is None or shard.manifest is not manifest:
            raise StorageError("the run was begun anew while its snapshot was written")
        record, membership = engine.membership_record, shard.membership.state(engine.clock())
        # What the snapshot includes must be in the journal, or its records' numbers could be given out twice.
        await self._journal.flush()
        await self._in_thread(
            lambda: writer.finish(
                manifest,
                shard=shard.index,
                num_shards=shard.num_shards,
                initialization_id=initialization_id,
                time_s=engine.clock(),
                membership_record=record,
                membership=membership,
                config=kept_config(config),
            )
        )

    def _finished_s(self, number: int) -> float:
        """When a snapshot of an earlier process was complete, in seconds of time.monotonic."""
        written_s = self._directory.snapshot_path(number).stat().st_mtime
        return time.monotonic() - max(0.0, time.time() - written_s)

    def _mirrored(self, number: int) -> None:
        """Copy a snapshot to where it is mirrored; a mirror that cannot be reached does not hold up the shard."""
        if self._mirror is None:
            return
        try:
            self._mirror.put(self._directory.snapshot_path(number))
        except StorageError as error:
            _log.warning("the snapshot is not mirrored: %s", error)

    async def _in_thread(self, work: Callable[[], _Result]) -> _Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


def _journal_bytes(directory: ShardDirectory, first: int) -> int:
    """Size of the files of the journal from a record on."""
    paths = [directory.segment_path(number) for number in directory.segment_numbers() if number >= first]
    return sum(path.stat().st_size for path in paths)


def _size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def _prune(directory: ShardDirectory, keep: int) -> None:
    """Remove what the newest `keep` snapshots do not need: older ones, and the journal before the oldest of them."""
    kept = directory.snapshot_numbers()[-keep:]
    if len(kept) < keep:
        return
    remove_snapshots_before(directory, kept[0])
    for number in directory.segment_numbers():
        if number < kept[0]:
            for suffix in ("", "-journal", "-wal"):
                path = directory.segment_path(number)
                path.with_name(path.name + suffix).unlink(missing_ok=True)
