"""A data directory: records, files of the journal, snapshots, and all of them together in recovery and repair."""

import base64
import contextlib
import json
import random
import shutil
import sqlite3
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from fuzz.mutation import changed_json, mutated_bytes, mutated_json
from fuzz.target import Target, ViolationError
from fuzz.targets.files import memory_folder
from paceline_server.live_configuration import LiveConfiguration
from paceline_server.settings import config_from_mapping, config_to_mapping
from paceline_server.storage.directory import ShardDirectory
from paceline_server.storage.encoding import Written, read_record, write_record
from paceline_server.storage.kept_settings import read_settings
from paceline_server.storage.recovery import recover
from paceline_server.storage.repair import examine, restore
from paceline_server.storage.segment import DamagedSegmentError, read_segment
from paceline_server.storage.snapshot import MANIFEST_FILE, load_snapshot
from paceline_server.storage.store import kept_config
from paceline_server.storage.writing import write_state
from paceline_wire.errors import ConfigurationError, StorageError
from support_storage import CONFIG, PlayedShard

_PATCH = struct.Struct("<IB")


def played_shard(path: Path) -> PlayedShard:
    """A run of two fragments and two workers that has taken a few pushes."""
    played = PlayedShard(ShardDirectory(path, 0))
    played.initialize()
    for worker in ("a", "b"):
        played.join(worker)
    for seq in (1, 2, 3):
        for fragment in (0, 1):
            played.push("a", seq, fragment, seed=seq)
    return played


def written_records(path: Path) -> list[Written]:
    """The records of such a run, as they are kept."""
    played = played_shard(path)
    played.close()
    return [write_record(record) for _, record in read_segment(played.directory.segment_path(1), 1)]


class SettingsTarget(Target):
    """What operators changed, as a shard's directory keeps it: taken up again as a valid configuration, or refused."""

    name: ClassVar[str] = "settings"
    inputs: ClassVar[int] = 20_000
    errors = (StorageError, ConfigurationError)

    def __init__(self) -> None:
        self._folder = memory_folder()
        self._directory = ShardDirectory(Path(self._folder.name), 0)
        self._directory.create()

    def seeds(self) -> Sequence[bytes]:
        """All that can be changed."""
        values = {"outer.lr": (0.7, 0.2), "exchange.inner_steps": (50, 9), "schedule.quota": (2, None)}
        said = {key: {"configured": configured, "value": value} for key, (configured, value) in values.items()}
        return [json.dumps(said).encode(), b"{}"]

    def mutated(self, rng: random.Random, data: bytes, other: bytes) -> bytes:
        """Node by node."""
        return mutated_json(rng, data, other)

    def run(self, data: bytes) -> str:
        """Start with it."""
        self._directory.settings.write_bytes(data)
        live = LiveConfiguration(CONFIG, read_settings(self._directory))
        if config_from_mapping(config_to_mapping(live.config)) != live.config:
            raise ViolationError("written and read, the configuration is another")
        return f"taken {sorted(live.overrides)} {len(live.notes) > 0}"

    def finish(self) -> None:
        """Remove the file."""
        self._folder.cleanup()


class RecordTarget(Target):
    """`read_record`: a record of this version, which is written again as it was, or a ValueError."""

    name: ClassVar[str] = "records"
    inputs: ClassVar[int] = 80_000
    errors = (ValueError,)

    def seeds(self) -> Sequence[bytes]:
        """A record of each kind: its kind and payload, and what it says."""
        with memory_folder() as folder:
            records = written_records(Path(folder))
        first = {record.kind: record for record in records}
        return [
            json.dumps([kind, base64.b64encode(record.payload[:64]).decode(), json.loads(record.said)]).encode()
            for kind, record in first.items()
        ]

    def mutated(self, rng: random.Random, data: bytes, other: bytes) -> bytes:
        """Node by node."""
        return mutated_json(rng, data, other)

    def run(self, data: bytes) -> str:
        """Read it; write it, and read that."""
        kind, payload, said = _record_of(data)
        record = read_record(Written(kind, said, payload))
        again = write_record(read_record(write_record(record)))
        once = write_record(record)
        if (once.kind, once.said, bytes(once.payload)) != (again.kind, again.said, bytes(again.payload)):
            raise ViolationError("written and read, the record is another")
        return f"{kind} record"


