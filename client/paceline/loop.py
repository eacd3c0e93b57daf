"""The process's one event loop for joined workers, on a daemon thread beside the training thread.

gRPC's asyncio objects of one process must share a loop: with several, its poller wakes the wrong ones. So every `join`
in a process uses this one; it is started by the first and idles when nobody has joined.
"""

import asyncio
import threading

import uvloop

_starting = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None


def exchange_loop() -> asyncio.AbstractEventLoop:
    """The running loop; hand it work with asyncio.run_coroutine_threadsafe."""
    global _loop
    with _starting:
        if _loop is None:
            _loop = uvloop.new_event_loop()
            threading.Thread(target=_loop.run_forever, name="paceline-exchange", daemon=True).start()
        return _loop
