"""Reads from /proc what a process takes: memory that it has resident and how fast that grows, CPU seconds."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

MIB = 1024 * 1024


def resident_mib(pid: int) -> float:
    """MiB that a process has resident now."""
    return _status_mib(pid, "VmRSS")


def peak_resident_mib(pid: int) -> float:
    """The most MiB that a process has had resident since it began."""
    return _status_mib(pid, "VmHWM")


def cpu_s(pid: int) -> float:
    """User and system seconds of one process; the command's name, in brackets before them, may hold anything."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def slope(points: Sequence[tuple[float, float]]) -> float:
    """The slope of the straight line that fits points (x, y) best by least squares.

    Raises:
        ValueError: There are fewer than two different x.
    """
    mean_x = sum(x for x, _ in points) / max(1, len(points))
    mean_y = sum(y for _, y in points) / max(1, len(points))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    if spread == 0:
        raise ValueError("a slope needs points at different x")
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread


def _status_mib(pid: int, field: str) -> float:
    match = re.search(rf"^{field}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(encoding="ascii"), re.MULTILINE)
    if match is None:
        raise ProcessLookupError(f"process {pid} has no {field}: it has ended")
    return int(match[1]) / 1024
