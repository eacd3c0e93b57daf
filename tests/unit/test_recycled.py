"""Recycled memory: never while a tensor sees it, and never more of it than is in use."""

import gc
import threading

import pytest
import torch

from paceline_wire import recycled
from paceline_wire.recycled import LEAST_BYTES, LEAST_SPARE_BYTES, Recycler

SIZE = LEAST_BYTES // 4


def test_memory_is_used_again_once_no_view_sees_it() -> None:
    """The last view counts, also one as numpy sees it, not the tensor that was handed out."""
    memory = Recycler()
    first = memory.empty(SIZE)
    where, view = first.data_ptr(), first[5:7].numpy()
    del first
    assert memory.spare_bytes == 0
    assert memory.empty(SIZE).data_ptr() != where
    del view
    assert where in {tensor.data_ptr() for tensor in [memory.empty(SIZE) for _ in range(2)]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("num_elements", [0, 1, SIZE, 4 * SIZE + 3])
def test_tensors_are_like_any_others(num_elements: int, dtype: torch.dtype) -> None:
    """Shape, type, alignment, and that they can be written."""
    tensor = Recycler().empty(num_elements, dtype).fill_(3)
    assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == ((num_elements,), dtype, True)
    assert num_elements < SIZE or tensor.data_ptr() % 64 == 0
    assert bool((tensor == 3).all())


def test_no_more_is_spare_than_is_in_use() -> None:
    """Of blocks that nobody needs any more a little is kept; what was given back first goes first."""
    memory = Recycler()
    blocks = LEAST_SPARE_BYTES // LEAST_BYTES
    kept = [memory.empty(SIZE) for _ in range(2 * blocks)]
    dropped = [memory.empty(2 * SIZE) for _ in range(2 * blocks)]
    del dropped
    assert memory.spare_bytes == 2 * LEAST_SPARE_BYTES
    kept.clear()
    assert memory.spare_bytes == LEAST_SPARE_BYTES
    memory.drop_spare()
    assert memory.spare_bytes == 0


def test_threads_and_collections_of_garbage_lose_no_block() -> None:
    """All that was taken is spare in the end, and no two had the same memory at once."""
    memory, clashes = Recycler(), list[int]()

    def work(number: int) -> None:
        for _ in range(200):
            tensor = memory.empty(SIZE).fill_(number)
            cycle: list[object] = [tensor]
            cycle.append(cycle)
            if not bool((tensor[::4096] == number).all()):
                clashes.append(number)
            del tensor, cycle

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gc.collect()
    assert not clashes
    assert LEAST_BYTES <= memory.spare_bytes <= LEAST_SPARE_BYTES


def test_what_is_spare_can_be_freed() -> None:
    """In the process's own."""
    where = recycled.empty(SIZE).data_ptr()
    assert recycled.empty(SIZE).data_ptr() == where
    recycled.drop_spare()
