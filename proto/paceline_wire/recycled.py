"""Memory for large tensors that come and go with every fragment: used again once no tensor sees it.

A fresh page costs 1.4 microseconds (measured on a virtual machine): 100 million float32 would be 0.14 seconds. malloc
gives the same memory again only by chance, whatever its thresholds (memory.py): buffers of other sizes come between. So
a client's exchange of 100 million parameters faulted in 1,000 to 12,000 pages, where it now mostly faults in none.
"""

import threading
import weakref
from collections import deque

import numpy as np
import numpy.typing as npt
import torch

LEAST_BYTES = 1024 * 1024
"""Smaller tensors are left to malloc."""

LEAST_SPARE_BYTES = 64 * 1024 * 1024
"""What may wait to be used again, however little is in use."""

_ALIGNMENT = 64
_Block = npt.NDArray[np.uint8]


class Recycler:
    """Blocks of memory, each either seen by tensors or spare. To be used from any thread.

    What is spare is never more than what is in use, but for LEAST_SPARE_BYTES; what was given back first goes first.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spare: dict[int, list[_Block]] = {}
        self._returned: deque[_Block] = deque()
        self._used_bytes = self._spare_bytes = 0

    @property
    def spare_bytes(self) -> int:
        """Bytes that wait to be used again."""
        self._sort()
        return self._spare_bytes

    def empty(self, num_elements: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A tensor on the host of any content, [num_elements]."""
        num_bytes = num_elements * dtype.itemsize
        if num_bytes < LEAST_BYTES:
            return torch.empty(num_elements, dtype=dtype)
        self._sort()
        with self._lock:
            block = self._taken(num_bytes)
            self._used_bytes += num_bytes
        # The tensor's storage, which all views of it share, keeps this array until the last of them is gone.
        seen = block[:]
        weakref.finalize(seen, self._give, block).atexit = False
        return torch.from_numpy(seen).view(dtype)

    def drop_spare(self) -> None:
        """Free all that is spare."""
        self._sort()
        with self._lock:
            self._spare.clear()
            self._spare_bytes = 0

    def _taken(self, num_bytes: int) -> _Block:
        """A block out of the spare ones, else a new one. The lock is held."""
        spare = self._spare.get(num_bytes)
        if not spare:
            memory: _Block = np.empty(num_bytes + _ALIGNMENT, np.uint8)
            start = -memory.ctypes.data % _ALIGNMENT
            return memory[start : start + num_bytes]
        self._spare_bytes -= num_bytes
        return spare.pop()

    def _give(self, block: _Block) -> None:
        # A collection of garbage may call this in the middle of anything, also where this thread has the lock.
        self._returned.append(block)
        self._sort()

    def _sort(self) -> None:
        """Make what was returned spare, unless another call is at it: what it misses, the next one finds."""
        while self._returned and self._lock.acquire(blocking=False):
            try:
                self._sort_in()
            finally:
                self._lock.release()

    def _sort_in(self) -> None:
        while self._returned:
            block = self._returned.popleft()
            blocks = self._spare.pop(block.nbytes, [])
            blocks.append(block)
            self._spare[block.nbytes] = blocks
            self._used_bytes -= block.nbytes
            self._spare_bytes += block.nbytes
        while self._spare_bytes > max(self._used_bytes, LEAST_SPARE_BYTES):
            oldest = next(iter(self._spare))
            if self._spare[oldest]:
                self._spare[oldest].pop()
                self._spare_bytes -= oldest
            else:
                del self._spare[oldest]


_recycler = Recycler()


def empty(num_elements: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor on the host of any content, [num_elements], in this process's recycled memory if it is large."""
    return _recycler.empty(num_elements, dtype)


def drop_spare() -> None:
    """Free what waits to be used again in this process."""
    _recycler.drop_spare()
