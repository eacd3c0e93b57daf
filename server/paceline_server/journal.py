"""Where a shard writes what it decided before anybody is told, so that it can be replayed into the same state.

A shard's state is a function of the records in the order of `append`, and of nothing else: numbers follow decisions
(fragment.py), and a decision carries all that the clock and the membership contributed to it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from paceline_server.ledger import Decision, Ledger, PushRequest
from paceline_server.membership import MembershipState
from paceline_wire.manifest import Manifest


@dataclass(frozen=True, kw_only=True)
class Configured:
    """The shard was started with a configuration; what follows was computed with its outer rule.

    Attributes:
        config: The configuration as a nested mapping of values that JSON has, without secrets and local paths.
    """

    config: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Initialized:
    """The run got its manifest; parameters that came before are void.

    Attributes:
        manifest: The tensors and their cut.
        initialization_id: Whose parameters were taken.
        shard: The shard's index.
        num_shards: Shards among which the fragments are divided.
    """

    manifest: Manifest
    initialization_id: int
    shard: int
    num_shards: int


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


@dataclass(frozen=True, kw_only=True)
class MembershipChanged:
    """Workers joined, left, or were given up.

    Attributes:
        time_s: When, in seconds of the engine's clock.
        membership: The membership afterwards.
    """

    time_s: float
    membership: MembershipState


Record = Configured | Initialized | FragmentInitialized | Decided | MembershipChanged


class Journal(Protocol):
    """Something that keeps records."""

    async def append(self, record: Record) -> int:
        """Keep a record; returns its number, from 1 and without gaps, when it is as safe as the journal promises.

        Records of one fragment are appended one after the other; those of different fragments may overlap, and are
        numbered in the order of the calls.

        Raises:
            StorageFullError: There is no room for it; nothing was kept, and a later call may succeed.
            StorageError: The journal failed for good; whether the record was kept shows at the next start.
        """

    def refuse_when_full(self) -> None:
        """Say so before a push is received, if there was no room for the last record and there still is none.

        Raises:
            StorageFullError: There is no room.
        """

    async def close(self) -> None:
        """Finish what was begun."""


class NoJournal:
    """Keeps nothing: the state lives and dies with the process."""

    async def append(self, record: Record) -> int:
        """Forget the record; its number is 0."""
        return 0

    def refuse_when_full(self) -> None:
        """There is always room for nothing."""

    async def close(self) -> None:
        """Do nothing."""
