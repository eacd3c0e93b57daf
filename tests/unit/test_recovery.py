"""Recovery: a shard's directory gives back the very state, from any snapshot on, or says what is damaged."""

import json
import shutil
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline_server.config import ServerConfig
from paceline_server.journal import Decided, FragmentInitialized, Record
from paceline_server.ledger import Decision, Ledger, Outcome
from paceline_server.rules.base import Contribution
from paceline_server.settings import config_from_mapping
from paceline_server.storage.directory import ShardDirectory
from paceline_server.storage.recovery import Recovered, read_records, recover
from paceline_server.storage.repair import examine, restore
from paceline_server.storage.snapshot import SnapshotWriter, load_snapshot
from paceline_server.storage.store import kept_config
from paceline_server.storage.writing import write_state
from paceline_wire.errors import StorageError
from support_storage import CONFIG, PlayedShard, assert_same_state, flipped


@pytest.fixture
def directory(tmp_path: Path) -> ShardDirectory:
    """An empty directory of shard 0."""
    return ShardDirectory(tmp_path, 0)


def played(directory: ShardDirectory, rounds: int = 4, config: ServerConfig = CONFIG) -> PlayedShard:
    """A shard to which two workers have pushed."""
    shard = PlayedShard(directory, config)
    shard.initialize()
    shard.join("a")
    shard.join("b")
    push_rounds(shard, 1, rounds)
    return shard


def push_rounds(shard: PlayedShard, first: int, last: int) -> None:
    """Let both workers push to every fragment in each of the rounds."""
    for seq in range(first, last + 1):
        for fragment in shard.shard.fragments:
            for worker in ("a", "b"):
                shard.push(worker, seq, fragment, seed=100 * seq + fragment)


def write_snapshot(shard: PlayedShard, between: Callable[[], None] | None = None) -> int:
    """Write a snapshot as the snapshotter does; `between` runs after the first fragment was copied."""
    number = shard.rotate()
    writer = SnapshotWriter(shard.directory, number)
    for index, hosted in shard.shard.fragments.items():
        writer.add(index, hosted.copied())
        if between is not None and index == 0:
            between()
    manifest = shard.shard.manifest
    assert manifest is not None
    writer.finish(
        manifest,
        shard=0,
        num_shards=1,
        initialization_id=shard.shard.initialization_id,
        time_s=shard.now_s,
        membership_record=number - 1,
        membership=shard.shard.membership.state(shard.now_s),
        config=kept_config(CONFIG),
    )
    return number


def recovered(shard: PlayedShard, config: ServerConfig | None = CONFIG) -> Recovered:
    """The state that the shard's directory gives back."""
    shard.close()
    return recover(shard.directory, config)


def test_an_empty_directory_is_a_run_that_has_not_begun(directory: ShardDirectory) -> None:
    """Nothing is there, and nothing is wrong."""
    directory.create()
    found = recover(directory, CONFIG)
    assert found.newest_record == 0
    assert not found.shard.initialized


@pytest.mark.parametrize("rule", ["ormo", "orlomo", "delayed-nesterov", "smega2"])
def test_the_journal_alone_gives_the_state_back(directory: ShardDirectory, rule: str) -> None:
    """Replayed from the first record, parameters, momentum, bins, sequence numbers and members are the same bits."""
    mapping = {"outer": {"rule": rule}, "exchange": {"fragment_elements": 512, "dynamic_inner_steps": False}}
    shard = PlayedShard(directory, config_from_mapping(mapping))
    shard.initialize()
    shard.join("a")
    if rule != "orlomo":
        push_rounds(shard, 1, 1)
    found = recovered(shard, config_from_mapping(mapping))
    assert_same_state(shard.shard, found.shard)
    assert found.time_s == shard.now_s
    assert found.newest_record == shard.newest_record


