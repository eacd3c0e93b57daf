"""A shard's whole state as files: one in safetensors for each fragment, the tensors' names, and a manifest, last.

A snapshot is written while the shard goes on, fragment by fragment, so its fragments are of different moments. Each
says up to which record of the journal it is, and replay goes on from there. `number` is the record from which on the
journal is needed.

    fragment-000000.safetensors   w and the rule's vectors, float32 [n]; the rest of the fragment as JSON beside them
    tensors.pb                    the run's manifest (paceline_wire.v1.Manifest)
    snapshot.json                 what the others are, with sizes and checksums; where it is not, the snapshot is not

The folder has its final name only once all of it is on the disk.
"""

import errno
import json
import os
import shutil
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from pydantic import TypeAdapter, ValidationError

from paceline_server.hosted import FragmentCopy, FragmentMeta
from paceline_server.membership import MembershipState
from paceline_server.storage.directory import ShardDirectory, sync_directory
from paceline_server.storage.encoding import read_manifest, write_manifest
from paceline_wire.errors import InvalidInputError, StorageError, StorageFullError
from paceline_wire.manifest import Manifest

FORMAT_VERSION = 1

MANIFEST_FILE = "snapshot.json"
_TENSORS_FILE = "tensors.pb"
_FRAGMENT_KEY = "paceline.fragment"


@dataclass(frozen=True, kw_only=True)
class WrittenFile:
    """One file of a snapshot, as its manifest has it."""

    num_bytes: int
    crc32: int


@dataclass(frozen=True, kw_only=True)
class SnapshotMeta:
    """What a snapshot is as a whole; what snapshot.json says.

    Attributes:
        number: The record of the journal that it needs first.
        shard: The shard's index.
        num_shards: Shards among which the fragments are divided.
        initialization_id: Whose parameters the run began from.
        time_s: When it was complete, in seconds of the engine's clock.
        membership_record: The newest record that the membership includes.
        membership: The workers.
        config: The configuration of the moment, see journal.Configured.
        files: Its files by name.
        version: Of this format.
        crc32: Of all that stands before it in the file.
    """

    number: int
    shard: int
    num_shards: int
    initialization_id: int
    time_s: float
    membership_record: int
    membership: MembershipState
    config: Mapping[str, Any]
    files: Mapping[str, WrittenFile]
    version: int = FORMAT_VERSION
    crc32: int = 0


_FRAGMENT_META = TypeAdapter(FragmentMeta)
_SNAPSHOT_META = TypeAdapter(SnapshotMeta)


