"""Where a shard writes what it decided before anybody is told, so that it can be replayed into the same state.

A shard's state is a function of the records in the order of `append`, and of nothing else: numbers follow decisions
(fragment.py), and a decision carries all that the clock and the membership contributed to it.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from paceline_server.ledger import Decision, Ledger, PushRequest
from paceline_wire.manifest import Manifest


@dataclass(frozen=True, kw_only=True)
class Initialized:
    """The run got its manifest.

    Attributes:
        manifest: The tensors and their cut.
        initialization_id: Whose parameters were taken.
    """

    manifest: Manifest
    initialization_id: int


@dataclass(frozen=True, kw_only=True)
class FragmentInitialized:
    """A fragment got its first parameters.

    Attributes:
        fragment: Its index.
        payload: The parameters in fp32 (uint8 [4 n]).
    """

    fragment: int
    payload: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Decided:
    """An event changed a fragment.

    Attributes:
        fragment: Its index.
        time_s: When it was decided, in seconds of the engine's clock.
        push: The push that was decided about; None if it was time or a change of membership that closed a bin.
        decision: What happens to its numbers.
        ledger: Its bookkeeping afterwards.
        codec: Name of the codec of the push; None if no push enters.
        payload: The push as it was received (uint8 [m]); None if no push enters.
        norm: The push's L2 norm, whether it enters or not; None if there is no push, or it is not finite.
    """

    fragment: int
    time_s: float
    push: PushRequest | None
    decision: Decision
    ledger: Ledger
    codec: str | None = None
    payload: torch.Tensor | None = None
    norm: float | None = None


Record = Initialized | FragmentInitialized | Decided


class Journal(Protocol):
    """Something that keeps records."""

    async def append(self, record: Record) -> None:
        """Keep a record; returns when it is as safe as the journal promises.

        Records of one fragment are appended one after the other; those of different fragments may overlap.
        """

    async def close(self) -> None:
        """Finish what was begun."""


class NoJournal:
    """Keeps nothing: the state lives and dies with the process."""

    async def append(self, record: Record) -> None:
        """Forget the record."""

    async def close(self) -> None:
        """Do nothing."""
