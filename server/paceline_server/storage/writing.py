"""Writes the state of a shard that nobody serves as the beginning of a directory: a snapshot and an empty journal."""

from collections.abc import Mapping
from typing import Any

from paceline_server.shard import Shard
from paceline_server.storage.directory import ShardDirectory
from paceline_server.storage.segment import SegmentWriter, Sync
from paceline_server.storage.snapshot import SnapshotWriter
from paceline_wire.errors import StorageError


def write_state(
    directory: ShardDirectory, shard: Shard, *, number: int, time_s: float, config: Mapping[str, Any]
) -> None:
    """Write a snapshot of a shard, and the journal that begins after it.

    Args:
        directory: Where to.
        shard: The state; it must be initialized.
        number: The number that the next record will have; higher than that of any record in the state.
        time_s: Where the run's clock is.
        config: The configuration, see journal.Configured.

    Raises:
        StorageError: It cannot be written.
    """
    if shard.manifest is None or not shard.initialized:
        raise StorageError(f"the run in {directory.path} has no parameters yet: there is nothing to write")
    directory.create()
    writer = SnapshotWriter(directory, number)
    try:
        for index, hosted in shard.fragments.items():
            writer.add(index, hosted.copied())
        writer.finish(
            shard.manifest,
            shard=shard.index,
            num_shards=shard.num_shards,
            initialization_id=shard.initialization_id,
            time_s=time_s,
            membership_record=number - 1,
            membership=shard.membership.state(time_s),
            config=config,
        )
    except BaseException:
        writer.abandon()
        raise
    SegmentWriter(directory.segment_path(number), number, Sync.COMMIT).close()
