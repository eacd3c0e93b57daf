"""Shifts the wall clock of a process that chaos starts, by the seconds that a file holds, whenever the clock is read.

Python imports a module of this name by itself when it starts; chaos puts this folder on PYTHONPATH, and the file's path
in the variable below. The monotonic clock stays as it is, as it does when somebody sets a host's clock.
"""

import os
import sys
import time
from pathlib import Path

VARIABLE = "CHAOS_CLOCK_FILE"
"""Not one of the server's own prefix, since it refuses variables of that which it does not know."""


def shift(path: Path) -> None:
    """Let time.time and time.time_ns follow the file, and write every shift that was read to the file beside it."""
    real, real_ns = time.time, time.time_ns
    seen = {0.0}

    def offset_s() -> float:
        try:
            found = float(path.read_text() or 0)
        except (OSError, ValueError):
            return 0.0
        if found not in seen:
            seen.add(found)
            with seen_path(path).open("a") as notes:
                notes.write(f"{found!r}\n")
        return found

    def shifted() -> float:
        # gRPC's deadlines are made of this clock in Python and read with the system's in C: both must be the same.
        if str(sys._getframe(1).f_globals.get("__name__", "")).startswith("grpc"):
            return real()
        return real() + offset_s()

    time.time = shifted
    time.time_ns = lambda: real_ns() + round(offset_s() * 1e9)


def seen_path(path: Path) -> Path:
    """Where the shifts that a process has read are noted, one a line."""
    return path.with_name(path.name + ".seen")


if VARIABLE in os.environ:
    shift(Path(os.environ[VARIABLE]))
