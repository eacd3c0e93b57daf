"""Repair shows what is damaged and goes back to the last good point; reshard and export read a stopped run."""

from pathlib import Path

import pytest
import torch

from paceline_server.settings import config_from_mapping
from paceline_server.storage.directory import ShardDirectory
from paceline_server.storage.parameters import read_parameters
from paceline_server.storage.recovery import recover
from paceline_server.storage.repair import examine, restore
from paceline_server.storage.reshard import reshard
from paceline_wire.errors import InvalidInputError, NotInitializedError, StorageError
from support_storage import CONFIG, MANIFEST, PlayedShard, assert_same_state, flipped


def played(data_dir: Path, index: int = 0, num_shards: int = 1, rounds: int = 3) -> PlayedShard:
    """A shard to which a worker has pushed."""
    config = CONFIG.model_copy(update={"shards": num_shards})
    shard = PlayedShard(ShardDirectory(data_dir, index), config)
    shard.initialize()
    shard.join("a")
    push(shard, 1, rounds)
    return shard


def push(shard: PlayedShard, first: int, last: int) -> None:
    """Let the worker push to every fragment in each of the rounds."""
    for seq in range(first, last + 1):
        for fragment in shard.shard.fragments:
            shard.push("a", seq, fragment, seed=seq)


def test_nothing_is_wrong_with_a_whole_directory(tmp_path: Path) -> None:
    """An examination of a whole directory finds no problem."""
    shard = played(tmp_path)
    shard.close()
    found = examine(shard.directory)
    assert (found.problem, found.lost) == (None, 0)
    assert found.good == shard.newest_record


def test_restore_goes_back_to_the_last_good_point(tmp_path: Path) -> None:
    """What came before the damage is there bit for bit, and what came after is set aside."""
    shard = played(tmp_path)
    good = shard.newest_record
    shard.close()
    expected = recover(shard.directory, CONFIG).shard
    shard.rotate()
    push(shard, 4, 4)
    shard.rotate()
    push(shard, 5, 5)
    newest = shard.newest_record
    shard.close()
    damaged = shard.directory.segment_path(good + 1)
    data = bytearray(damaged.read_bytes())
    data[-100:] = bytes(100)
    damaged.write_bytes(data)
    found = examine(shard.directory)
    assert found.problem is not None
    assert str(damaged) in found.problem
    assert (found.good, found.newest, found.lost) == (good, newest, newest - good)

    restored = restore(shard.directory, found)
    assert restored.newest_record == good
    after = recover(shard.directory, CONFIG)
    assert_same_state(expected, after.shard)
    assert after.newest_record == newest  # numbers are not given out twice
    assert examine(shard.directory).problem is None
    aside = {path.name for path in shard.directory.damaged.rglob("*.db")}
    assert damaged.name in aside


def test_restore_begins_from_a_snapshot_alone(tmp_path: Path) -> None:
    """A snapshot whose journal is gone, a mirrored one for instance, becomes a run again."""
    source = played(tmp_path / "source")
    source.close()
    expected = recover(source.directory, CONFIG)
    restored_from = examine(source.directory)
    restore(source.directory, restored_from)
    (number,) = source.directory.snapshot_numbers()
    target = ShardDirectory(tmp_path / "target", 0)
    target.create()
    source.directory.snapshot_path(number).rename(target.snapshot_path(number))
    found = examine(target)
    assert found.problem is not None
    assert found.good == number - 1
    restore(target, found)
    assert_same_state(expected.shard, recover(target, CONFIG).shard)


def test_nothing_can_be_brought_back_from_nothing_whole(tmp_path: Path) -> None:
    """Where no snapshot is whole and the journal does not reach back, the examination says so."""
    shard = played(tmp_path)
    shard.close()
    restore(shard.directory, examine(shard.directory))
    (number,) = shard.directory.snapshot_numbers()
    with flipped(shard.directory.snapshot_path(number) / "tensors.pb", 3, 1):
        found = examine(shard.directory)
        assert found.good is None
        assert found.problem is not None
        with pytest.raises(StorageError, match="no snapshot is whole"):
            restore(shard.directory, found)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 2)])
def test_a_run_is_divided_anew(tmp_path: Path, before: int, after: int) -> None:
    """Every fragment has the same numbers, bins and sequence numbers, in its new place; the source stays as it is."""
    source, target = tmp_path / "source", tmp_path / "target"
    shards = [played(source, index, before) for index in range(before)]
    for shard in shards:
        shard.close()
    counts = reshard(source, target, after)
    assert sum(counts) == len(MANIFEST.fragments)
    config = CONFIG.model_copy(update={"shards": after})
    for index in range(after):
        found = recover(ShardDirectory(target, index), config).shard
        assert list(found.fragments) == list(range(index, len(MANIFEST.fragments), after))
        assert found.membership.active == {"a"}
        for fragment, hosted in found.fragments.items():
            was = shards[fragment % before].shard.fragments[fragment]
            assert hosted.ledger == was.ledger
            assert hosted.values is not None
            assert was.values is not None
            for name, vector in was.values.vectors.items():
                assert torch.equal(vector, hosted.values.vectors[name])
    for shard in shards:
        source_config = CONFIG.model_copy(update={"shards": before})
        assert_same_state(shard.shard, recover(shard.directory, source_config).shard)


def test_what_cannot_be_divided_is_refused(tmp_path: Path) -> None:
    """Too many shards, a target that is in use, and folders that do not belong together are refused."""
    source = tmp_path / "source"
    played(source).close()
    with pytest.raises(InvalidInputError, match="the run has 2 fragments"):
        reshard(source, tmp_path / "target", 3)
    with pytest.raises(InvalidInputError, match="is not empty"):
        reshard(source, source, 2)
    with pytest.raises(StorageError, match="is no data directory"):
        reshard(tmp_path, tmp_path / "target", 2)
    lonely = tmp_path / "lonely"
    played(lonely, 0, 2).close()
    with pytest.raises(StorageError, match="has 1 of the 2 shards"):
        reshard(lonely, tmp_path / "target", 1)
    assert not (tmp_path / "target").exists()


def test_parameters_are_read_from_the_directory(tmp_path: Path) -> None:
    """What export reads from the directory is what the shards would send."""
    shards = [played(tmp_path, index, 2) for index in range(2)]
    for shard in shards:
        shard.close()
    manifest, tensors = read_parameters(tmp_path)
    assert manifest == MANIFEST
    parts = [shards[index].shard.hosted(index)[1].published() for index in range(2)]
    assert torch.equal(torch.cat(parts), tensors["x"])


def test_a_run_that_has_not_begun_has_no_parameters(tmp_path: Path) -> None:
    """An empty run cannot be exported."""
    PlayedShard(ShardDirectory(tmp_path, 0), config_from_mapping({})).close()
    with pytest.raises(NotInitializedError):
        read_parameters(tmp_path)
