"""The verdict of chaos: it finds what was lost, doubled or changed, and nothing where all is well."""

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from paceline_chaos.testimony import Acknowledged, PushKey, Sent, WitnessLogs, acknowledged_line, sent_line
from paceline_chaos.verdict import Verdict, Verifier
from paceline_server.journal import Decided
from paceline_server.storage.directory import ShardDirectory
from paceline_server.storage.recovery import read_records
from paceline_server.storage.segment import SegmentWriter, Sync
from paceline_server.storage.snapshot import SnapshotWriter
from paceline_server.storage.store import kept_config
from paceline_wire import codecs
from support_core import normal
from support_storage import CONFIG, PlayedShard


class WitnessedShard:
    """A played shard with a witness who writes down everything that it pushes.

    Args:
        folder: Where the data directory and the log are.
    """

    def __init__(self, folder: Path) -> None:
        self.log = folder / "a.1.jsonl"
        self.verifier = Verifier(folder / "data", WitnessLogs(folder))
        self.directory = ShardDirectory(folder / "data", 0)
        self.played = PlayedShard(self.directory)
        self.played.initialize()
        self.played.join("a")
        self.seqs = dict.fromkeys(self.played.shard.fragments, 0)

    def push(self, fragment: int, *, acknowledged: bool = True, **doctored: Any) -> PushKey:
        """Let the witness push, and write it down; what is doctored is written down otherwise than it was."""
        self.seqs[fragment] += 1
        seq, hosted = self.seqs[fragment], self.played.shard.fragments[fragment]
        payload = codecs.encode(codecs.codec("int4"), normal(hosted.plan.num_elements, seq))
        base_bin = hosted.ledger.issuing_bin
        key = PushKey("a", 1, fragment, seq)
        truth = {"base_bin": base_bin, "codec": "int4", "crc32": zlib.crc32(payload.numpy().data), "payload": None}
        self.write(sent_line(key, Sent(**{**truth, **doctored})))
        self.played.push("a", seq, fragment, seed=seq)
        if acknowledged:
            self.write(acknowledged_line(key, Acknowledged(bins_late=0, refusal=None)))
        return key

    def write(self, line: dict[str, Any]) -> None:
        """Add a line to the log."""
        with self.log.open("a") as log:
            log.write(json.dumps(line) + "\n")

    def decided(self) -> list[tuple[int, Decided]]:
        """The decisions in the journal."""
        self.played.close()
        return [(number, record) for number, record in read_records(self.directory) if isinstance(record, Decided)]

    def append(self, record: Decided) -> None:
        """Put a record at the end of the journal, behind the shard's back."""
        self.played.close()
        first = self.directory.segment_numbers()[-1]
        writer = SegmentWriter(self.directory.segment_path(first), first, Sync.COMMIT)
        writer.append([record])
        writer.close()

    def snapshot(self) -> None:
        """Write a snapshot of the state as it is in memory."""
        shard = self.played.shard
        number = self.played.rotate()
        writer = SnapshotWriter(self.directory, number)
        for index, hosted in shard.fragments.items():
            writer.add(index, hosted.copied())
        assert shard.manifest is not None
        writer.finish(
            shard.manifest,
            shard=0,
            num_shards=1,
            initialization_id=shard.initialization_id,
            time_s=self.played.now_s,
            membership_record=number - 1,
            membership=shard.membership.state(0.0),
            config=kept_config(CONFIG),
        )

    def look(self) -> Verdict:
        """The verdict."""
        self.played.close()
        return self.verifier.look()


@pytest.fixture
def shard(tmp_path: Path) -> WitnessedShard:
    """A shard to which a witness has pushed three rounds."""
    witnessed = WitnessedShard(tmp_path)
    for _ in range(3):
        for fragment in witnessed.seqs:
            witnessed.push(fragment)
    return witnessed


def test_what_is_whole_is_found_whole(shard: WitnessedShard) -> None:
    """Every acknowledged push is found, the closed form fits, and nothing is wrong; look after look."""
    verdict = shard.look()
    assert verdict.lost == []
    assert (verdict.sent, verdict.acknowledged, verdict.found, verdict.in_flight) == (6, 6, 6, 0)
    assert verdict.distance is not None
    assert verdict.distance < 2e-5
    shard.snapshot()
    shard.push(0)
    shard.push(1, acknowledged=False)
    verdict = shard.look()
    assert verdict.lost == []
    assert (verdict.sent, verdict.acknowledged, verdict.found, verdict.in_flight) == (8, 7, 7, 1)