def _record_of(data: bytes) -> tuple[str, bytes, bytes]:
    """Kind, payload and JSON of an input; an input of another form is all JSON of the commonest kind."""
    try:
        kind, payload, said = json.loads(data)
        return str(kind), base64.b64decode(payload, validate=True), json.dumps(said).encode()
    except (ValueError, TypeError, RecursionError):
        return "decided", b"", data


class SegmentTarget(Target):
    """`read_segment` on a file with some bytes changed: the records that were written, up to the first damage."""

    name: ClassVar[str] = "segment"
    inputs: ClassVar[int] = 12_000
    errors = (StorageError,)

    def __init__(self) -> None:
        self._folder = memory_folder()
        played = played_shard(Path(self._folder.name) / "whole")
        played.close()
        whole = played.directory.segment_path(1)
        self._bytes = whole.read_bytes()
        self._records = [_key(record) for _, record in read_segment(whole, 1)]
        self._used = [at for at in range(0, len(self._bytes), 16) if any(self._bytes[at : at + 16])]
        self._path = Path(self._folder.name) / whole.name

    def seeds(self) -> Sequence[bytes]:
        """No change; and files that are none."""
        return [b"", b"\x01", b"\x01SQLite format 3\x00" + bytes(84), b"\x00" + _PATCH.pack(24, 4) + b"\0\0\0\1"]

    def mutated(self, rng: random.Random, data: bytes, other: bytes) -> bytes:
        """One more change where the file has something, or other changes."""
        if rng.random() < 0.3:
            return mutated_bytes(rng, data, other)
        at = rng.choice(self._used) + rng.randrange(16) if rng.random() < 0.7 else rng.randrange(200)
        piece = rng.randbytes(rng.choice((1, 2, 4)))
        return (data or b"\0") + _PATCH.pack(at, len(piece)) + piece

    def run(self, data: bytes) -> str:
        """Read it to its end or to the damage."""
        for beside in ("-journal", "-wal", "-shm"):
            self._path.with_name(self._path.name + beside).unlink(missing_ok=True)
        self._path.write_bytes(data[1:] if data[:1] == b"\x01" else _patched(self._bytes, data[1:]))
        found = []
        try:
            for number, record in read_segment(self._path, 1):
                found.append(_key(record))
                if number != len(found):
                    raise ViolationError("a number is left out")
        finally:
            if found != self._records[: len(found)]:
                raise ViolationError("a record is read that was not written")
        return f"{len(found)} records"

    def finish(self) -> None:
        """Remove the files."""
        self._folder.cleanup()


def _key(record: Any) -> tuple[str, bytes, bytes]:
    written = write_record(record)
    return written.kind, written.said, bytes(written.payload)


def _patched(data: bytes, patches: bytes) -> bytes:
    """Bytes with some replaced; an offset beyond the end cuts them there instead."""
    changed, at = bytearray(data), 0
    while at + _PATCH.size <= len(patches):
        offset, size = _PATCH.unpack_from(patches, at)
        piece = patches[at + _PATCH.size : at + _PATCH.size + size]
        at += _PATCH.size + size
        if offset >= len(changed):
            del changed[offset % (len(changed) + 1) :]
        else:
            changed[offset : offset + len(piece)] = piece
    return bytes(changed)


