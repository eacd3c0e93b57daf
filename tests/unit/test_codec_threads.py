"""Work on codec threads: what is cancelled may go on writing, unless it was waited for."""

import asyncio
import threading

import pytest

from paceline.codec_threads import in_codec_thread_to_its_end


async def test_cancelled_work_that_writes_is_waited_for() -> None:
    """Whoever cancels it and waits knows that the thread has ended."""
    begun, may_end, ended = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        may_end.wait(timeout=30)
        ended.set()

    task = asyncio.create_task(in_codec_thread_to_its_end(work))
    await asyncio.to_thread(begun.wait, 30)
    task.cancel()
    await asyncio.wait((task,), timeout=0.05)
    assert not task.done()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()


async def test_what_the_work_returns_or_raises_comes_through() -> None:
    """As of any call."""
    assert await in_codec_thread_to_its_end(divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        await in_codec_thread_to_its_end(divmod, 7, 0)
