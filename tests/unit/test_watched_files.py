"""Files that are read again when they change: what counts as a change, and what a fault changes."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from paceline_server.security.watched import WatchedFiles
from paceline_wire.errors import ConfigurationError


class Reader:
    """Reads a file, unless it is told to fail."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.error: Exception | None = None
        self.num_reads = 0

    def __call__(self) -> str:
        """What the file says."""
        self.num_reads += 1
        if self.error is not None:
            raise self.error
        return self.path.read_text()


@pytest.fixture
def reader(tmp_path: Path) -> Reader:
    """A reader of a file that says "first"."""
    path = tmp_path / "file"
    path.write_text("first")
    return Reader(path)


def test_it_is_read_when_it_changes_and_only_then(reader: Reader, tmp_path: Path) -> None:
    """Written in place, replaced by another of the same size and age, removed and put back."""
    watched = WatchedFiles([reader.path], reader)
    assert not watched.look()
    assert reader.num_reads == 1
    reader.path.write_text("second")
    assert watched.look()
    (tmp_path / "new").write_text("secure")
    (tmp_path / "new").replace(reader.path)
    assert watched.look()
    assert watched.content == "secure"
    assert not watched.look()
    assert reader.num_reads == 3


@pytest.mark.parametrize("error", [ConfigurationError("no id"), RuntimeError("a parser's own")])
def test_a_fault_is_told_once_and_what_was_said_before_stays(
    reader: Reader, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    """At every look it is tried again, since the fault may be the machine's; another fault is told again."""
    watched = WatchedFiles([reader.path], reader)
    reader.path.write_text("second")
    reader.error = error
    with caplog.at_level(logging.INFO):
        assert [watched.look() for _ in range(3)] == [False] * 3
        assert [str(error) in record.getMessage() for record in caplog.records] == [True]
        reader.error = ConfigurationError("something else")
        assert not watched.look()
        assert len(caplog.records) == 2
        reader.path.write_text("third")
        assert not watched.look()
        assert len(caplog.records) == 3
        assert watched.content == "first"
        reader.error = None
        assert watched.look()
    assert watched.content == "third"
    assert "read again" in caplog.records[-1].getMessage()


def test_whoever_begins_with_a_fault_does_not_begin(reader: Reader) -> None:
    """At the start there is nothing that could stay."""
    reader.error = ConfigurationError("no id")
    with pytest.raises(ConfigurationError, match="no id"):
        WatchedFiles([reader.path], reader)


@pytest.mark.parametrize(
    "change", [lambda path: path.unlink(), lambda path: path.chmod(0o640)], ids=["removed", "another mode"]
)
def test_these_are_changes_too(reader: Reader, change: Callable[[Path], None]) -> None:
    """A file that is gone, and one whose mode was set: it may be readable now."""
    watched = WatchedFiles([reader.path], reader)
    change(reader.path)
    watched.look()
    assert reader.num_reads == 2