class SnapshotWriter:
    """Writes one snapshot, file by file; only `finish` makes it one.

    Args:
        directory: The shard's directory.
        number: The record of the journal that it needs first.

    Raises:
        StorageError: Its folder cannot be made.
    """

    def __init__(self, directory: ShardDirectory, number: int) -> None:
        self.files: dict[str, WrittenFile] = {}
        self._final = directory.snapshot_path(number)
        self._folder = self._final.with_name(self._final.name + ".partial")
        self._number = number
        try:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder.mkdir(parents=True)
        except OSError as error:
            raise _storage_error(self._folder, error) from error

    def add(self, index: int, copy: FragmentCopy) -> None:
        """Write a fragment.

        Raises:
            StorageFullError: There is no room.
            StorageError: The disk does not take it.
        """
        metadata = {_FRAGMENT_KEY: _FRAGMENT_META.dump_json(copy.meta).decode()}
        self._write(_fragment_file(index), safetensors.torch.save(dict(copy.vectors), metadata))

    def finish(
        self,
        manifest: Manifest,
        *,
        shard: int,
        num_shards: int,
        initialization_id: int,
        time_s: float,
        membership_record: int,
        membership: MembershipState,
        config: Mapping[str, Any],
    ) -> Path:
        """Write what the files are and give the folder its name; see SnapshotMeta for the arguments.

        Raises:
            StorageFullError: There is no room.
            StorageError: The disk does not take it.
        """
        self._write(_TENSORS_FILE, write_manifest(manifest))
        meta = SnapshotMeta(
            number=self._number,
            shard=shard,
            num_shards=num_shards,
            initialization_id=initialization_id,
            time_s=time_s,
            membership_record=membership_record,
            membership=membership,
            config=config,
            files=dict(self.files),
        )
        head = _head(_SNAPSHOT_META.dump_json(meta))
        self._write(MANIFEST_FILE, _SNAPSHOT_META.dump_json(replace(meta, crc32=zlib.crc32(head))))
        try:
            sync_directory(self._folder)
            self._folder.rename(self._final)
            sync_directory(self._final.parent)
        except OSError as error:
            raise _storage_error(self._final, error) from error
        return self._final

    def abandon(self) -> None:
        """Remove what was written."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _write(self, name: str, data: bytes) -> None:
        try:
            with (self._folder / name).open("wb", buffering=0) as file:
                view = memoryview(data)
                while view:
                    view = view[file.write(view) :]
                os.fsync(file.fileno())
        except OSError as error:
            raise _storage_error(self._folder / name, error) from error
        self.files[name] = WrittenFile(num_bytes=len(data), crc32=zlib.crc32(data))


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedSnapshot:
    """A snapshot as it was read.

    Attributes:
        meta: What it is.
        manifest: The run's manifest.
        fragments: The shard's fragments by index.
    """

    meta: SnapshotMeta
    manifest: Manifest
    fragments: Mapping[int, FragmentCopy]


def load_snapshot(path: Path) -> LoadedSnapshot:
    """Read a snapshot whole, several files at once, and check every byte.

    Raises:
        StorageError: Something is missing, damaged or of a later version; the text says which file.
    """
    meta = read_snapshot_meta(path)
    try:
        manifest = read_manifest(_read(path, meta, _TENSORS_FILE))
        indexes = [fragment.index for fragment in manifest.fragments_of_shard(meta.shard, meta.num_shards)]
    except (ValueError, InvalidInputError) as error:
        raise StorageError(f"{path / _TENSORS_FILE}: {error}") from error
    with ThreadPoolExecutor(os.cpu_count(), "paceline-snapshot") as threads:
        copies = threads.map(lambda index: _read_fragment(path, meta, index), indexes)
        return LoadedSnapshot(meta=meta, manifest=manifest, fragments=dict(zip(indexes, copies, strict=True)))


def read_snapshot_meta(path: Path) -> SnapshotMeta:
    """Read what a snapshot says of itself.

    Raises:
        StorageError: It is not complete, damaged, or of a later version.
    """
    try:
        data = (path / MANIFEST_FILE).read_bytes()
        meta = _SNAPSHOT_META.validate_json(data)
    except OSError as error:
        raise StorageError(f"the snapshot {path} has no readable {MANIFEST_FILE}: {error.strerror}") from error
    except ValidationError as error:
        raise StorageError(f"{path / MANIFEST_FILE} does not say what it should: {error}") from error
    head = _head(data)
    if not head or meta.crc32 != zlib.crc32(head):
        raise StorageError(f"{path / MANIFEST_FILE} is damaged: its checksum does not fit")
    if meta.version != FORMAT_VERSION:
        raise StorageError(f"the snapshot {path} is of version {meta.version}; this version reads {FORMAT_VERSION}")
    return meta


def _read_fragment(path: Path, meta: SnapshotMeta, index: int) -> FragmentCopy:
    name = _fragment_file(index)
    data = _read(path, meta, name)
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        said = _FRAGMENT_META.validate_json(header["__metadata__"][_FRAGMENT_KEY])
        vectors = safetensors.torch.load(data)
        _require_vectors(vectors)
        return FragmentCopy(vectors=vectors, meta=said)
    except (ValueError, KeyError, TypeError, RecursionError, safetensors.SafetensorError) as error:
        raise StorageError(f"{path / name} is not a fragment: {error}") from error


def _require_vectors(vectors: Mapping[str, torch.Tensor]) -> None:
    if "w" not in vectors:
        raise ValueError("it has no parameters")
    for name, vector in vectors.items():
        if vector.dtype is not torch.float32 or vector.dim() != 1:
            raise ValueError(f"{name} is {vector.dtype} {list(vector.shape)}, not float32 [n]")


def _read(folder: Path, meta: SnapshotMeta, name: str) -> bytes:
    path, expected = folder / name, meta.files.get(name)
    if expected is None:
        raise StorageError(f"the snapshot {folder} does not have {name}")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StorageError(f"the snapshot's file {path} cannot be read: {error.strerror}") from error
    if (len(data), zlib.crc32(data)) != (expected.num_bytes, expected.crc32):
        raise StorageError(f"the snapshot's file {path} is damaged: its size or checksum is not what was written")
    return data


def remove_snapshots_before(directory: ShardDirectory, number: int) -> None:
    """Remove the snapshots below a number."""
    for older in directory.snapshot_numbers():
        if older < number:
            shutil.rmtree(directory.snapshot_path(older), ignore_errors=True)


def _head(data: bytes) -> bytes:
    """What stands before the checksum; nothing if there is none."""
    return data[: max(data.rfind(b'"crc32":'), 0)]


def _fragment_file(index: int) -> str:
    return f"fragment-{index:06d}.safetensors"


def _storage_error(path: Path, error: OSError) -> StorageError:
    kind = StorageFullError if error.errno in (errno.ENOSPC, errno.EDQUOT) else StorageError
    return kind(f"the snapshot {path} cannot be written: {error.strerror}")
