"""What an emulated link does to packets: how long each queues and travels, and which segments are lost.

Nothing here knows of devices or of a clock. Packets are as a TUN device with `IFF_VNET_HDR` hands them out: a
virtio-net header and an IPv4 packet, which for TCP may be a super-packet of up to 64 KiB that stands for the segments
that it would be cut into. A link counts, queues and loses segments, so a super-packet may arrive in parts.
"""

import math
import random
import struct
from collections import deque
from dataclasses import dataclass

VNET = struct.Struct("=BBHHHH")
"""virtio-net header: flags, gso_type, hdr_len, gso_size, csum_start, csum_offset."""
SMALLEST_QUEUE_BYTES = 128 * 1024
"""What even a short or slow link queues: two super-packets, or TCP could never send a full one."""

_GSO_NONE = 0
_FIN, _PSH, _CWR = 0x01, 0x08, 0x80
_SEQUENCE_OFFSET, _DATA_OFFSET, _FLAGS_OFFSET = 4, 12, 13


@dataclass(frozen=True, kw_only=True)
class LinkShape:
    """A link as seen by one direction; both directions are alike and independent."""

    rate_mbit: float | None = None
    """Megabits of IP packets a second; None: no limit."""
    delay_ms: float = 0.0
    """Milliseconds one way; a round trip takes twice that."""
    queue_bytes: int | None = None
    """Bytes that wait in front of the link at most; None: `queue_bdp` times what is in flight in a round trip."""
    queue_bdp: float = 1.0
    loss: float = 0.0
    """Probability that a segment is lost, whatever its size."""
    seed: int = 0
    """Of the random numbers that decide what is lost."""

    def __post_init__(self) -> None:
        if self.rate_mbit is not None and self.rate_mbit <= 0:
            raise ValueError(f"rate_mbit must be positive: {self.rate_mbit}")
        if self.delay_ms < 0:
            raise ValueError(f"delay_ms must not be negative: {self.delay_ms}")
        if not 0 <= self.loss < 1:
            raise ValueError(f"loss must be a probability below 1: {self.loss}")
        if self.queue_bytes is not None and self.queue_bytes < 1:
            raise ValueError(f"queue_bytes must be positive: {self.queue_bytes}")

    @property
    def bytes_per_s(self) -> float:
        """The rate; infinite where there is no limit."""
        return math.inf if self.rate_mbit is None else self.rate_mbit * 1e6 / 8

    @property
    def most_queued_bytes(self) -> float:
        """What may wait in front of the link."""
        if self.queue_bytes is not None:
            return self.queue_bytes
        if self.rate_mbit is None:
            return math.inf
        return max(self.queue_bdp * self.bytes_per_s * 2 * self.delay_ms / 1e3, SMALLEST_QUEUE_BYTES)


@dataclass(frozen=True)
class Packet:
    """A packet with its virtio-net header, and the segments that it stands for."""

    data: bytes
    segments: int
    segment_bytes: int
    """Payload bytes of each segment but the last."""
    header_bytes: int
    """Of the IP and TCP headers, which every segment has."""

    @property
    def wire_bytes(self) -> int:
        """IP bytes of all its segments."""
        return len(self.data) - VNET.size + (self.segments - 1) * self.header_bytes


