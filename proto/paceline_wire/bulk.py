"""Messages with payload bytes, joined and split by hand in protobuf's wire format.

Protobuf copies a `bytes` field twice on either way: into the message and out of it. Here only the small fields pass
through protobuf. The bytes on the wire are those that protobuf would write, and whatever protobuf can read is read, so
the peer may be any protobuf client; what cannot be read raises protobuf's own error.
"""

from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar, cast

import grpc
import grpc.aio
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from paceline_wire.v1 import parameter_server_pb2 as pb

_SERVICE = pb.DESCRIPTOR.services_by_name["ParameterServerService"]

DATA_FIELD = 15
"""Number of the field `data` in every message that has payload bytes."""

_DATA_TAG = bytes([DATA_FIELD << 3 | 2])
_MOST_FIELDS = 8
"""Fields that are looked at before protobuf takes over: an honest message has two, and Python is slow at many."""

_LONGEST_DATA_HEADER = 6
"""Bytes of tag and length before `data`; whether more are allowed is for protobuf to say."""

_VARINT, _FIXED_64, _LENGTH, _FIXED_32 = 0, 1, 2, 5

Head = TypeVar("Head", bound=Message)


class Bulk(NamedTuple, Generic[Head]):
    """One message in two parts.

    Attributes:
        head: The message without its `data`.
        data: That field, which MUST not change until the message is joined.
    """

    head: Head
    data: bytes | memoryview


def joined(message: Bulk[Any]) -> bytes:
    """The bytes of a message on the wire, as protobuf would write them. Copies `data` once."""
    head = message.head.SerializeToString()
    num_bytes = len(message.data)
    if not num_bytes:
        return bytes(head)
    return b"".join((head, _DATA_TAG, _varint(num_bytes), message.data))


def splitter(head_type: type[Head]) -> Callable[[bytes], Bulk[Head]]:
    """What takes messages of a type apart: from the bytes on the wire to a head, and `data` as a view into them.

    It raises DecodeError where the bytes are truncated, or no message of the type.
    """

    def split(message: bytes) -> Bulk[Head]:
        found = _data_of(message)
        if found is None:
            return _parsed(head_type, message)
        begin, start, end = found
        head = head_type()
        # What is before the field and what is behind, in their order, are a message as well.
        head.ParseFromString(message[:begin] + message[end:])
        return Bulk(head, memoryview(message)[start:end])

    return split


def method(channel: grpc.aio.Channel, name: str) -> Any:
    """One of the service's methods on a channel, to be called with bulk messages where messages have payload bytes.

    A stub's method of that name is the same with protobuf's own messages.
    """
    described = _SERVICE.methods_by_name[name]
    make = {
        (False, True): channel.unary_stream,
        (True, False): channel.stream_unary,
        (True, True): channel.stream_stream,
    }[described.client_streaming, described.server_streaming]
    return make(
        f"/{_SERVICE.full_name}/{name}",
        request_serializer=_serializer(GetMessageClass(described.input_type)),
        response_deserializer=_deserializer(GetMessageClass(described.output_type)),
    )


def handlers(servicer: Any, service: ServiceDescriptor = _SERVICE) -> grpc.GenericRpcHandler:
    """A service's methods for a server: those of a servicer, with bulk messages where messages have payload bytes.

    A single request that cannot be read comes to the servicer as the DecodeError that says so: were it raised here,
    gRPC would call it an accident of the server, and write a traceback for each. In a stream of requests it is raised.
    """
    makers = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }
    by_name: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
    for name, described in service.methods_by_name.items():
        make: Any = makers[described.client_streaming, described.server_streaming]
        read = _deserializer(GetMessageClass(described.input_type))
        by_name[name] = make(
            getattr(servicer, name),
            request_deserializer=read if described.client_streaming else _read_or_error(read),
            response_serializer=_serializer(GetMessageClass(described.output_type)),
        )
    return grpc.method_handlers_generic_handler(service.full_name, by_name)


def _read_or_error(read: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def read_or_error(message: bytes) -> Any:
        try:
            return read(message)
        except DecodeError as error:
            return error

    return read_or_error


def _serializer(message_type: type[Message]) -> Callable[[Any], bytes]:
    if _has_data(message_type):
        return joined
    return cast("Callable[[Any], bytes]", message_type.SerializeToString)


def _deserializer(message_type: type[Message]) -> Callable[[bytes], Any]:
    return splitter(message_type) if _has_data(message_type) else message_type.FromString


def _has_data(message_type: type[Message]) -> bool:
    field = message_type.DESCRIPTOR.fields_by_number.get(DATA_FIELD)
    return field is not None and field.name == "data"


def _parsed(head_type: type[Head], message: bytes) -> Bulk[Head]:
    """Split a message by protobuf alone, with its copies."""
    whole = head_type.FromString(message)
    data = cast("bytes", getattr(whole, "data"))  # noqa: B009  # the types that have it have no common base
    whole.ClearField("data")
    return Bulk(whole, data)


def _data_of(message: bytes) -> tuple[int, int, int] | None:
    """Where the one field `data` of a message begins, where its content does, and where both end.

    None: there is none, there are several, or the message is not so simple that this is sure.
    """
    found = None
    position, end = 0, len(message)
    for _ in range(_MOST_FIELDS):
        if position == end:
            return found
        begin = position
        tag, position = _read_varint(message, position)
        field, kind = tag >> 3, tag & 7
        if kind == _LENGTH:
            num_bytes, position = _read_varint(message, position)
            content, position = position, position + num_bytes
            if field == DATA_FIELD:
                if found is not None or content - begin > _LONGEST_DATA_HEADER:
                    return None
                found = begin, content, position
        elif kind == _VARINT:
            _, position = _read_varint(message, position)
        elif kind in (_FIXED_32, _FIXED_64):
            position += 4 if kind == _FIXED_32 else 8
        else:
            return None
        if field == 0 or position > end:
            return None
    return found if position == end else None


def _read_varint(message: bytes, position: int) -> tuple[int, int]:
    """A varint of a message and the position behind it, which is beyond the message if it is cut off or too long."""
    value = shift = 0
    for byte in message[position : position + 10]:
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    return 0, len(message) + 1


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
