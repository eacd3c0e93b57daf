"""Keeps malloc from giving every large buffer back to the kernel, which costs page faults for each message anew."""

import ctypes
import functools

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8
_LARGEST_KEPT_BYTES = 1 << 30
_NEVER_TRIM = (1 << 31) - 1


@functools.cache
def keep_large_buffers() -> bool:
    """Let this process reuse freed buffers of up to 1 GiB; whether the C library took the settings.

    glibc maps every block above 128 KiB afresh and unmaps it when it is freed, so each message and each fragment would
    pay for zeroed pages: half of the throughput here. Only glibc has these settings; elsewhere nothing changes. Call it
    before the first large buffer.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # One arena: those that threads get of their own are too small for fragments, and are mapped afresh all the same.
    settings = ((_M_MMAP_THRESHOLD, _LARGEST_KEPT_BYTES), (_M_TRIM_THRESHOLD, _NEVER_TRIM), (_M_ARENA_MAX, 1))
    return all(mallopt(setting, value) for setting, value in settings)
