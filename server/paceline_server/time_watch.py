"""Does what time alone makes due in a shard: silences that are too long, grace windows, and what may be forgotten."""

import asyncio
import logging

from paceline_server.attention import Attention
from paceline_server.engine import Engine
from paceline_wire.errors import StorageFullError

_log = logging.getLogger(__name__)

FULL_DISK_S = 1.0
"""Seconds between attempts to close bins that are due while the disk is full."""

FORGET_EVERY_S = 60.0
"""Seconds between looks for workers that have been gone for so long that nothing of them need be kept."""


async def watch_time(engine: Engine) -> None:
    """Watch over a shard; runs until cancelled."""
    attention = Attention(engine.shard.membership.heartbeat_s)
    due_s, forget_s = engine.clock(), engine.clock() + FORGET_EVERY_S
    while True:
        if attention.look(engine.clock(), due_s):
            await _give_up_silent_workers(engine)
        if engine.clock() >= forget_s:
            engine.forget_gone()
            forget_s = engine.clock() + FORGET_EVERY_S
        await engine.keep_membership()
        await _close_due_bins(engine)
        due_s = _next_look_s(engine, attention.judges_at_s)
        await engine.wait_for_roster(max(0.0, due_s - engine.clock()))


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


def _next_look_s(engine: Engine, judges_at_s: float | None) -> float:
    """When something may be due: what is known to be, or a silence that a heartbeat from now on may allow less of.

    A silence that ran out while bins were closed lies in the past: the next look is late then, and nobody is judged
    before what came meanwhile is read.
    """
    now_s, shard = engine.clock(), engine.shard
    close_s, expiry_s = shard.next_close_s(), shard.membership.next_expiry_s()
    times = [
        now_s + shard.membership.shortest_silence_s,
        judges_at_s if judges_at_s is not None else expiry_s,
        None if close_s is None else max(now_s, close_s),
    ]
    return min(time_s for time_s in times if time_s is not None)
