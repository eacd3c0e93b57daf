"""An event loop whose time passes at once: what sleeps is woken in order, and nobody waits for it."""

import asyncio
import selectors
import time
from collections.abc import Callable, Coroutine
from typing import Any

BOUND_S = 10.0
"""Seconds of real time that a scenario may take, so that what never happens fails a test instead of hanging it."""


class _Jumping(selectors.DefaultSelector):
    """Passes the time that it is asked to wait, instead of waiting."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 1000.0
        self._deadline_s = time.monotonic() + BOUND_S

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        left_s = self._deadline_s - time.monotonic()
        # Without a timeout another thread is waited for.
        ready = super().select(0 if timeout is not None else max(0.0, left_s))
        if left_s < 0 or (timeout is None and not ready):
            self._deadline_s += BOUND_S  # for the end of what is still running
            raise TimeoutError("what was waited for did not happen")
        if not ready and timeout is not None:
            self.now_s += max(0.0, timeout)
        return ready


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """An event loop in virtual time, in seconds from 1000 on."""

    def __init__(self) -> None:
        self._jumping = _Jumping()
        super().__init__(self._jumping)

    def time(self) -> float:
        """Now."""
        return self._jumping.now_s


def play(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a scenario to its end in virtual time."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.run(scenario())


async def seconds(waiting: Coroutine[Any, Any, Any]) -> float:
    """How many seconds something takes."""
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    await waiting
    return loop.time() - began_s
