"""Who takes part in the run: workers with leases, indexes and speeds. Pure: time is an argument, nothing waits.

Rules:

1. A worker is active from its join until it leaves or its lease runs out; every sign of life renews the lease.
2. A higher incarnation supersedes a lower one of the same worker at once; the lower one is refused from then on.
3. An index is the lowest one that no active worker has, and a worker keeps it while it is active.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from paceline_wire.errors import InvalidInputError, NotAMemberError, SupersededError

_WORKER_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


@dataclass(frozen=True, kw_only=True)
class Member:
    """One active worker.

    Attributes:
        worker: Its name.
        incarnation: Grows with every start of the worker.
        index: Its number among the active workers.
        seen_s: When it last gave a sign of life, in seconds of the caller's clock.
        inner_step_s: Mean seconds of its recent inner steps; None until it told.
    """

    worker: str
    incarnation: int
    index: int
    seen_s: float
    inner_step_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class MembershipState:
    """All that a membership must remember across a restart.

    Attributes:
        members: The active workers, in order of joining.
        newest_incarnation: The highest incarnation seen of each worker.
        most_active: The most workers that were ever active at once.
    """

    members: tuple[Member, ...] = ()
    newest_incarnation: Mapping[str, int] = field(default_factory=dict)
    most_active: int = 0


class Membership:
    """The active workers of a shard.

    Args:
        lease_s: Seconds without a sign of life after which a worker is no longer active.
        inner_steps: Inner steps in a round of the fastest worker (H).
        dynamic_inner_steps: Whether slower workers are given fewer (dynamic local updates).
    """

    def __init__(self, *, lease_s: float, inner_steps: int, dynamic_inner_steps: bool) -> None:
        self.lease_s = lease_s
        self._inner_steps = inner_steps
        self._dynamic = dynamic_inner_steps
        self._members: dict[str, Member] = {}
        self._newest_incarnation: dict[str, int] = {}
        self.most_active = 0

    @property
    def active(self) -> frozenset[str]:
        """Names of the active workers."""
        return frozenset(self._members)

    @property
    def members(self) -> Iterable[Member]:
        """The active workers, in order of joining."""
        return self._members.values()

    def state(self) -> MembershipState:
        """What must be remembered across a restart."""
        return MembershipState(
            members=tuple(self._members.values()),
            newest_incarnation=dict(self._newest_incarnation),
            most_active=self.most_active,
        )

    def restore(self, state: MembershipState, now: float) -> None:
        """Take up a remembered state; every member's lease begins anew, since nobody could renew it meanwhile."""
        self._members = {member.worker: replace(member, seen_s=now) for member in state.members}
        self._newest_incarnation = dict(state.newest_incarnation)
        self.most_active = state.most_active

    def join(self, now: float, worker: str, incarnation: int) -> tuple[Member, str]:
        """Make a worker active, or renew it; returns the member and what happened, in a sentence.

        Raises:
            InvalidInputError: The name or the incarnation is not allowed.
            SupersededError: A newer incarnation of the worker has joined.
        """
        if _WORKER_ID.fullmatch(worker) is None:
            raise InvalidInputError(
                f"worker_id {worker[:128]!r} is not allowed: use 1 to 128 letters, digits, '.', '_', ':' or '-'"
            )
        if incarnation < 1:
            raise InvalidInputError(
                f"incarnation {incarnation} of worker {worker!r} is not allowed: it must be positive"
            )
        self._refuse_superseded(worker, incarnation)
        known = self._members.get(worker)
        if known is not None and known.incarnation == incarnation:
            return self._renew(known, now), f"worker {worker} renewed its membership"
        index = known.index if known is not None else self._lowest_free_index()
        member = Member(worker=worker, incarnation=incarnation, index=index, seen_s=now)
        self._members[worker] = member
        self._newest_incarnation[worker] = incarnation
        self.most_active = max(self.most_active, len(self._members))
        manner = "joined anew with a new incarnation" if known is not None else "joined"
        return member, f"worker {worker} {manner}; {len(self._members)} active"

    def require(self, now: float, worker: str, incarnation: int) -> Member:
        """The active member with this incarnation, its lease renewed.

        Raises:
            SupersededError: A newer incarnation of the worker has joined.
            NotAMemberError: It has not joined, or its lease ran out.
        """
        self._refuse_superseded(worker, incarnation)
        member = self._members.get(worker)
        if member is None or member.incarnation != incarnation:
            raise NotAMemberError(
                f"worker {worker!r} is not a member: it has not joined, or its lease ran out; join again"
            )
        return self._renew(member, now)

    def report_speed(self, worker: str, inner_step_s: float) -> None:
        """Note the mean seconds of an active worker's recent inner steps.

        Raises:
            InvalidInputError: The duration is not a positive number.
        """
        if not (math.isfinite(inner_step_s) and inner_step_s > 0):
            raise InvalidInputError(f"worker {worker!r} reports inner steps of {inner_step_s} s; it must be positive")
        self._members[worker] = replace(self._members[worker], inner_step_s=inner_step_s)

    def leave(self, worker: str, incarnation: int) -> str:
        """End a membership if it is the caller's; returns what happened, in a sentence."""
        member = self._members.get(worker)
        if member is None or member.incarnation != incarnation:
            return f"worker {worker} is not a member; nothing to leave"
        del self._members[worker]
        return f"worker {worker} left; {len(self._members)} active"

    def expire(self, now: float) -> list[str]:
        """End the memberships whose leases ran out; returns a sentence for each."""
        expired = [member for member in self._members.values() if now >= member.seen_s + self.lease_s]
        for member in expired:
            del self._members[member.worker]
        return [
            f"worker {member.worker} was silent for {now - member.seen_s:.1f} s, longer than its lease of "
            f"{self.lease_s:g} s, and no longer counts as active; {len(self._members)} active"
            for member in expired
        ]

    def next_expiry_s(self) -> float | None:
        """When the first lease will run out, if nobody renews it; None without members."""
        return min((member.seen_s + self.lease_s for member in self._members.values()), default=None)

    def inner_steps(self, worker: str) -> int:
        """Inner steps for a worker's next round: floor(H * v / v_max), at least 1, where v is its speed.

        Source: dynamic local updates, Liu et al., Asynchronous Local-SGD Training <arXiv 2401.09135>, section 5.
        """
        member = self._members.get(worker)
        if not self._dynamic or member is None or member.inner_step_s is None:
            return self._inner_steps
        fastest_s = min(peer.inner_step_s for peer in self._members.values() if peer.inner_step_s is not None)
        return max(1, math.floor(self._inner_steps * (fastest_s / member.inner_step_s)))

    def _renew(self, member: Member, now: float) -> Member:
        renewed = replace(member, seen_s=max(now, member.seen_s))
        self._members[member.worker] = renewed
        return renewed

    def _refuse_superseded(self, worker: str, incarnation: int) -> None:
        newest = self._newest_incarnation.get(worker, 0)
        if incarnation < newest:
            raise SupersededError(
                f"worker {worker!r} has joined with a newer incarnation ({newest}); this one ({incarnation}) must stop",
                newest,
            )

    def _lowest_free_index(self) -> int:
        taken = {member.index for member in self._members.values()}
        return next(index for index in range(len(taken) + 1) if index not in taken)