@settings(max_examples=20, deadline=None)
@given(
    before=st.integers(0, 3),
    between=st.integers(0, 2),
    after=st.integers(0, 3),
    codec=st.sampled_from(["fp32", "int8", "topk"]),
)
def test_a_snapshot_and_what_follows_give_the_state_back(
    tmp_path_factory: pytest.TempPathFactory, before: int, between: int, after: int, codec: str
) -> None:
    """The same bits, however much was decided before, while and after a snapshot was written, fragment by fragment."""
    shard = played(ShardDirectory(tmp_path_factory.mktemp("data"), 0), before)
    seqs = dict.fromkeys(shard.shard.fragments, before)

    def push(rounds: int) -> None:
        for fragment in shard.shard.fragments:
            for _ in range(rounds):
                seqs[fragment] += 1
                shard.push("a", seqs[fragment], fragment, codec=codec, seed=seqs[fragment])

    write_snapshot(shard, lambda: push(between))
    push(after)
    found = recovered(shard)
    assert found.snapshot is not None
    assert_same_state(shard.shard, found.shard)


def test_the_newest_snapshot_is_used(directory: ShardDirectory) -> None:
    """Replay begins after the newest snapshot, so a restart does not read what came before."""
    shard = played(directory)
    write_snapshot(shard)
    push_rounds(shard, 5, 5)
    newest = write_snapshot(shard)
    push_rounds(shard, 6, 6)
    found = recovered(shard)
    assert found.snapshot == newest
    assert found.replayed == 2 * len(shard.shard.fragments)
    assert_same_state(shard.shard, found.shard)


@pytest.mark.parametrize("name", ["snapshot.json", "tensors.pb", "fragment-000001.safetensors"])
def test_an_older_snapshot_serves_when_the_newest_is_damaged(directory: ShardDirectory, name: str) -> None:
    """A bit that turned in any file of the newest snapshot is noticed, and costs time but no state."""
    shard = played(directory)
    older = write_snapshot(shard)
    push_rounds(shard, 5, 5)
    newest = write_snapshot(shard)
    path = directory.snapshot_path(newest) / name
    with flipped(path, path.stat().st_size // 2, 3):
        found = recovered(shard)
    assert found.snapshot == older
    assert name in found.notes[0]
    assert_same_state(shard.shard, found.shard)


@settings(max_examples=100, deadline=None)
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), data=st.data())
def test_no_flipped_bit_in_a_snapshot_goes_unnoticed(
    tmp_path_factory: pytest.TempPathFactory, where: float, bit: int, data: st.DataObject
) -> None:
    """A snapshot with any one bit turned is refused."""
    shard = played(ShardDirectory(tmp_path_factory.mktemp("data"), 0), 1)
    folder = shard.directory.snapshot_path(write_snapshot(shard))
    path = data.draw(st.sampled_from(sorted(folder.iterdir())))
    with flipped(path, int(where * path.stat().st_size), bit), pytest.raises(StorageError):
        load_snapshot(folder)
    load_snapshot(folder)


def test_a_snapshot_that_was_broken_off_is_none(directory: ShardDirectory) -> None:
    """A snapshot that was being written when the server was killed is not looked at, and the next one replaces it."""
    shard = played(directory)
    writer = SnapshotWriter(directory, shard.rotate())
    writer.add(0, shard.shard.fragments[0].copied())
    assert recovered(shard).snapshot is None
    assert_same_state(shard.shard, recovered(shard).shard)
    write_snapshot(shard)
    assert recovered(shard).snapshot is not None


def test_damage_in_the_middle_of_the_journal_is_named(directory: ShardDirectory) -> None:
    """A damaged file that others follow stops the start, with what is damaged and what can be done."""
    shard = played(directory)
    first = directory.segment_path(1)
    shard.rotate()
    push_rounds(shard, 5, 5)
    with (
        flipped(first, first.stat().st_size - 50, 1),
        pytest.raises(StorageError, match=r"damaged after record \d+.*paceline repair"),
    ):
        recovered(shard)
    assert_same_state(shard.shard, recovered(shard).shard)


