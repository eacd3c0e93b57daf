"""Divides a stopped run anew: parameters, momentum and bookkeeping move as they are, and go on in the same bits.

Fragment f lives on shard f modulo their number, whatever the number is; shards share nothing, so each fragment is
copied with its own bin and its own sequence numbers.
"""

from contextlib import ExitStack
from pathlib import Path

from paceline_server.construction import build_shard
from paceline_server.shard import Shard
from paceline_server.storage.directory import ShardDirectory, shard_directories
from paceline_server.storage.kept_settings import read_settings, write_settings
from paceline_server.storage.recovery import Recovered, recover
from paceline_server.storage.store import kept_config
from paceline_server.storage.writing import write_state
from paceline_wire.errors import InvalidInputError, StorageError


def reshard(source: Path, target: Path, num_shards: int) -> list[int]:
    """Write a run into a new data directory, divided among another number of shards. The source is not changed.

    Args:
        source: The data directory of all shards.
        target: A directory that does not exist yet, or is empty.
        num_shards: Shards that it will have, from 1 to the number of its fragments.

    Returns:
        How many fragments each new shard has.

    Raises:
        InvalidInputError: The target is not empty, or there are not as many fragments.
        StorageError: The source is damaged, in use, or not of one run; or the target cannot be written.
    """
    if target.exists() and any(target.iterdir()):
        raise InvalidInputError(f"{target} is not empty: name a new directory")
    with ExitStack() as held:
        directories = shard_directories(source)
        for directory in directories:
            held.enter_context(directory.locked())
        recovered = [recover(directory) for directory in directories]
    first = recovered[0]
    _require_one_run(source, recovered)
    if first.shard.manifest is None or first.config is None:
        raise StorageError(f"the run in {source} has no parameters yet: there is nothing to divide")
    num_fragments = len(first.shard.manifest.fragments)
    if not 1 <= num_shards <= num_fragments:
        raise InvalidInputError(f"{num_shards} shards are not possible: the run has {num_fragments} fragments")
    config = first.config.model_copy(update={"shards": num_shards})
    overrides = read_settings(directories[0])
    time_s = max(each.time_s for each in recovered)
    counts = []
    for index in range(num_shards):
        shard = build_shard(config, index)
        _fill(shard, [each.shard for each in recovered], time_s)
        directory = ShardDirectory(target, index)
        write_state(directory, shard, number=1, time_s=time_s, config=kept_config(config))
        write_settings(directory, overrides)
        counts.append(len(shard.fragments))
    return counts


def _fill(shard: Shard, sources: list[Shard], time_s: float) -> None:
    """Give a new shard its fragments, and the members of the first shard: workers are members of all."""
    if sources[0].manifest is None:
        return
    shard.take_manifest(sources[0].manifest, sources[0].initialization_id)
    shard.membership.restore(sources[0].membership.state(time_s), time_s)
    for index, hosted in shard.fragments.items():
        shard.restore_fragment(index, sources[index % len(sources)].fragments[index].copied())
        hosted.record = 0  # the records that it includes belong to another journal


def _require_one_run(source: Path, recovered: list[Recovered]) -> None:
    """Refuse folders that do not belong together."""
    first = recovered[0].shard
    for each in recovered:
        shard = each.shard
        if shard.num_shards != len(recovered):
            raise StorageError(
                f"{source} has {len(recovered)} of the {shard.num_shards} shards of its run: bring them all together"
            )
        if (shard.initialization_id, shard.manifest) != (first.initialization_id, first.manifest):
            raise StorageError(
                f"shard 0 and shard {shard.index} in {source} are of two runs: bring those of one together"
            )
        if not shard.initialized:
            raise StorageError(f"shard {shard.index} in {source} does not have all of its parameters")
