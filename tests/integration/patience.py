"""Waiting for what other processes and threads do, within bounds."""

import asyncio
import time
from collections.abc import Awaitable, Callable

PATIENCE_S = 30.0
"""A bound on every wait, so that what never happens fails a test instead of hanging it."""

_PAUSE_S = 0.005


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s, "what was waited for did not happen"
        time.sleep(_PAUSE_S)


async def wait_until_async(condition: Callable[[], Awaitable[bool]]) -> None:
    """Wait until a condition holds, on the event loop."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not await condition():
        assert time.monotonic() < deadline_s, "what was waited for did not happen"
        await asyncio.sleep(_PAUSE_S)