class SnapshotTarget(Target):
    """`load_snapshot`: with other bytes it is damaged; with other content and right checksums it is read or refused."""

    name: ClassVar[str] = "snapshot"
    inputs: ClassVar[int] = 15_000
    errors = (StorageError,)

    def __init__(self) -> None:
        self._folder = memory_folder()
        root = Path(self._folder.name)
        played = played_shard(root / "run")
        played.close()
        directory = ShardDirectory(root / "whole", 0)
        write_state(directory, played.shard, number=20, time_s=9.0, config=kept_config(CONFIG))
        self._whole = directory.snapshot_path(20)
        self._path = root / "changed" / self._whole.name
        self._files = {path.name: path.read_bytes() for path in sorted(self._whole.iterdir())}

    def seeds(self) -> Sequence[bytes]:
        """What the snapshot says of itself; and changes to each file's bytes."""
        said = {"said": json.loads(self._files[MANIFEST_FILE])}
        return [
            *[json.dumps(said).encode()] * len(self._files),
            *(json.dumps({"file": name, "at": 9, "bytes": [1], "fits": 1}).encode() for name in self._files),
            *(json.dumps({"file": name, "at": 9, "bytes": [1]}).encode() for name in self._files),
        ]

    def mutated(self, rng: random.Random, data: bytes, other: bytes) -> bytes:
        """Node by node, or another place in a file."""
        with contextlib.suppress(ValueError, TypeError, KeyError):
            change = json.loads(data)
            if rng.random() < 0.6 and change["file"] in self._files:
                change["at"] = rng.randrange(min(len(self._files[change["file"]]), rng.choice((16, 700, 1 << 20))))
                change["bytes"] = list(rng.randbytes(rng.choice((1, 1, 2, 8))))
                return json.dumps(change).encode()
        return mutated_json(rng, data, other)

    def run(self, data: bytes) -> str:
        """Change it, and read it."""
        files = dict(self._files)
        fits = self._change(files, data)
        shutil.rmtree(self._path, ignore_errors=True)
        self._path.mkdir(parents=True)
        for name, content in files.items():
            (self._path / name).write_bytes(content)
        loaded = load_snapshot(self._path)
        if not fits and files != self._files:
            raise ViolationError("bytes have changed, and nothing notices")
        return f"{len(loaded.fragments)} fragments of {loaded.meta.num_shards}"

    def _change(self, files: dict[str, bytes], data: bytes) -> bool:
        """Do as an input says; whether checksums fit all the same."""
        try:
            change = json.loads(data)
        except (ValueError, RecursionError):
            files[MANIFEST_FILE] = data
            return False
        if isinstance(change, dict) and isinstance(change.get("file"), str) and change["file"] in files:
            name, at, piece = change["file"], change.get("at"), change.get("bytes")
            if type(at) is int and isinstance(piece, list):
                octets = bytes(each % 256 for each in piece if type(each) is int)
                at %= len(files[name]) + 1
                files[name] = files[name][:at] + octets + files[name][at + len(octets) :]
            if "fits" in change and name != MANIFEST_FILE:
                said = json.loads(files[MANIFEST_FILE])
                said["files"][name] = {"num_bytes": len(files[name]), "crc32": zlib.crc32(files[name])}
                files[MANIFEST_FILE] = _with_checksum(said)
            return "fits" in change
        files[MANIFEST_FILE] = _with_checksum(change.get("said") if isinstance(change, dict) else change)
        return True

    def finish(self) -> None:
        """Remove the files."""
        self._folder.cleanup()


def _with_checksum(said: Any) -> bytes:
    """JSON as a snapshot's is written, with the checksum that fits, if it has a place for one."""
    if not isinstance(said, dict) or "crc32" not in said:
        return json.dumps(said).encode()
    rest = {key: value for key, value in said.items() if key != "crc32"}
    written = json.dumps({**rest, "crc32": 0}, separators=(",", ":")).encode()
    head = written[: written.rindex(b'"crc32":')]
    return head + b'"crc32":' + str(zlib.crc32(head)).encode() + b"}"


