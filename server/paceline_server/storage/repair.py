"""What is wrong with a shard's directory, and back to its last good point, on request.

Nothing is ever deleted: what does not fit any more is moved to the folder `damaged`.
"""

import shutil
from dataclasses import dataclass, field
from pathlib import Path

from paceline_server.storage.directory import ShardDirectory
from paceline_server.storage.recovery import Recovered, recover_what_is_whole
from paceline_server.storage.segment import DamagedSegmentError, read_segment
from paceline_server.storage.snapshot import load_snapshot
from paceline_server.storage.store import kept_config
from paceline_server.storage.writing import write_state
from paceline_wire.errors import StorageError


@dataclass(frozen=True, kw_only=True)
class Part:
    """A snapshot, or a file of the journal.

    Attributes:
        path: Where it is.
        first: The record that a snapshot needs first, or the first of a file.
        last: The last record of a file that could be read; None of a snapshot.
        problem: What is wrong with it; None if nothing is.
    """

    path: Path
    first: int
    last: int | None = None
    problem: str | None = None


@dataclass(frozen=True, kw_only=True)
class Examination:
    """What a shard's directory holds.

    Attributes:
        snapshots: The snapshots, oldest first.
        segments: The files of the journal, oldest first.
        good: The last record up to which the state can be brought back; None if it cannot at all.
        newest: The newest record that was found anywhere.
        problem: What keeps the server from starting; None if nothing does.
        notes: What else was noticed.
    """

    snapshots: tuple[Part, ...]
    segments: tuple[Part, ...]
    good: int | None
    newest: int
    problem: str | None
    notes: tuple[str, ...] = field(default=())

    @property
    def lost(self) -> int:
        """Records after the last good one that were found, whole or not."""
        return self.newest - (self.good or 0)


def examine(directory: ShardDirectory) -> Examination:
    """Read all of a shard's directory. The caller holds its lock."""
    snapshots = tuple(_examined_snapshot(directory, number) for number in directory.snapshot_numbers())
    segments = tuple(_examined_segment(directory, number) for number in directory.segment_numbers())
    newest = max((part.last for part in segments if part.last is not None), default=0)
    try:
        recovered, damage = recover_what_is_whole(directory)
    except StorageError as error:
        return Examination(snapshots=snapshots, segments=segments, good=None, newest=newest, problem=str(error))
    return Examination(
        snapshots=snapshots,
        segments=segments,
        good=recovered.newest_record,
        newest=max(newest, recovered.newest_record),
        problem=None if damage is None else str(damage),
        notes=tuple(recovered.notes),
    )


def restore(directory: ShardDirectory, found: Examination) -> Recovered:
    """Go back to the last good point: write the state of it anew, and set everything else aside.

    The numbers of records that are given up are not used again. The caller holds the directory's lock.

    Args:
        directory: The shard's directory.
        found: What `examine` found there.

    Returns:
        The state that was written.

    Raises:
        StorageError: Nothing can be brought back, or the disk does not take it.
    """
    recovered, _ = recover_what_is_whole(directory)
    if recovered.config is None:
        raise StorageError(f"{directory.path} has no configuration: there is nothing to bring back")
    older = [*found.snapshots, *found.segments]
    number = max(found.newest, recovered.newest_record, *(part.first for part in older)) + 1
    write_state(
        directory, recovered.shard, number=number, time_s=recovered.time_s, config=kept_config(recovered.config)
    )
    for part in older:
        _set_aside(directory, part.path)
    return recovered


def _examined_snapshot(directory: ShardDirectory, number: int) -> Part:
    path = directory.snapshot_path(number)
    try:
        load_snapshot(path)
    except StorageError as error:
        return Part(path=path, first=number, problem=str(error))
    return Part(path=path, first=number)


def _examined_segment(directory: ShardDirectory, number: int) -> Part:
    path, last = directory.segment_path(number), number - 1
    try:
        for found, _ in read_segment(path, number):
            last = found
    except StorageError as error:
        reason = error.reason if isinstance(error, DamagedSegmentError) else str(error)
        return Part(path=path, first=number, last=last, problem=reason)
    return Part(path=path, first=number, last=last)


def _set_aside(directory: ShardDirectory, path: Path) -> None:
    """Move a snapshot or a file of the journal, and what SQLite has beside it, out of the way."""
    try:
        target = directory.damaged / path.parent.name
        target.mkdir(parents=True, exist_ok=True)
        for each in (path, *path.parent.glob(f"{path.name}-*")):
            if each.exists():
                shutil.move(each, target / each.name)
    except OSError as error:
        raise StorageError(f"{path} cannot be moved to {directory.damaged}: {error.strerror}") from error
