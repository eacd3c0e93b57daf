"""Messages joined and split by hand are protobuf's: the same bytes, the same content, the same refusals."""

import pytest
from google.protobuf.message import DecodeError, Message
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline_wire.bulk import Bulk, joined, splitter
from paceline_wire.v1 import parameter_server_pb2 as pb

prop = settings(deadline=None, derandomize=True, max_examples=150)
MIB = 1024 * 1024
BULK_TYPES: tuple[type[Message], ...] = (
    pb.InitializeRequest,
    pb.FetchResponse,
    pb.ExchangeRequest,
    pb.ExchangeResponse,
)

numbers = st.integers(0, (1 << 32) - 1)
long_numbers = st.integers(0, (1 << 64) - 1)
payloads = st.builds(pb.Payload, codec=st.integers(0, 6), num_bytes=long_numbers, crc32=st.one_of(st.none(), numbers))
heads: st.SearchStrategy[Message] = st.one_of(
    st.builds(
        pb.ExchangeRequest,
        push=st.builds(pb.Push, fragment=numbers, seq=long_numbers, base_bin=long_numbers, payload=payloads),
    ),
    st.builds(
        pb.ExchangeRequest,
        open=st.builds(
            pb.ExchangeOpen,
            worker=st.builds(pb.Worker, worker_id=st.text(max_size=20), incarnation=long_numbers),
            report_received=st.booleans(),
        ),
    ),
    st.builds(
        pb.ExchangeResponse,
        update=st.builds(
            pb.Update, fragment=numbers, refusal=st.one_of(st.none(), st.text(max_size=300)), lr=st.floats(0, 1)
        ),
    ),
    st.builds(pb.ExchangeResponse, received_bytes=long_numbers),
    st.builds(
        pb.FetchResponse, fragment=st.builds(pb.FetchedFragment, fragment=numbers, bin=long_numbers, payload=payloads)
    ),
    st.builds(pb.InitializeRequest, fragment=st.builds(pb.InitializeFragment, fragment=numbers, payload=payloads)),
    st.sampled_from([message_type() for message_type in BULK_TYPES]),
)
sizes = st.one_of(st.integers(0, 300), st.sampled_from([127, 128, (1 << 14) - 1, 1 << 14, MIB, MIB + 1, (1 << 21) + 3]))


def with_data(head: Message, data: bytes) -> Message:
    """The whole message, of protobuf alone."""
    whole = type(head)()
    whole.CopyFrom(head)
    whole.MergeFrom(type(head)(data=data))
    return whole


def assert_split_like_protobuf(message_type: type[Message], message: bytes) -> None:
    """Bytes give what protobuf gives for them, an error included."""
    try:
        expected = message_type.FromString(message)
    except DecodeError:
        with pytest.raises(DecodeError):
            splitter(message_type)(message)
        return
    found = splitter(message_type)(message)
    assert bytes(found.data) == expected.data  # type: ignore[attr-defined]  # the types that have it have no common base
    expected.ClearField("data")
    assert expected == found.head
    assert expected.SerializeToString(deterministic=True) == found.head.SerializeToString(deterministic=True)


@prop
@given(head=heads, size=sizes, fill=st.integers(0, 255))
def test_a_joined_message_is_the_one_that_protobuf_writes(head: Message, size: int, fill: int) -> None:
    """Joining gives protobuf's bytes, from a view of other memory too, and they can be split again."""
    data = bytes([fill]) * size
    message = joined(Bulk(head, memoryview(bytearray(data))))
    assert type(message) is bytes
    assert with_data(head, data).SerializeToString() == message
    found = splitter(type(head))(message)
    assert head == found.head
    assert data == found.data


field_parts = st.one_of(
    st.builds(lambda data: b"\x7a" + bytes([len(data)]) + data, st.binary(max_size=100)),
    st.just(b"\x7a\x80\x80\x00"),  # `data` of no bytes, its length longer than need be
    st.just(b"\x7a\x80\x80\x80\x80\x80\x00"),  # the same, longer than protobuf allows
    st.just(b"\xfa\x00\x01x"),  # `data` whose tag is longer than need be
    st.just(b"\x78\x05"),  # the number of `data`, but a varint
    heads.map(lambda head: head.SerializeToString()),
    st.sampled_from([b"\xa0\x06\x07", b"\xa1\x06abcdefgh", b"\xa2\x06\x03abc", b"\xa5\x06abcd"]),  # unknown: all kinds
    st.sampled_from([b"\xa3\x06\x08\x01\xa4\x06", b"\xa3\x06", b"\xa4\x06", b"\x00", b"\x02\x00", b"\xff" * 11]),
    st.binary(max_size=6),
)


@prop
@given(
    message_type=st.sampled_from(BULK_TYPES),
    parts=st.lists(field_parts, max_size=10),
    cut=st.one_of(st.just(0), st.integers(0, 40)),
)
def test_whatever_fields_come_in_any_order_are_read_as_protobuf_reads_them(
    message_type: type[Message], parts: list[bytes], cut: int
) -> None:
    """Unknown fields, several of one, groups, garbage and truncation give protobuf's content or protobuf's error."""
    message = b"".join(parts)
    assert_split_like_protobuf(message_type, message[: len(message) - cut])


@pytest.mark.parametrize("message_type", BULK_TYPES)
def test_a_truncated_message_is_no_message(message_type: type[Message]) -> None:
    """Every strict beginning that protobuf refuses is refused, and none is read as something else."""
    whole = joined(Bulk(message_type(), b"0123456789" * 20))
    for end in range(len(whole)):
        assert_split_like_protobuf(message_type, whole[:end])


def test_data_is_a_view_into_what_came() -> None:
    """The payload bytes of an ordinary message are not copied."""
    message = joined(Bulk(pb.ExchangeRequest(push=pb.Push(fragment=1)), bytes(1000)))
    data = splitter(pb.ExchangeRequest)(message).data
    assert isinstance(data, memoryview)
    assert data.obj is message


def test_a_message_of_very_many_fields_is_left_to_protobuf() -> None:
    """Fields without end are not walked through in Python: protobuf reads them, and finds the data behind them."""
    many = b"\xa0\x06\x07" * 1000
    message = many + joined(Bulk(pb.ExchangeRequest(push=pb.Push(fragment=1)), b"abc"))
    found = splitter(pb.ExchangeRequest)(message)
    assert found.data == b"abc"
    assert not isinstance(found.data, memoryview)
    assert found.head.push.fragment == 1
