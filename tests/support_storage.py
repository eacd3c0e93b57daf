"""Makes journals and snapshots for tests: records of all kinds, and a shard that is played without sockets."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from hypothesis import strategies as st

from paceline_server.config import ServerConfig
from paceline_server.construction import build_shard
from paceline_server.departures import GoneWorker
from paceline_server.guard import checked_norm
from paceline_server.journal import (
    Configured,
    Decided,
    FragmentInitialized,
    Initialized,
    MembershipChanged,
    Record,
)
from paceline_server.ledger import Answer, Decision, Ledger, Outcome, PushRequest
from paceline_server.membership import Member, MembershipState
from paceline_server.quarantine import QuarantinedWorker
from paceline_server.rules.base import Contribution
from paceline_server.settings import config_from_mapping
from paceline_server.shard import Shard
from paceline_server.storage.directory import ShardDirectory
from paceline_server.storage.segment import SegmentWriter, Sync
from paceline_server.storage.store import kept_config
from paceline_wire import codecs
from paceline_wire.manifest import Manifest, TensorSpec
from support_core import normal

SIZE = 1000
CONFIG = config_from_mapping({"exchange": {"fragment_elements": 512}, "schedule": {"quota": 2}})
MANIFEST = Manifest.of([TensorSpec(name="x", shape=(SIZE,), dtype="float32", role="parameter")], 512)

_names = st.text(min_size=1, max_size=8)
_counts = st.integers(min_value=0, max_value=2**62)
_times = st.floats(allow_nan=False, allow_infinity=False)
_answers = st.builds(
    Answer,
    worker=_names,
    incarnation=_counts,
    seq=_counts,
    bin=_counts,
    bins_late=_counts,
    refusal=st.none() | st.text(max_size=20),
)
_contributions = st.builds(
    Contribution, bins_late=_counts, share=_times, bin=_counts, place=_counts, quota=st.integers(1, 2**31)
)
_decisions = st.builds(
    Decision,
    outcome=st.sampled_from(Outcome),
    bins_opened_before=_counts,
    contribution=st.none() | _contributions,
    bins_opened_after=_counts,
    answers=st.lists(_answers, max_size=3).map(tuple),
    reason=st.text(max_size=20),
)
_ledgers = st.builds(
    Ledger,
    open_bin=_counts,
    issuing_bin=_counts,
    quota=st.none() | st.integers(1, 2**31),
    tokens=st.dictionaries(_names, _counts, max_size=3),
    contributors=st.frozensets(_names, max_size=3),
    waiting=st.dictionaries(_names, st.lists(_answers, max_size=2).map(tuple), max_size=2),
    answered=st.dictionaries(_names, _answers, max_size=3),
    bin_began_s=st.none() | _times,
)
_payloads = st.binary(max_size=64).map(lambda data: torch.tensor(list(data), dtype=torch.uint8))
_pushes = st.builds(
    PushRequest,
    worker=_names,
    incarnation=_counts,
    seq=_counts,
    base_bin=_counts,
    problem=st.none() | st.text(max_size=20),
    tokens=st.none() | _counts,
)
_members = st.builds(
    Member, worker=_names, incarnation=_counts, index=st.integers(0, 99), seen_s=_times, inner_step_s=st.none() | _times
)

_gone = st.builds(GoneWorker, worker=_names, incarnation=_counts, gone_s=_times, left=st.booleans())
_quarantined = st.builds(QuarantinedWorker, worker=_names, reason=st.text(max_size=20), remaining_s=_times)

records: st.SearchStrategy[Record] = st.one_of(
    st.builds(
        Decided,
        fragment=st.integers(0, 99),
        time_s=_times,
        push=_pushes,
        decision=_decisions,
        ledger=_ledgers,
        codec=st.just("int4"),
        payload=_payloads,
        norm=st.none() | st.floats(0, 1e38),
    ),
    st.builds(
        Decided, fragment=st.integers(0, 99), time_s=_times, push=st.none(), decision=_decisions, ledger=_ledgers
    ),
    st.builds(FragmentInitialized, fragment=st.integers(0, 99), payload=_payloads),
    st.builds(
        Initialized,
        manifest=st.just(MANIFEST),
        initialization_id=st.integers(1, 2**63),
        shard=st.integers(0, 9),
        num_shards=st.integers(1, 9),
    ),
    st.builds(
        MembershipChanged,
        time_s=_times,
        membership=st.builds(
            MembershipState,
            members=st.lists(_members, max_size=3).map(tuple),
            newest_incarnation=st.dictionaries(_names, _counts, max_size=3),
            most_active=st.integers(0, 99),
            gone=st.lists(_gone, max_size=3).map(tuple),
            quarantined=st.lists(_quarantined, max_size=3).map(tuple),
        ),
    ),
    st.builds(Configured, config=st.dictionaries(_names, st.dictionaries(_names, _counts | st.text(), max_size=2))),
)
"""Records of all kinds, with any content."""


def assert_same_record(expected: Record, actual: Record) -> None:
    """Compare two records, their numbers included."""
    if isinstance(expected, Decided | FragmentInitialized) and type(expected) is type(actual):
        assert isinstance(actual, Decided | FragmentInitialized)
        left, right = expected.payload, actual.payload
        assert (left is None) == (right is None)
        assert left is None or right is None or torch.equal(left, right)
        expected_rest = {name: value for name, value in vars(expected).items() if name != "payload"}
        assert expected_rest == {name: value for name, value in vars(actual).items() if name != "payload"}
        return
    assert expected == actual


class PlayedShard:
    """A shard without sockets whose decisions are written to a journal in the way of the engine.

    Args:
        directory: Where the journal is.
        config: The run's configuration.
    """

    def __init__(self, directory: ShardDirectory, config: ServerConfig = CONFIG) -> None:
        directory.create()
        self.directory = directory
        self.shard: Shard = build_shard(config, directory.index)
        self.now_s = 0.0
        self._first = 1
        self._writer: SegmentWriter | None = None
        self.append(Configured(config=kept_config(config)))

    def initialize(self, seed: int = 1) -> None:
        """Give the shard parameters."""
        self.shard.take_manifest(MANIFEST, 7)
        shard = self.shard
        self.append(Initialized(manifest=MANIFEST, initialization_id=7, shard=shard.index, num_shards=shard.num_shards))
        exact = codecs.codec("fp32")
        for index, hosted in self.shard.fragments.items():
            values = normal(hosted.plan.num_elements, seed + index)
            number = self.append(FragmentInitialized(fragment=index, payload=codecs.encode(exact, values)))
            self.shard.initialize_fragment(index, values)
            hosted.record = number

    def join(self, worker: str, incarnation: int = 1) -> None:
        """Make a worker active."""
        self.shard.membership.join(self.now_s, worker, incarnation)
        self.append(MembershipChanged(time_s=self.now_s, membership=self.shard.membership.state(self.now_s)))

    def push(self, worker: str, seq: int, fragment: int, *, codec: str = "int4", seed: int = 0) -> None:
        """Let a push arrive, be kept, and be applied."""
        self.now_s += 0.5
        hosted, values = self.shard.hosted(fragment)
        written = codecs.codec(codec)
        payload = codecs.encode(written, normal(hosted.plan.num_elements, seed))
        norm = checked_norm(written, payload, hosted.plan.num_elements)
        request = PushRequest(worker=worker, incarnation=1, seq=seq, base_bin=hosted.ledger.issuing_bin)
        decision, ledger = self.shard.decide_push(self.now_s, fragment, request)
        number = self.append(
            Decided(
                fragment=fragment,
                time_s=self.now_s,
                push=request,
                decision=decision,
                ledger=ledger,
                codec=codec,
                payload=payload,
                norm=norm,
            )
        )
        values.follow(decision, written, payload)
        self.shard.keep(fragment, decision, ledger, worker, norm)
        hosted.record = number

    @property
    def newest_record(self) -> int:
        """The number of the newest record."""
        return self._open().next_number - 1

    def rotate(self) -> int:
        """Begin a new file of the journal; returns the number of its first record."""
        self._first = self._open().next_number
        self.close()
        self._open()
        return self._first

    def close(self) -> None:
        """Let go of the journal, so that it can be read; the next record opens it again."""
        if self._writer is not None:
            self._writer.close()
        self._writer = None

    def _open(self) -> SegmentWriter:
        if self._writer is None:
            self._writer = SegmentWriter(self.directory.segment_path(self._first), self._first, Sync.COMMIT)
        return self._writer

    def append(self, record: Record) -> int:
        """Write any record; returns its number."""
        return self._open().append([record])[0]


def assert_same_state(expected: Shard, actual: Shard) -> None:
    """Compare two shards, bit for bit."""
    assert expected.manifest == actual.manifest
    assert expected.initialization_id == actual.initialization_id
    assert expected.fragments.keys() == actual.fragments.keys()
    for index, hosted in expected.fragments.items():
        other = actual.fragments[index]
        assert hosted.ledger == other.ledger
        assert hosted.norms == other.norms
        assert (hosted.values is None) == (other.values is None)
        if hosted.values is None or other.values is None:
            continue
        assert (hosted.values.open_bin, hosted.values.newest) == (other.values.open_bin, other.values.newest)
        assert hosted.values.vectors.keys() == other.values.vectors.keys()
        for name, vector in hosted.values.vectors.items():
            assert torch.equal(vector, other.values.vectors[name])
    members = [(member.worker, member.incarnation, member.index) for member in expected.membership.members]
    assert members == [(member.worker, member.incarnation, member.index) for member in actual.membership.members]


@contextmanager
def flipped(path: Path, position: int, bit: int) -> Iterator[None]:
    """A file with one bit turned, for as long as the context lasts."""
    original = path.read_bytes()
    damaged = bytearray(original)
    damaged[position] ^= 1 << bit
    path.write_bytes(damaged)
    try:
        yield
    finally:
        path.write_bytes(original)
