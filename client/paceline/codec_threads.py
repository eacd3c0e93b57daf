"""The process's threads for encoding and decoding, beside the event loop and the training thread."""

import asyncio
import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar, TypeVarTuple

import torch
from threadpoolctl import threadpool_limits

_Result = TypeVar("_Result")
_Arguments = TypeVarTuple("_Arguments")

MAX_THREADS = 2
"""Two keep up with any wide-area link; more would only take cores from training."""


async def in_codec_thread(work: Callable[[*_Arguments], _Result], *arguments: *_Arguments) -> _Result:
    """Run work that does not return at once on a codec thread, and wait for it."""
    return await asyncio.get_running_loop().run_in_executor(_threads(), work, *arguments)


async def in_codec_thread_to_its_end(work: Callable[[*_Arguments], _Result], *arguments: *_Arguments) -> _Result:
    """The same for work that writes to what others go on with: cancelled, it waits until the thread is done with it."""
    working = asyncio.ensure_future(in_codec_thread(work, *arguments))
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        await asyncio.wait((working,))
        raise


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(
        max_workers=min(MAX_THREADS, os.cpu_count() or 1),
        thread_name_prefix="paceline-codec",
        initializer=_stay_single_threaded,
    )


def _stay_single_threaded() -> None:
    """Keep torch from starting a team of OpenMP threads under this one, which would spin beside the training thread.

    torch.set_num_threads would change the training thread's too; OpenMP's own limit is this thread's alone. torch sets
    it once, at a thread's first use, so that has to come before.
    """
    torch.get_num_threads()
    threadpool_limits(limits=1, user_api="openmp")