class RecoveryTarget(Target):
    """`recover`, `examine` and `restore` on journals whose records fit their checksums, but not each other."""

    name: ClassVar[str] = "recovery"
    inputs: ClassVar[int] = 4_000
    errors = (StorageError,)

    def __init__(self) -> None:
        self._folder = memory_folder()
        root = Path(self._folder.name)
        self._records = written_records(root / "run")
        empty = PlayedShard(ShardDirectory(root / "empty", 0))
        empty.close()
        self._segment = empty.directory.segment_path(1).read_bytes()
        self._directory = ShardDirectory(root / "changed", 0)

    def seeds(self) -> Sequence[bytes]:
        """The records' order; and each with another fragment, worker or time."""
        everything = list(range(len(self._records)))
        return [json.dumps({"records": everything}).encode(), json.dumps({"records": everything, "said": {}}).encode()]

    def mutated(self, rng: random.Random, data: bytes, other: bytes) -> bytes:
        """Another order, or one record that says something else."""
        with contextlib.suppress(ValueError, TypeError, KeyError):
            change = json.loads(data)
            order = change["records"]
            at = rng.randrange(len(order))
            kind = rng.randrange(5)
            if kind == 0:
                order.insert(at, rng.randrange(len(self._records)))
            elif kind == 1:
                del order[at]
            elif kind == 2:
                order[at], order[-1] = order[-1], order[at]
            elif kind == 3:
                del order[at + 1 :]
            else:
                index = order[at] % len(self._records)
                said = json.loads(self._records[index].said)
                change["said"] = {str(index): changed_json(rng, said, json.loads(self._records[-1].said))}
            return json.dumps(change).encode()
        return mutated_json(rng, data, other)

    def run(self, data: bytes) -> str:
        """Recover it; where that is refused, examine and restore it, and recover that."""
        shutil.rmtree(self._directory.path, ignore_errors=True)
        self._directory.create()
        self._write(list(self._changed(data)))
        try:
            recovered = recover(self._directory, CONFIG)
        except DamagedSegmentError as error:
            return f"damaged: {error.reason}; {self._restored()}"
        return f"{recovered.replayed} records, {recovered.shard.initialized}"

    def _restored(self) -> str:
        found = examine(self._directory)
        if found.problem is None or found.good is None:
            return str(found.problem)
        restored = restore(self._directory, found)
        again = recover(self._directory, CONFIG)
        if again.newest_record < restored.newest_record:
            raise ViolationError("what was restored is not what is recovered")
        return f"restored {found.good}"

    def _changed(self, data: bytes) -> Iterator[Written]:
        try:
            change = json.loads(data)
            order, said = change["records"], change.get("said", {})
            for index in order:
                record = self._records[index % len(self._records)]
                other = said.get(str(index % len(self._records)))
                if other is None or _endless(other):
                    yield record
                else:
                    yield Written(record.kind, json.dumps(other).encode(), record.payload)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return

    def _write(self, records: list[Written]) -> None:
        path = self._directory.segment_path(1)
        path.write_bytes(self._segment)
        with contextlib.closing(sqlite3.connect(path)) as connection, connection:
            connection.execute("DELETE FROM records")
            for number, (kind, said, payload) in enumerate(records, start=1):
                crc32 = zlib.crc32(payload, zlib.crc32(said, zlib.crc32(kind.encode())))
                row = (number, kind, said.decode(), bytes(payload), crc32)
                connection.execute("INSERT INTO records VALUES (?, ?, ?, ?, ?)", row)

    def finish(self) -> None:
        """Remove the files."""
        self._folder.cleanup()


def _endless(said: Any) -> bool:
    """Whether a decision opens more bins than anybody would wait for; only a journal that lies on purpose says so."""
    decision = said.get("decision") if isinstance(said, dict) else None
    if not isinstance(decision, dict):
        return False
    opened = (decision.get("bins_opened_before"), decision.get("bins_opened_after"))
    return any(isinstance(number, int | float) and number > 1000 for number in opened)
