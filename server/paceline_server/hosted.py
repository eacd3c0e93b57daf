"""A fragment that lives on a shard, its numbers and its bookkeeping together, and copies of it."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from paceline_server.fragment import FragmentValues
from paceline_server.ledger import Ledger
from paceline_server.rules.base import Contribution
from paceline_wire.manifest import Fragment


@dataclass(frozen=True, kw_only=True)
class FragmentMeta:
    """What a fragment's state is besides its vectors.

    Attributes:
        record: The newest record of the journal that it includes.
        open_bin: The bin that the numbers are in.
        newest: The newest contribution; None before the first.
        ledger: Its bookkeeping.
        norms: L2 norms of its latest pushes, as guard.py keeps them.
    """

    record: int
    open_bin: int
    newest: Contribution | None
    ledger: Ledger
    norms: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class FragmentCopy:
    """A fragment's state at one moment, apart from the live one.

    Attributes:
        vectors: w and the rule's vectors by name, float32 [n] each.
        meta: The rest.
    """

    vectors: Mapping[str, torch.Tensor]
    meta: FragmentMeta


@dataclass
class HostedFragment:
    """A fragment that lives on this shard.

    Attributes:
        plan: Its place in the plan.
        values: Its numbers; None until initialized.
        ledger: Its bookkeeping.
        record: The newest record of the journal that both include; 0: none.
        norms: L2 norms of its latest pushes, as guard.py keeps them.
    """

    plan: Fragment
    values: FragmentValues | None
    ledger: Ledger
    record: int = 0
    norms: tuple[float, ...] = ()

    def copied(self) -> FragmentCopy:
        """A copy that stays as it is while the fragment goes on; the fragment must have its numbers."""
        if self.values is None:
            raise ValueError(f"fragment {self.plan.index} has no numbers to copy")
        meta = FragmentMeta(
            record=self.record,
            open_bin=self.values.open_bin,
            newest=self.values.newest,
            ledger=self.ledger,
            norms=self.norms,
        )
        return FragmentCopy(vectors={name: vector.clone() for name, vector in self.values.vectors.items()}, meta=meta)
