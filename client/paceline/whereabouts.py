"""Shards that move: a cluster may start one again on another host, and its workers have to hear of it from somebody."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TypeAlias

_log = logging.getLogger(__name__)

Locate: TypeAlias = Callable[[], Sequence[str]]
"""Says where a run's shards are now: "host:port" of every shard, in order.

Called about every half second on the event loop, so it must answer at once, from what it knows. An empty sequence says
that nothing is known now.
"""

LOOK_EVERY_S = 0.5
"""Seconds between two questions: small beside the seconds in which a cluster starts a shard again."""


async def moves(locate: Locate, targets: Sequence[str]) -> AsyncIterator[tuple[int, str]]:
    """Every shard that is no longer at its target, with the address at which it is now, for ever.

    Args:
        locate: Who knows.
        targets: "host:port" of every shard; whoever iterates changes it before going on.
    """
    while True:
        for shard, target in enumerate(_located(locate, len(targets))):
            if target != targets[shard]:
                yield shard, target
        await asyncio.sleep(LOOK_EVERY_S)


def _located(locate: Locate, num_shards: int) -> Sequence[str]:
    try:
        located = locate()
    except Exception:  # noqa: BLE001  # a user's function: the shards that have not moved are still there
        _log.warning("locate failed; the shards are taken to be where they were", exc_info=True)
        return ()
    if located and len(located) != num_shards:
        _log.warning("locate names %d shards, and the run has %d: its answer is not used", len(located), num_shards)
        return ()
    return located
