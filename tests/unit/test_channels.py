"""What a failed call stands for, whatever a server says."""

from pathlib import Path

import grpc
import grpc.aio
import pytest

from paceline.channels import Access, error_of_status
from paceline_wire.errors import ERROR_METADATA_KEY, NEWEST_INCARNATION_KEY, InvalidInputError, SupersededError


@pytest.mark.parametrize(
    ("said", "newest"), [("12", 12), (str((1 << 64) - 1), (1 << 64) - 1), ("", None), ("-1", None), ("9" * 5000, None)]
)
def test_a_superseding_incarnation_is_a_number_or_nothing(said: str, newest: int | None) -> None:
    """No server can make a worker fail with anything but the error."""
    metadata = grpc.aio.Metadata((ERROR_METADATA_KEY, "SupersededError"), (NEWEST_INCARNATION_KEY, said))
    error = error_of_status(grpc.StatusCode.ABORTED, "gone", metadata, "there:1")
    assert isinstance(error, SupersededError)
    assert error.newest_incarnation == newest


@pytest.mark.parametrize("token", ["two\nlines", "caf\u00e9", "\x00"])
def test_what_cannot_be_a_token_is_said_at_once(token: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token of several lines or other letters is refused in a sentence; gRPC would fail in words of its own."""
    with pytest.raises(InvalidInputError, match="the token is no token"):
        Access.of(None, token)
    file = tmp_path / "token"
    file.write_text(token)
    monkeypatch.delenv("PACELINE_TOKEN", raising=False)
    monkeypatch.setenv("PACELINE_TOKEN_FILE", str(file))
    with pytest.raises(InvalidInputError, match=r"what is in the token file .* is no token"):
        Access.of(None, None)
    file.write_text(" secret\n")
    assert Access.of(None, None).metadata == (("authorization", "Bearer secret"),)


def test_a_token_is_not_in_what_is_printed() -> None:
    """Whoever logs what a worker connects with, or a traceback that has it, shows no token."""
    access = Access(token="correct-horse")
    assert "correct-horse" in str(access.metadata)
    assert "correct-horse" not in repr(access)
