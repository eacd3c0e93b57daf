"""What a process holds: memory, files, threads, and tasks of its event loop."""

import ctypes
import gc
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Self

MOST_GROWTH_BYTES = 32 << 20
"""What may come in without being a leak: buffers that are kept, caches that fill."""

MOST_MORE = 4
"""Files and threads more than before that pools may have opened."""


@dataclass(frozen=True, kw_only=True)
class Resources:
    """One look.

    Attributes:
        resident_bytes: Memory.
        files: Open file descriptors.
        threads: Python's threads.
    """

    resident_bytes: int
    files: int
    threads: int

    @classmethod
    def now(cls) -> Self:
        """Look, after what is garbage was thrown away."""
        gc.collect()
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
        return cls(
            resident_bytes=resident_bytes(os.getpid()),
            files=open_files(os.getpid()),
            threads=threading.active_count(),
        )

    def grown_since(self) -> str | None:
        """What the process holds more of now than may be, in a sentence; None if it does not."""
        now = Resources.now()
        more = now.resident_bytes - self.resident_bytes
        if more > MOST_GROWTH_BYTES:
            return f"memory grew by {more >> 20} MiB"
        for name in ("files", "threads"):
            before, after = getattr(self, name), getattr(now, name)
            if after > before + MOST_MORE:
                return f"{name} grew from {before} to {after}"
        return None


def resident_bytes(pid: int) -> int:
    """The resident size of a process."""
    pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGESIZE")


def open_files(pid: int) -> int:
    """Descriptors that a process has open."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))
