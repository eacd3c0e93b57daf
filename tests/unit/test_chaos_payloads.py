"""Finding payloads in the bytes of a gRPC connection."""

import random

from paceline_chaos.payloads import PREFACE_BYTES, PayloadFinder


def frame(kind: int, stream: int, content: bytes, flags: int = 0) -> bytes:
    """An HTTP/2 frame."""
    return len(content).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + content


def message(size: int, mark: int) -> bytes:
    """A gRPC message whose second half consists of a mark, and nothing else does."""
    first = size - size // 2
    return bytes(1) + size.to_bytes(4, "big") + bytes(first) + bytes([mark]) * (size - first)


def connection(rng: random.Random) -> tuple[bytes, int]:
    """A client's side of a connection with two calls, and the bytes of the payloads in it."""
    large, small = message(20_000, 1) + message(5_000, 1), message(1_000, 2)
    data, at = bytes(PREFACE_BYTES) + frame(4, 0, bytes(18)) + frame(1, 1, bytes(60)), 0
    while at < len(large):
        size = rng.choice((100, 7_000, 16_384))
        data += frame(0, 1, large[at : at + size])
        data += rng.choice((b"", frame(8, 0, bytes(4)), frame(1, 3, bytes(30)) + frame(0, 3, small, flags=1)))
        at += size
    return data + frame(0, 1, b"", flags=1), 10_000 + 2_500


def test_exactly_the_second_halves_of_large_messages_are_found() -> None:
    """However the bytes are cut into chunks and frames, and whatever else is on the connection."""
    for seed in range(20):
        rng = random.Random(seed)
        data, expected = connection(rng)
        finder, found, at = PayloadFinder(from_client=True), 0, 0
        while at < len(data):
            chunk = data[at : at + rng.choice((1, 5, 900, 60_000))]
            at += len(chunk)
            for start, end in finder.ranges(chunk):
                assert chunk[start:end] == bytes([1]) * (end - start)
                found += end - start
        assert found == expected


def test_a_servers_side_has_no_preface() -> None:
    """The first bytes of the other direction are a frame."""
    data = frame(0, 1, message(8_000, 1))
    (found,) = PayloadFinder(from_client=False).ranges(data)
    assert data[slice(*found)] == bytes([1]) * 4_000
