"""What a failed call stands for, whatever a server says."""

import grpc
import grpc.aio
import pytest

from paceline.channels import Access, error_of_status
from paceline_wire.errors import ERROR_METADATA_KEY, NEWEST_INCARNATION_KEY, SupersededError


@pytest.mark.parametrize(
    ("said", "newest"), [("12", 12), (str((1 << 64) - 1), (1 << 64) - 1), ("", None), ("-1", None), ("9" * 5000, None)]
)
def test_a_superseding_incarnation_is_a_number_or_nothing(said: str, newest: int | None) -> None:
    """No server can make a worker fail with anything but the error."""
    metadata = grpc.aio.Metadata((ERROR_METADATA_KEY, "SupersededError"), (NEWEST_INCARNATION_KEY, said))
    error = error_of_status(grpc.StatusCode.ABORTED, "gone", metadata, "there:1")
    assert isinstance(error, SupersededError)
    assert error.newest_incarnation == newest


def test_a_token_is_not_in_what_is_printed() -> None:
    """Whoever logs what a worker connects with, or a traceback that has it, shows no token."""
    access = Access(token="correct-horse")
    assert "correct-horse" in str(access.metadata)
    assert "correct-horse" not in repr(access)