def read_packet(data: bytes) -> Packet:
    """What a TUN device handed out, understood as far as a link needs it."""
    _, gso_type, _, gso_bytes, _, _ = VNET.unpack_from(data)
    if gso_type == _GSO_NONE or gso_bytes == 0:
        return Packet(data, 1, len(data), 0)
    ip_bytes = (data[VNET.size] & 0x0F) * 4
    header_bytes = ip_bytes + (data[VNET.size + ip_bytes + _DATA_OFFSET] >> 4) * 4
    payload_bytes = len(data) - VNET.size - header_bytes
    return Packet(data, max(1, -(-payload_bytes // gso_bytes)), gso_bytes, header_bytes)


def part(packet: Packet, first: int, last: int) -> Packet:
    """The packet that stands for the segments from `first` up to, not including, `last` of another.

    The TCP checksum is left as it is: it is partial, and whoever receives a partial checksum doesn't verify it.
    """
    if first == 0 and last == packet.segments:
        return packet
    start, end = VNET.size, VNET.size + packet.header_bytes
    flags, gso_type, header, gso_bytes, csum_start, csum_offset = VNET.unpack_from(packet.data)
    payload = packet.data[end + first * packet.segment_bytes : end + last * packet.segment_bytes]
    if last - first == 1:
        gso_type, gso_bytes = _GSO_NONE, 0
    headers = bytearray(packet.data[start:end])
    _adjust_ip(headers, packet.header_bytes + len(payload), first)
    _adjust_tcp(headers, first * packet.segment_bytes, is_first=first == 0, is_last=last == packet.segments)
    data = VNET.pack(flags, gso_type, header, gso_bytes, csum_start, csum_offset) + headers + payload
    return Packet(data, last - first, packet.segment_bytes, packet.header_bytes)


class LinkQueue:
    """One direction of a link: packets wait for their turn, take their time at the link's rate, and travel.

    A packet that finds no room is lost from its first segment without room on (drop tail), and every segment may be
    lost on the way. Times are absolute, so late wake-ups don't add up.
    """

    def __init__(self, shape: LinkShape, direction: int) -> None:
        """Start with an empty link; `direction` tells apart the random numbers of links with one seed."""
        self.delivered_bytes = 0
        self.lost_segments = 0
        self.overflowed_segments = 0
        self._shape = shape
        self._bytes_per_s = shape.bytes_per_s
        self._most_queued_bytes = shape.most_queued_bytes
        self._delay_s = shape.delay_ms / 1e3
        self._free_at_s = 0.0
        self._under_way: deque[tuple[float, Packet]] = deque()
        self._random = random.Random(f"{shape.seed}/{direction}")
        self._until_loss = self._segments_until_loss()

    @property
    def due_s(self) -> float:
        """When the next packet arrives; infinite where none is under way."""
        return self._under_way[0][0] if self._under_way else math.inf

    def send(self, packet: Packet, now_s: float) -> None:
        """Let a packet queue for the link, as much of it as there is room for."""
        for whole in self._with_room(packet, now_s):
            self._free_at_s = max(self._free_at_s, now_s) + whole.wire_bytes / self._bytes_per_s
            for arriving in self._survivors(whole):
                self._under_way.append((self._free_at_s + self._delay_s, arriving))

    def arrived(self, now_s: float) -> list[Packet]:
        """The packets that have arrived by now, in order."""
        packets: list[Packet] = []
        while self._under_way and self._under_way[0][0] <= now_s:
            packet = self._under_way.popleft()[1]
            self.delivered_bytes += packet.wire_bytes
            packets.append(packet)
        return packets

    def _with_room(self, packet: Packet, now_s: float) -> list[Packet]:
        # Without a rate nothing ever waits, and infinity times nothing is no number.
        waiting_s = max(0.0, self._free_at_s - now_s)
        room_bytes = self._most_queued_bytes - (waiting_s * self._bytes_per_s if waiting_s else 0.0)
        if packet.wire_bytes <= room_bytes:
            return [packet]
        fitting = min(packet.segments - 1, int(room_bytes // (packet.segment_bytes + packet.header_bytes)))
        self.overflowed_segments += packet.segments - max(0, fitting)
        return [part(packet, 0, fitting)] if fitting > 0 else []

    def _survivors(self, packet: Packet) -> list[Packet]:
        """The packet in the parts that its lost segments leave of it."""
        parts: list[Packet] = []
        first = 0
        while first + self._until_loss < packet.segments:
            lost = first + self._until_loss
            if lost > first:
                parts.append(part(packet, first, lost))
            self.lost_segments += 1
            first = lost + 1
            self._until_loss = self._segments_until_loss()
        self._until_loss -= packet.segments - first
        if first < packet.segments:
            parts.append(part(packet, first, packet.segments))
        return parts

    def _segments_until_loss(self) -> int:
        """Segments that arrive before the next lost one: geometric, one draw for each loss and not for each segment."""
        if self._shape.loss == 0:
            return 2**62
        return int(math.log(1 - self._random.random()) / math.log1p(-self._shape.loss))


def _adjust_ip(headers: bytearray, total_bytes: int, skipped_segments: int) -> None:
    ip_bytes = (headers[0] & 0x0F) * 4
    identification = (int.from_bytes(headers[4:6], "big") + skipped_segments) & 0xFFFF
    headers[2:6] = struct.pack("!HH", total_bytes, identification)
    headers[10:12] = b"\0\0"
    total = sum(struct.unpack(f"!{ip_bytes // 2}H", headers[:ip_bytes]))
    total = (total & 0xFFFF) + (total >> 16)
    total = (total & 0xFFFF) + (total >> 16)
    headers[10:12] = struct.pack("!H", ~total & 0xFFFF)


def _adjust_tcp(headers: bytearray, skipped_bytes: int, *, is_first: bool, is_last: bool) -> None:
    tcp = (headers[0] & 0x0F) * 4
    sequence = (
        int.from_bytes(headers[tcp + _SEQUENCE_OFFSET : tcp + _SEQUENCE_OFFSET + 4], "big") + skipped_bytes
    ) & 0xFFFFFFFF
    headers[tcp + _SEQUENCE_OFFSET : tcp + _SEQUENCE_OFFSET + 4] = struct.pack("!I", sequence)
    # As segmentation does: what ends the data goes with the last segment, what was answered goes with the first.
    if not is_last:
        headers[tcp + _FLAGS_OFFSET] &= ~(_FIN | _PSH) & 0xFF
    if not is_first:
        headers[tcp + _FLAGS_OFFSET] &= ~_CWR & 0xFF