def a_lost_push(shard: WitnessedShard) -> str:
    """A push was acknowledged that the journal does not have."""
    key = PushKey("a", 1, 0, 4)
    shard.write(sent_line(key, Sent(base_bin=0, codec="int4", crc32=1, payload=None)))
    shard.write(acknowledged_line(key, Acknowledged(bins_late=0, refusal=None)))
    return "push 4 of worker a (incarnation 1) to fragment 0 was acknowledged and is not in the journal"


def a_doubled_push(shard: WitnessedShard) -> str:
    """A push is applied by two records."""
    number, record = shard.decided()[-1]
    shard.append(record)
    return f"is in the journal twice, as record {number} and {number + 1}"


def a_changed_payload(shard: WitnessedShard) -> str:
    """The journal has other bytes than were sent."""
    shard.push(0, crc32=12345)
    return "push 4 of worker a (incarnation 1) to fragment 0 is in the journal with another payload than was sent"


def a_changed_bin(shard: WitnessedShard) -> str:
    """The journal names another bin than the worker did."""
    shard.push(0, base_bin=7)
    return "; 7 was sent"


def a_changed_bit(shard: WitnessedShard) -> str:
    """Recovery gives one element another last bit."""
    values = shard.played.shard.fragments[1].values
    assert values is not None
    values.w.view(torch.int32)[5] ^= 1
    shard.snapshot()
    return "1 elements of w of fragment 1 were recovered in other bits"


def a_push_of_nobody(shard: WitnessedShard) -> str:
    """The journal has a push that no witness sent."""
    shard.played.push("stranger", 1, 0)
    return "push 1 of worker stranger (incarnation 1) to fragment 0 is in the journal, and no worker sent it"


def a_push_that_was_never_answered(shard: WitnessedShard) -> str:
    """A push is in the journal that was not acknowledged, though its worker went on."""
    shard.push(0, acknowledged=False)
    shard.push(0)
    return "push 4 of worker a (incarnation 1) to fragment 0 is in the journal and was never acknowledged"


def a_refused_push_that_counts(shard: WitnessedShard) -> str:
    """A push was refused, and applied."""
    key = shard.push(0, acknowledged=False)
    shard.write(acknowledged_line(key, Acknowledged(bins_late=0, refusal="it is not finite")))
    return "push 4 of worker a (incarnation 1) to fragment 0 was refused, and the journal applies it"


@pytest.mark.parametrize(
    "doctor",
    [
        a_lost_push,
        a_doubled_push,
        a_changed_payload,
        a_changed_bin,
        a_changed_bit,
        a_push_of_nobody,
        a_push_that_was_never_answered,
        a_refused_push_that_counts,
    ],
)
def test_what_is_wrong_is_found(shard: WitnessedShard, doctor: Callable[[WitnessedShard], str]) -> None:
    """Whatever is lost, doubled, changed or invented is named, at the first look and after one that was well."""
    assert shard.look().lost == []
    expected = doctor(shard)
    assert [sentence for sentence in shard.look().lost if expected in sentence]


def test_a_decision_that_the_ledger_does_not_demand_is_found(shard: WitnessedShard) -> None:
    """A record whose push entered in another bin than it had to is named, and the closed form does not fit."""
    _, record = shard.decided()[-1]
    assert record.push is not None
    next_push = PushKey("a", 1, record.fragment, record.push.seq + 1)
    shard.write(sent_line(next_push, Sent(base_bin=record.push.base_bin, codec="int4", crc32=0, payload=None)))
    forged = Decided(**{**vars(record), "push": record.push.__class__(**{**vars(record.push), "seq": next_push.seq})})
    shard.append(forged)
    assert [sentence for sentence in shard.look().lost if "decides otherwise" in sentence]


def test_a_directory_that_cannot_be_read_is_no_loss_of_pushes(shard: WitnessedShard) -> None:
    """Where a server still holds the directory, that is all that is said; the next look finds all."""
    shard.played.close()
    with shard.directory.locked():
        (sentence,) = shard.look().lost
        assert "is in use by process" in sentence
    assert shard.look().lost == []


def test_a_line_that_is_not_finished_is_left_for_later(tmp_path: Path) -> None:
    """A witness that is killed in the middle of a line has not said it."""
    testimony = WitnessLogs(tmp_path)
    line = json.dumps(acknowledged_line(PushKey("a", 1, 0, 1), Acknowledged(bins_late=0, refusal=None)))
    log = tmp_path / "a.1.jsonl"
    log.write_text(line[:-5])
    testimony.refresh()
    assert not testimony.acknowledged
    log.write_text(line + "\n")
    testimony.refresh()
    assert testimony.pushes_of == {"a": 1}
