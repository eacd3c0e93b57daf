"""The starter of shards' processes, where one of them is gone."""

import subprocess
import sys

import pytest

from paceline_server.processes import _ended, _next_line, _tell
from paceline_wire.errors import UnavailableError


def test_a_shard_that_has_ended_says_so_with_a_sentence() -> None:
    """Not the pipe that broke when it was to be told something; and the others are still waited for."""
    process = subprocess.Popen([sys.executable, "-c", ""], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    process.wait()
    _tell(process, {"ports": [1]})
    with pytest.raises(UnavailableError, match="ended with code 0 before it served"):
        _next_line(process)
    assert _ended(process) == 0
