"""The emulated link's arithmetic: rate, delay, room and loss, in segments, without devices or a clock."""

import struct

import pytest

from link_queue import VNET, LinkQueue, LinkShape, Packet, read_packet

SEGMENT_BYTES = 1448
HEADERS = 52


def super_packet(payload: bytes, sequence: int = 1000, flags: int = 0x18) -> bytes:
    """A TCP super-packet of a connection with timestamps, as a TUN device hands it out."""
    ip = bytearray(20)
    struct.pack_into(
        "!BBHHHBBH4s4s", ip, 0, 0x45, 0, HEADERS + len(payload), 7, 0x4000, 64, 6, 0, b"\n\0\0\1", b"\n\0\0\2"
    )
    struct.pack_into("!H", ip, 10, 0xFFFF - sum(struct.unpack("!10H", ip)) % 0xFFFF)
    tcp = struct.pack("!HHIIBBHHH", 1, 2, sequence, 3, 8 << 4, flags, 500, 0, 0) + bytes(12)
    gso_type = 1 if len(payload) > SEGMENT_BYTES else 0
    return VNET.pack(1, gso_type, HEADERS, SEGMENT_BYTES if gso_type else 0, 20, 16) + ip + tcp + payload


def sequence_and_payload(packet: Packet) -> tuple[int, bytes]:
    """Where in its connection a packet's bytes belong, and the bytes."""
    tcp = packet.data[VNET.size + 20 :]
    return struct.unpack_from("!I", tcp, 4)[0], tcp[32:]


def payload_of(num_bytes: int) -> bytes:
    """Bytes of which no two segments look alike."""
    return bytes(index * 31 % 251 for index in range(num_bytes))


def test_a_packet_takes_its_time_at_the_rate_and_then_the_delay() -> None:
    """Packets sent together arrive one after the other, as fast as the link is, a delay later."""
    queue = LinkQueue(LinkShape(rate_mbit=8, delay_ms=50), 0)
    for _ in range(2):
        queue.send(read_packet(super_packet(bytes(1000 - HEADERS))), 0.0)
    assert queue.arrived(0.0509) == []
    assert len(queue.arrived(0.0511)) == 1
    assert queue.due_s == pytest.approx(0.052)
    assert len(queue.arrived(0.0521)) == 1


def test_every_segment_of_a_super_packet_counts_with_its_headers() -> None:
    """What a super-packet stands for takes the link as long as its segments would."""
    packet = read_packet(super_packet(payload_of(10 * SEGMENT_BYTES + 5)))
    assert packet.segments == 11
    assert packet.wire_bytes == 10 * SEGMENT_BYTES + 5 + 11 * HEADERS


def test_what_finds_no_room_is_lost_from_there_on() -> None:
    """A full queue takes a super-packet's first segments, as many as there is room for."""
    queue = LinkQueue(LinkShape(rate_mbit=8, queue_bytes=4 * (SEGMENT_BYTES + HEADERS)), 0)
    payload = payload_of(10 * SEGMENT_BYTES)
    queue.send(read_packet(super_packet(payload)), 0.0)
    queue.send(read_packet(super_packet(payload)), 0.0)
    (arrived,) = queue.arrived(1.0)
    assert sequence_and_payload(arrived) == (1000, payload[: 4 * SEGMENT_BYTES])
    assert queue.overflowed_segments == 16


def test_lost_segments_leave_the_others_where_they_belong() -> None:
    """The parts that arrive have the bytes, and the sequence numbers, that the segments of them have; others lack."""
    queue = LinkQueue(LinkShape(loss=0.2, seed=3), 0)
    payload = payload_of(20 * SEGMENT_BYTES + 9)
    for number in range(20):
        queue.send(read_packet(super_packet(payload, sequence=1000 + number)), 0.0)
    packets = queue.arrived(1.0)
    for packet in packets:
        sequence, part = sequence_and_payload(packet)
        start = (sequence - 1000) // SEGMENT_BYTES * SEGMENT_BYTES
        assert part == payload[start : start + len(part)]
        assert struct.unpack_from("!H", packet.data, VNET.size + 2)[0] == len(part) + HEADERS
        assert sum(struct.unpack_from("!10H", packet.data, VNET.size)) % 0xFFFF == 0
        # Only what ends the data may say that it does.
        assert bool(packet.data[VNET.size + 33] & 0x08) == (start + len(part) == len(payload))
    assert queue.lost_segments + sum(packet.segments for packet in packets) == 20 * 21
    assert 40 < queue.lost_segments < 130


def test_the_same_seed_loses_the_same() -> None:
    """A run can be repeated: losses follow from the seed, and directions do not share them."""
    lost = []
    for seed, direction in ((1, 0), (1, 0), (1, 1), (2, 0)):
        queue = LinkQueue(LinkShape(loss=0.1, seed=seed), direction)
        queue.send(read_packet(super_packet(payload_of(40 * SEGMENT_BYTES))), 0.0)
        lost.append([sequence_and_payload(packet)[0] for packet in queue.arrived(0.0)])
    assert lost[0] == lost[1]
    assert lost[0] != lost[2]
    assert lost[0] != lost[3]
