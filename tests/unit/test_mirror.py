"""The place to which snapshots are copied, where it cannot be reached."""

import socket
from pathlib import Path

import pytest

from paceline_server.storage.mirror import Mirror
from paceline_wire.errors import ConfigurationError, StorageError


def test_a_password_in_its_url_is_shown_nowhere(tmp_path: Path) -> None:
    """Neither by a start that fails nor in the log of a running shard; the rest of the URL is."""
    with socket.socket() as taken:
        # Bound and not listening: nobody else gets the port, and who connects is refused.
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        with pytest.raises(ConfigurationError, match=rf"ftp://me:\*\*\*@127.0.0.1:{port}/run") as refused:
            Mirror(f"ftp://me:correct-horse@127.0.0.1:{port}/run", 0, 2)
    assert "correct-horse" not in str(refused.value)
    mirror = Mirror("memory://me:correct-horse@host/run", 0, 2)
    with pytest.raises(StorageError, match="cannot be written") as failed:
        mirror.put(tmp_path / "missing")
    assert "correct-horse" not in str(failed.value)
