"""How a record is written: its kind, what it says as JSON, and its numbers as bytes.

The JSON is made and read by pydantic from the dataclasses themselves, so that what is read back is checked field by
field; floats are written with all their digits. The numbers are the bytes that came over the wire.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from google.protobuf.message import DecodeError
from pydantic import TypeAdapter, ValidationError

from paceline_server.journal import (
    Configured,
    Decided,
    FragmentInitialized,
    Initialized,
    MembershipChanged,
    Record,
)
from paceline_server.ledger import Decision, Ledger, PushRequest
from paceline_wire.codecs import payload_tensor
from paceline_wire.errors import InvalidInputError
from paceline_wire.manifest import Manifest
from paceline_wire.v1 import parameter_server_pb2 as pb


class Written(NamedTuple):
    """A record as it is kept.

    Attributes:
        kind: Which record it is.
        said: What it says besides numbers, as JSON.
        payload: Its numbers or manifest; empty if it has none.
    """

    kind: str
    said: bytes
    payload: bytes | memoryview


@dataclass(frozen=True, kw_only=True)
class _Decided:
    fragment: int
    time_s: float
    push: PushRequest | None
    decision: Decision
    ledger: Ledger
    codec: str | None
    norm: float | None = None


@dataclass(frozen=True, kw_only=True)
class _Initialized:
    initialization_id: int
    shard: int
    num_shards: int


@dataclass(frozen=True, kw_only=True)
class _FragmentInitialized:
    fragment: int


_DECIDED = TypeAdapter(_Decided)
_INITIALIZED = TypeAdapter(_Initialized)
_FRAGMENT_INITIALIZED = TypeAdapter(_FragmentInitialized)
_MEMBERSHIP_CHANGED = TypeAdapter(MembershipChanged)
_CONFIGURED = TypeAdapter(Mapping[str, Any])


def write_record(record: Record) -> Written:
    """A record as it is kept; its payload is shared, not copied."""
    if isinstance(record, Decided):
        said = _Decided(
            fragment=record.fragment,
            time_s=record.time_s,
            push=record.push,
            decision=record.decision,
            ledger=record.ledger,
            codec=record.codec,
            norm=record.norm,
        )
        return Written("decided", _DECIDED.dump_json(said), _bytes_of(record.payload))
    if isinstance(record, MembershipChanged):
        return Written("membership-changed", _MEMBERSHIP_CHANGED.dump_json(record), b"")
    if isinstance(record, FragmentInitialized):
        named = _FragmentInitialized(fragment=record.fragment)
        return Written("fragment-initialized", _FRAGMENT_INITIALIZED.dump_json(named), _bytes_of(record.payload))
    if isinstance(record, Initialized):
        begun = _Initialized(
            initialization_id=record.initialization_id, shard=record.shard, num_shards=record.num_shards
        )
        return Written("initialized", _INITIALIZED.dump_json(begun), write_manifest(record.manifest))
    return Written("configured", _CONFIGURED.dump_json(record.config), b"")


def read_record(written: Written) -> Record:
    """The record that was kept.

    Raises:
        ValueError: It is not a record of this version; the text says why.
    """
    kind, said, payload = written
    try:
        if kind == "decided":
            decided = _DECIDED.validate_json(said)
            return Decided(
                fragment=decided.fragment,
                time_s=decided.time_s,
                push=decided.push,
                decision=decided.decision,
                ledger=decided.ledger,
                codec=decided.codec,
                norm=decided.norm,
                payload=None if decided.codec is None else payload_tensor(payload),
            )
        if kind == "membership-changed":
            return _MEMBERSHIP_CHANGED.validate_json(said)
        if kind == "fragment-initialized":
            named = _FRAGMENT_INITIALIZED.validate_json(said)
            return FragmentInitialized(fragment=named.fragment, payload=payload_tensor(payload))
        if kind == "initialized":
            begun = _INITIALIZED.validate_json(said)
            return Initialized(
                manifest=read_manifest(bytes(payload)),
                initialization_id=begun.initialization_id,
                shard=begun.shard,
                num_shards=begun.num_shards,
            )
        if kind == "configured":
            return Configured(config=_CONFIGURED.validate_json(said))
    except ValidationError as error:
        raise ValueError(f"a record of kind {kind!r} does not say what it should: {error}") from error
    raise ValueError(f"there is no record of kind {kind!r} in this version")


def write_manifest(manifest: Manifest) -> bytes:
    """The manifest as a message of the protocol."""
    return manifest.to_wire().SerializeToString(deterministic=True)


def read_manifest(data: bytes) -> Manifest:
    """The manifest in a message of the protocol.

    Raises:
        ValueError: It is none.
    """
    try:
        return Manifest.from_wire(pb.Manifest.FromString(data))
    except (InvalidInputError, DecodeError) as error:
        raise ValueError(f"the manifest cannot be read: {error}") from error


def _bytes_of(payload: torch.Tensor | None) -> bytes | memoryview:
    return b"" if payload is None else payload.numpy().data
