"""The journal on disk: what arrives while a commit is under way is kept together by the next one (group commit)."""

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from paceline_server.journal import Decided, FragmentInitialized, Record
from paceline_server.storage.directory import ShardDirectory
from paceline_server.storage.segment import SegmentWriter, Sync
from paceline_wire.errors import StorageError, StorageFullError

_Result = TypeVar("_Result")

MOST_RECORDS = 64
"""Records in one commit at most: a bound for what a full disk refuses at once."""

ROOM_BYTES = 1024 * 1024
"""What must be free, besides twice what was refused, before pushes are received again after the disk was full."""


@dataclass(frozen=True, eq=False)
class _Waiting:
    record: Record
    number: "asyncio.Future[int]"


class DurableJournal:
    """A journal in a shard's directory, whose lock the caller holds. Belongs to one event loop.

    Args:
        directory: Where it is.
        next_number: The number that the next record will have.
        sync: When records are forced to the disk.
        sync_interval_s: Seconds between that, with Sync.INTERVAL.

    Raises:
        StorageError: It cannot be written.
    """

    def __init__(
        self, directory: ShardDirectory, next_number: int, sync: Sync = Sync.COMMIT, sync_interval_s: float = 1.0
    ) -> None:
        self.sync = sync
        self.newest_record = next_number - 1
        self.bytes_since_rotation = 0
        self._directory = directory
        self._sync_interval_s = sync_interval_s
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="paceline-journal")
        self._waiting: list[_Waiting] = []
        self._has_waiting = asyncio.Event()
        self._using_segment = asyncio.Lock()
        self._full: StorageFullError | None = None
        self._room_bytes = 0
        self._failed: StorageError | None = None
        self._segment = self._new_segment(next_number)
        self._tasks = [asyncio.create_task(self._write_again_and_again())]
        if sync is Sync.INTERVAL:
            self._tasks.append(asyncio.create_task(self._flush_again_and_again()))

    async def append(self, record: Record) -> int:
        """Keep a record; see Journal."""
        if self._failed is not None:
            raise StorageError(str(self._failed))
        waiting = _Waiting(record, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        self._has_waiting.set()
        return await waiting.number

    @property
    def problem(self) -> str | None:
        """Why the last record could not be kept, in a sentence; None if it could."""
        return None if self._full is None else str(self._full)

    def refuse_when_full(self) -> None:
        """Say so if there was no room and there is none yet; see Journal."""
        if self._full is None:
            return
        disk = os.statvfs(self._directory.path)
        if disk.f_bavail * disk.f_frsize < self._room_bytes:
            raise self._full
        self._full = None

    async def rotate(self) -> int:
        """Begin a new file; returns the number of its first record. All appended before are in the older files.

        Raises:
            StorageError: It cannot be made, and the older one goes on.
        """
        async with self._using_segment:
            if self.bytes_since_rotation:
                newer = await self._in_thread(lambda: self._new_segment(self._segment.next_number))
                older, self._segment = self._segment, newer
                self.bytes_since_rotation = 0
                await self._in_thread(older.close)
            return self._segment.next_number

    async def flush(self) -> None:
        """Force all that was appended to the disk, whatever the policy.

        Raises:
            StorageError: The disk does not take it.
        """
        async with self._using_segment:
            await self._in_thread(self._segment.flush)

    async def close(self) -> None:
        """Bring all to the disk. Nothing may be appended any more."""
        for task in self._tasks:
            task.cancel()
        async with self._using_segment:
            try:
                await self._in_thread(self._segment.close)
            except StorageError:
                if self._failed is None:
                    raise
        self._thread.shutdown()

    def _new_segment(self, first: int) -> SegmentWriter:
        return SegmentWriter(self._directory.segment_path(first), first, self.sync)

    async def _write_again_and_again(self) -> None:
        while True:
            await self._has_waiting.wait()
            self._has_waiting.clear()
            while self._waiting:
                batch, self._waiting = self._waiting[:MOST_RECORDS], self._waiting[MOST_RECORDS:]
                async with self._using_segment:
                    await self._write(batch)

    async def _write(self, batch: list[_Waiting]) -> None:
        records = [waiting.record for waiting in batch]
        try:
            first, num_bytes = await self._in_thread(lambda: self._segment.append(records))
        except StorageError as error:
            self._note(error)
            self._room_bytes = ROOM_BYTES + 2 * sum(_num_bytes(record) for record in records)
            for waiting in batch:
                _fail(waiting.number, error)
            return
        self._full = None
        self.bytes_since_rotation += num_bytes
        self.newest_record = first + len(batch) - 1
        for number, waiting in enumerate(batch, start=first):
            if not waiting.number.done():
                waiting.number.set_result(number)

    def _note(self, error: StorageError) -> None:
        if isinstance(error, StorageFullError):
            self._full = error
        elif self._failed is None:
            self._failed = error

    async def _flush_again_and_again(self) -> None:
        while True:
            await asyncio.sleep(self._sync_interval_s)
            try:
                await self.flush()
            except StorageError as error:
                self._note(error)
                return

    async def _in_thread(self, work: Callable[[], _Result]) -> _Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


def _num_bytes(record: Record) -> int:
    payload = record.payload if isinstance(record, Decided | FragmentInitialized) else None
    return 0 if payload is None else payload.numel()


def _fail(number: "asyncio.Future[int]", error: StorageError) -> None:
    if not number.done():
        number.set_exception(type(error)(str(error)))
