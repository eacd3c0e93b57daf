"""Does what time alone makes due in a shard: silences that are too long, grace windows, and what may be forgotten."""

import asyncio
import logging

from paceline_server.engine import Engine
from paceline_wire.errors import StorageFullError

_log = logging.getLogger(__name__)

FULL_DISK_S = 1.0
"""Seconds between attempts to close bins that are due while the disk is full."""

FORGET_EVERY_S = 60.0
"""Seconds between looks for workers that have been gone for so long that nothing of them need be kept."""

OVERSLEPT_S = 0.1
"""Lateness from which on the process counts as having been stopped, or too busy to read what workers sent."""


async def watch_time(engine: Engine) -> None:
    """Watch over a shard; runs until cancelled."""
    wake_s, forget_s = engine.clock(), engine.clock() + FORGET_EVERY_S
    while True:
        if engine.clock() > wake_s + OVERSLEPT_S:
            # What workers sent meanwhile must be read before they are judged by it.
            await asyncio.sleep(engine.shard.membership.heartbeat_s)
        await _give_up_silent_workers(engine)
        if engine.clock() >= forget_s:
            engine.forget_gone()
            forget_s = engine.clock() + FORGET_EVERY_S
        await _close_due_bins(engine)
        wake_s = _next_look_s(engine)
        await engine.wait_for_roster(wake_s - engine.clock())


async def _give_up_silent_workers(engine: Engine) -> None:
    sentences = engine.shard.membership.expire(engine.clock())
    for sentence in sentences:
        _log.info("%s", sentence)
    if sentences:
        await engine.membership_changed()
    engine.end_streams_of_others()


async def _close_due_bins(engine: Engine) -> None:
    try:
        await engine.close_due_bins()
    except StorageFullError as error:
        _log.warning("a bin that is due cannot close: %s", error)
        await asyncio.sleep(FULL_DISK_S)


def _next_look_s(engine: Engine) -> float:
    """When something may be due: what is known to be, or a silence that a heartbeat from now on may allow less of."""
    now_s, next_s = engine.clock(), engine.shard.next_event_s()
    earliest_s = now_s + engine.shard.membership.shortest_silence_s
    return earliest_s if next_s is None else max(now_s, min(next_s, earliest_s))
