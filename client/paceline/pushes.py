"""A push that was handed to a shard's connection, and whoever waits for its update."""

import asyncio
from dataclasses import dataclass

from paceline.fragments import Destination
from paceline.worker import ReceivedUpdate
from paceline_wire.transfer import Outgoing


@dataclass(frozen=True, kw_only=True, eq=False)
class OutgoingPush:
    """An encoded outer gradient on its way.

    Attributes:
        fragment: The fragment's index.
        seq: Counts this incarnation's pushes to the fragment from 1.
        base_bin: The bin of the newest values that the worker held.
        outer_gradient: The encoding; its bytes MUST not change until the update comes.
        tokens: Tokens or samples that it stands for; None if nobody counted them.
        into: Where the values that answer it are written before it is answered; the update's own then change with the
            fragment's next one. Given with all pushes of a connection or with none. None: nowhere.
    """

    fragment: int
    seq: int
    base_bin: int
    outer_gradient: Outgoing
    tokens: int | None = None
    into: Destination | None = None


@dataclass(eq=False)
class Unanswered:
    """A push, and the update that will answer it."""

    push: OutgoingPush
    update: "asyncio.Future[ReceivedUpdate]"
