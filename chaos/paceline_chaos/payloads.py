"""Finds where the payloads are in the bytes of a gRPC connection: an HTTP/2 reader that knows frames and nothing else.

Damage to a payload must be caught by its checksum. Damage elsewhere must be caught by TCP's or TLS's, which a relay's
damage has passed already; so damage is done to payloads only, where the connection is not encrypted.
"""

from dataclasses import dataclass, field

PREFACE_BYTES = 24
"""What a client sends before its first frame."""

FRAME_HEADER_BYTES = 9
MESSAGE_HEADER_BYTES = 5
DATA_FRAME = 0
END_STREAM = 1

SMALLEST_MESSAGE_BYTES = 4096
"""Smaller messages are not searched: what announces a payload is in front of it, and takes less than half of this."""


@dataclass
class _Stream:
    """One call's messages: what is known of the current one."""

    header: bytearray = field(default_factory=bytearray)
    size: int = 0
    left: int = 0


class PayloadFinder:
    """Reads one direction of one connection.

    Args:
        from_client: Whether it is the client's direction, which begins with a preface.
    """

    def __init__(self, *, from_client: bool) -> None:
        self._skip = PREFACE_BYTES if from_client else 0
        self._header = bytearray()
        self._frame_left = 0
        self._stream: _Stream | None = None
        self._ends_stream: int | None = None
        self._streams: dict[int, _Stream] = {}

    def ranges(self, data: bytes) -> list[tuple[int, int]]:
        """The parts (start, end) of the connection's next bytes that are payload, as far as that is certain."""
        found: list[tuple[int, int]] = []
        at = min(self._skip, len(data))
        self._skip -= at
        while at < len(data):
            if self._frame_left == 0:
                at = self._read_frame_header(data, at)
                continue
            end = min(len(data), at + self._frame_left)
            if self._stream is not None:
                found += self._read_messages(self._stream, data, at, end)
            self._frame_left -= end - at
            at = end
            if self._frame_left == 0:
                self._end_frame()
        return found

    def _read_frame_header(self, data: bytes, at: int) -> int:
        taken = data[at : at + FRAME_HEADER_BYTES - len(self._header)]
        self._header += taken
        if len(self._header) == FRAME_HEADER_BYTES:
            kind, flags = self._header[3], self._header[4]
            number = int.from_bytes(self._header[5:9], "big") & 0x7FFF_FFFF
            self._frame_left = int.from_bytes(self._header[:3], "big")
            self._stream = self._streams.setdefault(number, _Stream()) if kind == DATA_FRAME else None
            self._ends_stream = number if kind == DATA_FRAME and flags & END_STREAM else None
            self._header.clear()
            if self._frame_left == 0:
                self._end_frame()
        return at + len(taken)

    def _end_frame(self) -> None:
        if self._ends_stream is not None:
            self._streams.pop(self._ends_stream, None)
        self._stream, self._ends_stream = None, None

    @staticmethod
    def _read_messages(stream: _Stream, data: bytes, at: int, end: int) -> list[tuple[int, int]]:
        found = []
        while at < end:
            if stream.left == 0:
                taken = data[at : min(end, at + MESSAGE_HEADER_BYTES - len(stream.header))]
                stream.header += taken
                at += len(taken)
                if len(stream.header) == MESSAGE_HEADER_BYTES:
                    stream.size = stream.left = int.from_bytes(stream.header[1:], "big")
                    stream.header.clear()
                continue
            stop = min(end, at + stream.left)
            if stream.size >= SMALLEST_MESSAGE_BYTES:
                # The second half of a message: its first fields, which say what the bytes are, are long over.
                begin = max(at, at + stream.left - stream.size // 2)
                if begin < stop:
                    found.append((begin, stop))
            stream.left -= stop - at
            at = stop
        return found
