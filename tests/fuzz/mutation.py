"""Changes to inputs: to any bytes, to protobuf messages field by field, to JSON values node by node."""

import json
import random
import struct
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message

MOST_BYTES = 64 * 1024
"""Inputs do not grow beyond that: what is slow for its size alone would hide everything else."""

BYTES = (0, 1, 2, 7, 8, 0x7F, 0x80, 0xFE, 0xFF)
INTEGERS = (
    *(0, 1, 2, 3, 4, 6, 7, 8, 63, 64, 127, 128, 255, 256, 257, 512, 1020, 1023, 1024, 4095, 4096, 65535, 65536),
    *(2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**44, 2**53, 2**63 - 1, 2**63, 2**64 - 1),
)
FLOATS = (
    0.0,
    -0.0,
    1.0,
    -1.0,
    0.5,
    1e-45,
    1e-38,
    3.4e38,
    1e39,
    1e308,
    5e-324,
    float("inf"),
    float("-inf"),
    float("nan"),
)
TEXTS = ("", "a", "0", "x" * 128, "x" * 129, "x" * 1025, "a b", "a/b", "../..", "\n", "\0", "ä", "\U0001f6b4", "%s{0}")


def mutated_bytes(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """One to four changes at random places."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        _change(rng, changed, other)
    return bytes(changed[:MOST_BYTES])


def _change(rng: random.Random, data: bytearray, other: bytes) -> None:
    size = len(data)
    at = rng.randrange(size + 1)
    kind = rng.randrange(9)
    if kind == 0 and size:
        data[at % size] ^= 1 << rng.randrange(8)
    elif kind == 1 and size:
        data[at % size] = rng.choice(BYTES)
    elif kind == 2:
        data[at:at] = rng.randbytes(rng.randrange(1, 9))
    elif kind == 3:
        del data[at : at + rng.choice((1, 2, 4, 8, 64))]
    elif kind == 4:
        data[at:at] = data[at : at + rng.choice((1, 4, 16, 256))]
    elif kind == 5 and other:
        start = rng.randrange(len(other))
        data[at : at + rng.choice((0, 8, 64))] = other[start : start + rng.choice((1, 8, 64, 512))]
    elif kind == 6:
        layout = rng.choice(("<B", "<H", "<I", "<Q", ">I", ">Q"))
        largest = 1 << 8 * struct.calcsize(layout)
        data[at : at + struct.calcsize(layout)] = struct.pack(layout, rng.choice(INTEGERS) % largest)
    elif kind == 7:
        del data[at:]
    else:
        data.extend(bytes(rng.choice((1, 4, 255, 1024))))


def framed(messages: list[bytes]) -> bytes:
    """Messages one after the other, each behind its length, as gRPC frames them."""
    return b"".join(struct.pack(">BI", 0, len(message)) + message for message in messages)


def frames(data: bytes) -> list[bytes]:
    """The messages in framed bytes; what is cut off at the end is a message too."""
    found, at = [], 0
    while at + 5 <= len(data):
        (size,) = struct.unpack_from(">I", data, at + 1)
        found.append(data[at + 5 : at + 5 + size])
        at += 5 + size
    return found


def mutated_message(rng: random.Random, kind: type[Message], data: bytes, other: bytes) -> bytes:
    """A message with some fields changed, or changed as bytes, sometimes or where it is none."""
    message = kind()
    try:
        message.ParseFromString(data)
    except DecodeError:
        return mutated_bytes(rng, data, other)
    if rng.random() < 0.15:
        return mutated_bytes(rng, data, other)
    for _ in range(rng.choice((1, 1, 2, 3))):
        change_message(rng, message)
    return bytes(message.SerializeToString())


def change_message(rng: random.Random, message: Message) -> None:
    """Change one field of a message, or of one inside it."""
    if not message.DESCRIPTOR.fields:
        return
    field: Any = rng.choice(message.DESCRIPTOR.fields)
    if field.is_repeated:
        _change_repeated(rng, message, field)
    elif field.type == FieldDescriptor.TYPE_MESSAGE:
        if message.HasField(field.name) and rng.random() < 0.1:
            message.ClearField(field.name)
            return
        inner = getattr(message, field.name)
        inner.SetInParent()
        change_message(rng, inner)
    elif rng.random() < 0.15:
        message.ClearField(field.name)
    else:
        setattr(message, field.name, _value(rng, field, getattr(message, field.name)))


def _change_repeated(rng: random.Random, message: Message, field: FieldDescriptor) -> None:
    values = getattr(message, field.name)
    size = len(values)
    kind = rng.randrange(4)
    if size and kind == 0:
        del values[rng.randrange(size)]
    elif field.type == FieldDescriptor.TYPE_MESSAGE:
        if size and kind == 1:
            values.add().CopyFrom(values[rng.randrange(size)])
        else:
            change_message(rng, values[rng.randrange(size)] if size and kind == 2 else values.add())
    elif size and kind == 1:
        values[rng.randrange(size)] = _value(rng, field, values[0])
    elif kind == 2:
        values.extend([_value(rng, field, 0)] * rng.choice((1, 8, 65)))
    else:
        values.append(_value(rng, field, 0))


_BITS = {
    FieldDescriptor.TYPE_UINT32: (0, 32),
    FieldDescriptor.TYPE_FIXED32: (0, 32),
    FieldDescriptor.TYPE_UINT64: (0, 64),
    FieldDescriptor.TYPE_FIXED64: (0, 64),
    FieldDescriptor.TYPE_ENUM: (1, 32),
    FieldDescriptor.TYPE_INT32: (1, 32),
    FieldDescriptor.TYPE_INT64: (1, 64),
}


def _value(rng: random.Random, field: FieldDescriptor, now: Any) -> Any:
    if field.type in _BITS:
        signed, bits = _BITS[field.type]
        if field.type == FieldDescriptor.TYPE_ENUM and rng.random() < 0.8:
            return rng.randrange(9)
        value = now + rng.choice((-1, 1)) if rng.random() < 0.3 else rng.choice(INTEGERS)
        return int(value) % (1 << bits - signed)
    if field.type in (FieldDescriptor.TYPE_DOUBLE, FieldDescriptor.TYPE_FLOAT):
        return rng.choice(FLOATS)
    if field.type == FieldDescriptor.TYPE_BOOL:
        return not now
    if field.type == FieldDescriptor.TYPE_BYTES:
        return mutated_bytes(rng, now, b"")
    return rng.choice(TEXTS)


def mutated_json(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """JSON with some nodes changed, or changed as bytes, sometimes or where it is none."""
    if rng.random() < 0.15:
        return mutated_bytes(rng, data, other)
    try:
        value = json.loads(data)
        donor = json.loads(other)
    except (ValueError, RecursionError):
        return mutated_bytes(rng, data, other)
    for _ in range(rng.choice((1, 1, 2, 3))):
        value = changed_json(rng, value, donor)
    return json.dumps(value).encode()[:MOST_BYTES]


def changed_json(rng: random.Random, value: Any, donor: Any) -> Any:
    """A JSON value with one node changed; pieces of donor may come into it. Both stay as they are."""
    nodes = list(_nodes(value, ()))
    path = rng.choice(nodes)
    return _replaced(rng, value, path, donor)


def _nodes(value: Any, path: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    found = [path]
    if isinstance(value, dict):
        for key, inner in value.items():
            found += _nodes(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            found += _nodes(inner, (*path, index))
    return found


def _replaced(rng: random.Random, value: Any, path: tuple[Any, ...], donor: Any) -> Any:
    if not path:
        return _other_json(rng, value, donor)
    copy = value.copy()
    key = path[0]
    if len(path) == 1 and rng.random() < 0.2:
        return _other_container(rng, copy, key)
    copy[key] = _replaced(rng, value[key], path[1:], donor)
    return copy


def _other_container(rng: random.Random, container: Any, key: Any) -> Any:
    inner = container.pop(key)
    if isinstance(container, list) and rng.random() < 0.5:
        container += [inner] * rng.choice((2, 3, 9))
    elif isinstance(container, dict) and rng.random() < 0.5:
        container[rng.choice(TEXTS)] = inner
    return container


def _other_json(rng: random.Random, value: Any, donor: Any) -> Any:
    kind = rng.randrange(6)
    if kind == 0 and isinstance(value, int | float) and not isinstance(value, bool):
        return value + rng.choice((-1, 1, 256))
    if kind == 1:
        nested: Any = value
        for _ in range(rng.choice((1, 2, 50))):
            nested = [nested]
        return nested
    if kind == 2:
        found, path = donor, rng.choice(_nodes(donor, ()))
        for key in path:
            found = found[key]
        return found
    simple: tuple[Any, ...] = (None, True, False, [], {}, -1, -(2**63), 10**30)
    return rng.choice((*simple, *INTEGERS, *FLOATS, *TEXTS))
