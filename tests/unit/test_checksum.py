"""Whichever code computes a checksum, its value is zlib's."""

import random
import sys
import zlib

import pytest

from paceline_wire import checksum


@pytest.mark.parametrize("size", [0, 1, 255, 4096, 100_001])
def test_the_values_are_those_of_zlib(size: int) -> None:
    """In one piece, and in two."""
    data = random.Random(size).randbytes(size)
    assert checksum.crc32(data) == zlib.crc32(data)
    assert checksum.crc32(memoryview(data)[size // 3 :], checksum.crc32(data[: size // 3])) == zlib.crc32(data)


def test_without_isal_it_is_zlib(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package is not needed."""
    monkeypatch.setitem(sys.modules, "isal.isal_zlib", None)
    assert checksum.fastest() is zlib.crc32
