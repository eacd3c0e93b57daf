"""Keeps malloc from giving every large buffer back to the kernel, which costs page faults for each message anew.

What it keeps of a phase whose buffers do not come again is given back when that phase is over.
"""

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


def give_back_free_memory() -> None:
    """Give all that is free in the heap back to the kernel, also between what is in use.

    For the end of a phase whose buffers do not come again: buffers that do would only have to be faulted in anew. Takes
    some milliseconds: call it beside the event loop. Only glibc has it; elsewhere nothing changes.
    """
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)