def test_a_missing_file_of_the_journal_is_named(directory: ShardDirectory) -> None:
    """A file that is gone stops the start, whether others follow or a snapshot needs it."""
    shard = played(directory)
    middle = shard.rotate()
    push_rounds(shard, 5, 5)
    shard.rotate()
    push_rounds(shard, 6, 6)
    moved = directory.path / "moved.db"
    shutil.move(directory.segment_path(middle), moved)
    with pytest.raises(StorageError, match="does not exist"):
        recovered(shard)
    shutil.move(moved, directory.segment_path(middle))
    number = write_snapshot(shard)
    shard.close()
    directory.segment_path(number).unlink()
    for number in directory.segment_numbers():
        directory.segment_path(number).unlink()
    with pytest.raises(StorageError, match="is in no file"):
        recovered(shard)


def test_changed_coefficients_count_from_where_they_changed(directory: ShardDirectory) -> None:
    """What was decided under the old rate is replayed with it; the new one counts from the restart on."""
    shard = played(directory)
    faster = CONFIG.model_copy(update={"outer": CONFIG.outer.model_copy(update={"lr": 0.1})})
    found = recovered(shard, faster)
    assert_same_state(shard.shard, found.shard)
    assert found.config == config_from_mapping(kept_config(CONFIG))
    assert found.shard.coefficients(0)[0] == 0.1


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"shards": 2}, "divided among 1 shards.*paceline reshard"),
        ({"exchange": {"fragment_elements": 1024}}, "cut into fragments of 512 elements"),
        ({"outer": {"rule": "sgd"}}, "cannot change to it in a run that has begun"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(
    directory: ShardDirectory, change: dict[str, object], sentence: str
) -> None:
    """What is fixed once a run has begun cannot be changed by a restart, and the text says what can be done."""
    shard = played(directory)
    mapping = {"exchange": {"fragment_elements": 512}, "schedule": {"quota": 2}, **change}
    with pytest.raises(StorageError, match=sentence):
        recovered(shard, config_from_mapping(mapping))


def test_an_upload_that_broke_off_may_be_begun_again(directory: ShardDirectory) -> None:
    """A second upload's parameters count, not what came of the first."""
    shard = PlayedShard(directory)
    shard.initialize(seed=50)
    shard.initialize(seed=60)
    assert_same_state(shard.shard, recovered(shard).shard)


def test_records_are_read_from_any_one_on(directory: ShardDirectory) -> None:
    """The journal can be read from the middle, across files, without gaps."""
    shard = played(directory)
    shard.rotate()
    push_rounds(shard, 5, 5)
    newest = shard.newest_record
    shard.close()
    for first in (1, 2, newest - 1, newest):
        assert [number for number, _ in read_records(directory, first)] == list(range(first, newest + 1))


def test_a_directory_serves_one_process_at_a_time(directory: ShardDirectory) -> None:
    """A second process is told who holds the directory."""
    directory.create()
    with directory.locked(), pytest.raises(StorageError, match="is in use by process"), directory.locked():
        pass
    with directory.locked():
        pass


def misfits() -> dict[str, tuple[bool, Record]]:
    """Records that are whole and do not fit what is before them, and whether that is a run with parameters."""
    decision = Decision(outcome=Outcome.APPLIED, reason="")
    entering = Contribution(bins_late=0, share=1.0, bin=0, place=0, quota=1)
    decided = Decided(fragment=0, time_s=1.0, push=None, decision=decision, ledger=Ledger())
    payload = torch.zeros(8, dtype=torch.uint8)
    return {
        "a decision before the parameters": (False, decided),
        "a decision about another shard's fragment": (True, replace(decided, fragment=99)),
        "a push without its payload": (True, replace(decided, decision=replace(decision, contribution=entering))),
        "a payload without its push": (True, replace(decided, codec="int4", payload=payload)),
        "an unknown codec": (True, replace(decided, codec="int5", payload=payload)),
        "bins that close again": (True, replace(decided, decision=replace(decision, bins_opened_before=-1))),
        "first values of no fragment": (True, FragmentInitialized(fragment=99, payload=payload)),
        "first values of another size": (True, FragmentInitialized(fragment=1, payload=payload)),
    }


@pytest.mark.parametrize("kind", misfits())
def test_a_record_that_does_not_fit_is_named(directory: ShardDirectory, kind: str) -> None:
    """It ends the journal as damage does: recovery names the last good record, and repair can go back to it."""
    begun, record = misfits()[kind]
    shard = played(directory) if begun else PlayedShard(directory)
    good = shard.newest_record
    shard.append(record)
    shard.close()
    with pytest.raises(
        StorageError, match=rf"after record {good}, .* record {good + 1} does not fit .*paceline repair"
    ):
        recover(directory, CONFIG)
    found = examine(directory)
    assert found.good == good
    if not begun:
        with pytest.raises(StorageError, match="has no parameters yet"):
            restore(directory, found)
        return
    restore(directory, found)
    assert_same_state(shard.shard, recover(directory, CONFIG).shard)


def test_a_snapshot_of_another_division_is_refused(directory: ShardDirectory) -> None:
    """Its fragments must be those that its configuration gives the shard."""
    shard = played(directory)
    number = shard.rotate()
    shard.close()
    config = kept_config(CONFIG.model_copy(update={"shards": 2}))
    write_state(directory, shard.shard, number=number, time_s=1.0, config=config)
    with pytest.raises(StorageError, match="is of 1 shards, and its configuration of 2"):
        recover(directory, CONFIG)


def forge_shards(folder: Path) -> None:
    """Say that there are no shards, with a checksum that fits."""
    path = folder / "snapshot.json"
    head = path.read_bytes().rpartition(b'"crc32":')[0].replace(b'"num_shards":1', b'"num_shards":0')
    path.write_bytes(head + b'"crc32":' + str(zlib.crc32(head)).encode() + b"}")


def leave_out_checksums(folder: Path) -> None:
    """Leave all checksums out."""
    path = folder / "snapshot.json"
    said = json.loads(path.read_bytes())
    del said["crc32"]
    path.write_text(json.dumps({**said, "files": {}}))


def forge_fragment(folder: Path, vectors: dict[str, torch.Tensor]) -> None:
    """Write other vectors, with checksums that fit."""
    name = "fragment-000000.safetensors"
    data = (folder / name).read_bytes()
    metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    data = safetensors.torch.save(vectors, metadata)
    (folder / name).write_bytes(data)
    path = folder / "snapshot.json"
    said = json.loads(path.read_bytes())
    said["files"][name] = {"num_bytes": len(data), "crc32": zlib.crc32(data)}
    del said["crc32"]
    head = json.dumps(said, separators=(",", ":")).encode()[:-1] + b","
    path.write_bytes(head + b'"crc32":' + str(zlib.crc32(head)).encode() + b"}")


FORGERIES: dict[str, tuple[Callable[[Path], None], str]] = {
    "no shards": (forge_shards, "there is no shard 0 among 0"),
    "no checksums": (leave_out_checksums, "its checksum does not fit"),
    "numbers of another type": (
        lambda folder: forge_fragment(folder, {"w": torch.zeros(512, dtype=torch.int64)}),
        "w is torch.int64",
    ),
    "no parameters": (lambda folder: forge_fragment(folder, {"u": torch.zeros(512)}), "it has no parameters"),
}


@pytest.mark.parametrize("kind", FORGERIES)
def test_a_snapshot_that_says_nonsense_is_refused(directory: ShardDirectory, kind: str) -> None:
    """Whatever its checksums are."""
    shard = played(directory)
    number = write_snapshot(shard)
    forge, sentence = FORGERIES[kind]
    forge(directory.snapshot_path(number))
    with pytest.raises(StorageError, match=sentence):
        load_snapshot(directory.snapshot_path(number))
