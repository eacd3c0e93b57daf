"""From a shard's directory back to its state: the newest snapshot that is whole, and every record after it.

The numbers come out in the same bits, since they are changed by the same decisions, in the same order, by the same code
as when the shard ran. Fragments are independent, so several are replayed at once; the records of each stay in order.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from paceline_server.config import ServerConfig
from paceline_server.construction import build_shard, rule_of
from paceline_server.journal import (
    Decided,
    FragmentInitialized,
    Initialized,
    MembershipChanged,
    Record,
)
from paceline_server.shard import Counters, Shard
from paceline_server.storage.directory import ShardDirectory
from paceline_server.storage.segment import DamagedSegmentError, read_segment, unfinished_bytes
from paceline_server.storage.snapshot import LoadedSnapshot, load_snapshot
from paceline_wire import codecs
from paceline_wire.errors import PacelineError, StorageError

_log = logging.getLogger(__name__)

_MOST_AHEAD = 4
"""Records that are read ahead of the numbers, for each thread: enough to keep it busy, few enough to bound memory."""

_REPAIR = "`paceline repair DATA_DIR` shows what can be done"


@dataclass(kw_only=True)
class Recovered:
    """A shard as its directory has it.

    Attributes:
        shard: Its state; without a manifest if the directory was empty.
        config: The configuration that the newest records were made with; None if there are none.
        newest_record: The number of the newest record; 0: none.
        time_s: The newest moment that the directory tells of, in seconds of the engine's clock.
        snapshot: The number of the snapshot that it began from; None if from none.
        replayed: Records that were replayed.
        took_s: Seconds that it took.
        notes: What the operator should know, in sentences.
    """

    shard: Shard
    config: ServerConfig | None = None
    newest_record: int = 0
    time_s: float = 0.0
    snapshot: int | None = None
    replayed: int = 0
    took_s: float = 0.0
    notes: list[str] = field(default_factory=list)


def recover(directory: ShardDirectory, config: ServerConfig | None = None) -> Recovered:
    """Bring a shard's state back. The caller holds the directory's lock.

    Args:
        directory: The shard's directory.
        config: What the shard will be run with; None: as it was run last, to look at it.

    Raises:
        StorageError: The directory is damaged, or its run does not fit the configuration; the text says what and what
            can be done.
    """
    began_s = time.perf_counter()
    # As many as the server uses: sums over a tensor round differently with another number of threads.
    torch.set_num_threads(1)
    replay = _Replay(directory, config or ServerConfig())
    replay.begin_from(_newest_snapshot(directory, replay.recovered.notes))
    for number, record in read_records(directory, replay.first):
        replay.take(number, record)
    recovered = replay.finish(config)
    recovered.took_s = time.perf_counter() - began_s
    return recovered


def recover_what_is_whole(directory: ShardDirectory) -> tuple[Recovered, StorageError | None]:
    """Bring a shard's state back up to the first damage, which is returned too. The caller holds the directory's lock.

    Raises:
        StorageError: Nothing can be brought back.
    """
    torch.set_num_threads(1)
    replay = _Replay(directory, ServerConfig())
    replay.begin_from(_newest_snapshot(directory, replay.recovered.notes))
    damage: StorageError | None = None
    try:
        for number, record in read_records(directory, replay.first):
            replay.take(number, record)
    except DamagedSegmentError as error:
        damage = error
    return replay.finish(None), damage


def _newest_snapshot(directory: ShardDirectory, notes: list[str]) -> LoadedSnapshot | None:
    """The newest snapshot that is whole; what is wrong with newer ones is added to the notes.

    Raises:
        StorageError: There are snapshots, none of them is whole, and the journal does not reach back to the beginning.
    """
    problems = []
    for number in reversed(directory.snapshot_numbers()):
        try:
            loaded = load_snapshot(directory.snapshot_path(number))
        except StorageError as error:
            problems.append(str(error))
        else:
            notes += [f"{problem}; an older snapshot is used" for problem in problems]
            return loaded
    if problems and 1 not in directory.segment_numbers():
        raise StorageError(f"no snapshot is whole: {problems[0]}; {_REPAIR}")
    notes += [f"{problem}; the whole journal is replayed" for problem in problems]
    return None


def read_records(directory: ShardDirectory, first: int = 1) -> Iterator[tuple[int, Record]]:
    """Read the journal from a record on, in order, with the records' numbers. The caller holds the directory's lock.

    Raises:
        DamagedSegmentError: A record is missing, or is not what was written; the text says what can be done.
    """
    segments = directory.segment_numbers()
    begun = [number for number in segments if number <= first]
    if not begun and (segments or first > 1):
        raise DamagedSegmentError(directory.journal, first - 1, f"record {first} is in no file; {_REPAIR}")
    expected = begun[-1] if begun else first
    for number in segments[len(begun) - 1 if begun else 0 :]:
        if number != expected:
            missing = directory.segment_path(expected)
            raise DamagedSegmentError(
                missing, expected - 1, f"the file does not exist, and {number} follows; {_REPAIR}"
            )
        try:
            for found, record in read_segment(directory.segment_path(number), number):
                expected = found + 1
                if found >= first:
                    yield found, record
        except DamagedSegmentError as error:
            raise DamagedSegmentError(error.path, error.good, f"{error.reason}; {_REPAIR}") from error


class _Replay:
    """Takes records in order and gives their numbers to threads, one for each group of fragments."""

    def __init__(self, directory: ShardDirectory, config: ServerConfig) -> None:
        self.first = 1
        self.recovered = Recovered(shard=build_shard(config, directory.index))
        self._directory = directory
        self._shard = self.recovered.shard
        self._membership_record = 0
        self._lanes = [ThreadPoolExecutor(1, "paceline-replay") for _ in range(os.cpu_count() or 1)]
        self._ahead: list[list[Future[None]]] = [[] for _ in self._lanes]
        unfinished = {path.name: unfinished_bytes(path) for path in self._segment_paths()}
        for name, num_bytes in unfinished.items():
            if num_bytes:
                self.recovered.notes.append(
                    f"{name}: a commit that was not finished when the server ended was undone ({num_bytes} bytes); "
                    "it was not acknowledged"
                )

    def begin_from(self, snapshot: LoadedSnapshot | None) -> None:
        """Take up a snapshot.

        Raises:
            StorageError: It is of another shard, or does not fit its own configuration.
        """
        if snapshot is None:
            return
        meta = snapshot.meta
        self._require_place(meta.shard, meta.num_shards)
        self._use_config(meta.config)
        self._shard.take_manifest(snapshot.manifest, meta.initialization_id)
        if self._shard.fragments.keys() != snapshot.fragments.keys():
            raise StorageError(
                f"snapshot {meta.number} in {self._directory.path} is of {meta.num_shards} shards, and its "
                f"configuration of {self._shard.num_shards}; {_REPAIR}"
            )
        for index in self._shard.fragments:
            self._shard.restore_fragment(index, snapshot.fragments[index])
        self._shard.membership.restore(meta.membership, meta.time_s)
        self._membership_record = meta.membership_record
        self.recovered.time_s = meta.time_s
        self.recovered.snapshot = self.first = meta.number
        self.recovered.newest_record = meta.number - 1

    def take(self, number: int, record: Record) -> None:
        """Replay one record.

        Raises:
            DamagedSegmentError: It does not fit what came before.
            StorageError: The run is of another shard, or its configuration does not fit this version.
        """
        try:
            self._take(number, record)
        except StorageError:
            raise
        except (PacelineError, LookupError, ValueError) as error:
            reason = f"record {number} does not fit what came before it: {error}; {_REPAIR}"
            raise DamagedSegmentError(self._directory.journal, number - 1, reason) from error

    def _take(self, number: int, record: Record) -> None:
        if isinstance(record, Decided):
            self._take_decision(number, record)
        elif isinstance(record, FragmentInitialized):
            self._take_first_values(number, record)
        elif isinstance(record, MembershipChanged):
            self._note_time(record.time_s)
            if number > self._membership_record:
                self._shard.membership.restore(record.membership, record.time_s)
        elif isinstance(record, Initialized):
            self._require_place(record.shard, record.num_shards)
            self._wait()
            self._shard.take_manifest(record.manifest, record.initialization_id)
        else:
            self._wait()
            self._use_config(record.config)
        self.recovered.newest_record = number
        self.recovered.replayed += 1

    def finish(self, config: ServerConfig | None) -> Recovered:
        """The state after the last record; from here on under the configuration, if there is one."""
        self._wait()
        for lane in self._lanes:
            lane.shutdown()
        shard = self._shard
        shard.counters, shard.pushes_by_worker = Counters(), {}
        included = max((hosted.record for hosted in shard.fragments.values()), default=self._membership_record)
        if included > self.recovered.newest_record and config is not None:
            # Numbers must never be given out twice: replay would take the second for the first.
            raise DamagedSegmentError(
                self._directory.journal, self.recovered.newest_record, f"the snapshot includes {included}; {_REPAIR}"
            )
        self.recovered.newest_record = max(self.recovered.newest_record, included, self._membership_record)
        if config is not None:
            self._require_config(config)
            shard.num_shards = config.shards
            shard.take_rule(*rule_of(config))
        return self.recovered

    def _take_decision(self, number: int, record: Decided) -> None:
        self._note_time(record.time_s)
        hosted, values = self._shard.hosted(record.fragment)
        if number <= hosted.record:
            return
        codec = None if record.codec is None else codecs.codec(record.codec)
        payload, decision = record.payload, record.decision
        if min(decision.bins_opened_before, decision.bins_opened_after) < 0:
            raise ValueError("it opens less than no bins")
        if (decision.contribution is None) != (codec is None):
            raise ValueError("it has a contribution without a push, or a push that contributes nothing")
        if codec is not None and payload is not None:
            codec.check(payload, self._shard.push_elements(record.fragment))
        self._in_lane(record.fragment, lambda: values.follow(decision, codec, payload))
        self._shard.keep(
            record.fragment,
            decision,
            record.ledger,
            record.push.worker if record.push is not None else None,
            record.norm,
        )
        hosted.record = number

    def _take_first_values(self, number: int, record: FragmentInitialized) -> None:
        fragment = self._shard.fragments[record.fragment]
        if number <= fragment.record:
            return
        values = codecs.decode(codecs.codec("fp32"), record.payload, fragment.plan.num_elements)
        self._shard.initialize_fragment(record.fragment, values)
        fragment.record = number

    def _in_lane(self, fragment: int, work: Callable[[], None]) -> None:
        # Fragments of a shard are num_shards apart, so the index itself would leave lanes empty.
        lane = (fragment // self._shard.num_shards) % len(self._lanes)
        ahead = self._ahead[lane]
        if len(ahead) >= _MOST_AHEAD:
            ahead.pop(0).result()
        ahead.append(self._lanes[lane].submit(work))

    def _wait(self) -> None:
        """Until the numbers are where the records are."""
        for ahead in self._ahead:
            while ahead:
                ahead.pop(0).result()

    def _note_time(self, time_s: float) -> None:
        self.recovered.time_s = max(self.recovered.time_s, time_s)

    def _use_config(self, mapping: Mapping[str, Any]) -> None:
        try:
            config = ServerConfig.model_validate(mapping)
        except ValidationError as error:
            raise StorageError(
                f"the configuration that {self._directory.path} was written with does not fit this version: {error}"
            ) from error
        self.recovered.config = config
        self._shard.num_shards = config.shards
        self._shard.take_rule(*rule_of(config))

    def _require_place(self, shard: int, num_shards: int) -> None:
        if shard != self._directory.index:
            raise StorageError(
                f"{self._directory.path} holds shard {shard} of its run, not shard {self._directory.index}"
            )
        self._shard.num_shards = num_shards

    def _require_config(self, config: ServerConfig) -> None:
        """Refuse a configuration that does not fit a run that has begun."""
        if self._shard.manifest is None:
            return
        if self._shard.num_shards != config.shards:
            raise StorageError(
                f"the run in {self._directory.path} is divided among {self._shard.num_shards} shards, and shards is "
                f"{config.shards}: set it back, or divide the run anew with `paceline reshard`"
            )
        cut = self._shard.manifest.fragment_elements
        if cut != config.exchange.fragment_elements:
            raise StorageError(
                f"the run in {self._directory.path} is cut into fragments of {cut} elements, and "
                f"exchange.fragment_elements is {config.exchange.fragment_elements}; it is fixed once a run has begun"
            )

    def _segment_paths(self) -> list[Path]:
        return [self._directory.segment_path(number) for number in self._directory.segment_numbers()]
