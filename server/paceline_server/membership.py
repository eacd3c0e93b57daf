"""Who takes part in the run: workers with leases, indexes and speeds. Pure: time is an argument, nothing waits.

Rules:

1. A worker is active from its join until it leaves, is silent for longer than its own heartbeats make likely and the
   lease allows (silence.py), or is put in quarantine (quarantine.py) or evicted by an operator (evictions.py). Every
   sign of life ends a silence.
2. A higher incarnation supersedes a lower one of the same worker at once; the lower one is refused from then on. So is
   an incarnation that has left. One that was given up may join again.
3. An index is the lowest one that no active worker has, and a worker keeps it while it is active.
4. Workers that are gone are remembered for a time, and not more than so many of them (departures.py).
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from paceline_server.departures import Departures, GoneWorker
from paceline_server.evictions import EvictedWorker, Evictions, stands_for
from paceline_server.quarantine import Quarantine, QuarantinedWorker
from paceline_server.silence import Silences
from paceline_wire.errors import InvalidInputError, NotAMemberError, PacelineError, SupersededError

_WORKER_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")

LONGEST_STEP_S = 7 * 24 * 3600.0
"""A week. Nobody's inner step takes longer, and what a status says of it must fit into its field."""


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
        newest_incarnation: The highest incarnation seen of each worker that is active or remembered.
        most_active: The most workers that were ever active at once.
        gone: The workers that are gone and remembered, in the order in which they went.
        quarantined: The workers in quarantine.
        evicted: The workers that an operator keeps out.
    """

    members: tuple[Member, ...] = ()
    newest_incarnation: Mapping[str, int] = field(default_factory=dict)
    most_active: int = 0
    gone: tuple[GoneWorker, ...] = ()
    quarantined: tuple[QuarantinedWorker, ...] = ()
    evicted: tuple[EvictedWorker, ...] = ()


class Membership:
    """The active workers of a shard.

    Args:
        lease_s: Seconds without a sign of life after which a worker is no longer active, whatever its history.
        inner_steps: Inner steps in a round of the fastest worker (H).
        dynamic_inner_steps: Whether slower workers are given fewer (dynamic local updates).
        quarantine: Who is kept out for a while; None: nobody ever.
    """

    def __init__(
        self, *, lease_s: float, inner_steps: int, dynamic_inner_steps: bool, quarantine: Quarantine | None = None
    ) -> None:
        self.lease_s = lease_s
        self.quarantine = quarantine or Quarantine(rounds=1, duration_s=0.0)
        self.evictions = Evictions()
        self._silences = Silences(lease_s)
        self._departures = Departures()
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

    @property
    def heartbeat_s(self) -> float:
        """Seconds between the heartbeats that workers are asked for."""
        return self._silences.heartbeat_s

    @property
    def shortest_silence_s(self) -> float:
        """Seconds of silence that every worker is allowed."""
        return self._silences.shortest_s

    def allowed_silence_s(self, worker: str) -> float:
        """Seconds of silence after which an active worker is given up."""
        return self._silences.allowed_s(worker)

    def state(self, now: float) -> MembershipState:
        """What must be remembered across a restart; histories of heartbeats are not, since a restart disturbs them."""
        return MembershipState(
            members=tuple(self._members.values()),
            newest_incarnation=dict(self._newest_incarnation),
            most_active=self.most_active,
            gone=self._departures.state(now),
            quarantined=self.quarantine.workers(now),
            evicted=self.evictions.workers(now),
        )

    def restore(self, state: MembershipState, now: float) -> None:
        """Take up a remembered state; every member's lease begins anew, since nobody could renew it meanwhile."""
        self._members = {member.worker: replace(member, seen_s=now) for member in state.members}
        self._newest_incarnation = dict(state.newest_incarnation)
        self.most_active = state.most_active
        self._departures.restore(now, state.gone)
        self.quarantine.restore(now, state.quarantined)
        self.evictions.restore(now, state.evicted)
        self._silences = Silences(self.lease_s)
        for member in state.members:
            self._silences.begin(now, member.worker, member.incarnation)

    def join(self, now: float, worker: str, incarnation: int) -> tuple[Member, str]:
        """Make a worker active, or renew it; returns the member and what happened, in a sentence.

        Raises:
            InvalidInputError: The name or the incarnation is not allowed.
            QuarantinedError: The worker is in quarantine.
            EvictedError: An operator keeps the worker out.
            SupersededError: A newer incarnation of the worker has joined, or this one has left.
        """
        _require_name(worker)
        if incarnation < 1:
            raise InvalidInputError(
                f"incarnation {incarnation} of worker {worker!r} is not allowed: it must be positive"
            )
        self.refuse_kept_out(now, worker)
        self._refuse_superseded(worker, incarnation)
        known = self._members.get(worker)
        if known is not None and known.incarnation == incarnation:
            return self._renew(known, now), f"worker {worker} renewed its membership"
        index = known.index if known is not None else self._lowest_free_index()
        member = Member(worker=worker, incarnation=incarnation, index=index, seen_s=now)
        self._members[worker] = member
        self._newest_incarnation[worker] = incarnation
        self._departures.returned(worker)
        self._silences.begin(now, worker, incarnation)
        self.most_active = max(self.most_active, len(self._members))
        manner = "joined anew with a new incarnation" if known is not None else "joined"
        return member, f"worker {worker} {manner}; {len(self._members)} active"

    def require(self, now: float, worker: str, incarnation: int) -> Member:
        """The active member with this incarnation, its lease renewed.

        Raises:
            QuarantinedError: The worker is in quarantine.
            EvictedError: An operator keeps the worker out.
            SupersededError: A newer incarnation of the worker has joined.
            NotAMemberError: It has not joined, or was given up.
        """
        return self._renew(self._member(now, worker, incarnation), now)

    def refusal(self, now: float, worker: str, incarnation: int) -> PacelineError | None:
        """What `require` would raise; None if it would not. Renews nothing."""
        try:
            self._member(now, worker, incarnation)
        except PacelineError as error:
            return error
        return None

    def _member(self, now: float, worker: str, incarnation: int) -> Member:
        self.refuse_kept_out(now, worker)
        self._refuse_superseded(worker, incarnation)
        member = self._members.get(worker)
        if member is None or member.incarnation != incarnation:
            raise NotAMemberError(
                f"worker {worker!r} is not a member: it has not joined, or was silent for too long; join again"
            )
        return member

    def heartbeat(self, now: float, worker: str, incarnation: int) -> Member:
        """As `require`; heartbeats alone make the history by which the worker's silence is judged.

        Raises:
            QuarantinedError: The worker is in quarantine.
            EvictedError: An operator keeps the worker out.
            SupersededError: A newer incarnation of the worker has joined.
            NotAMemberError: It has not joined, or was given up.
        """
        member = self.require(now, worker, incarnation)
        self._silences.heartbeat(now, worker)
        return member

    def report_speed(self, worker: str, inner_step_s: float) -> None:
        """Note the mean seconds of an active worker's recent inner steps.

        Raises:
            InvalidInputError: The duration is not a positive number, or longer than a week.
        """
        if not 0 < inner_step_s <= LONGEST_STEP_S:
            raise InvalidInputError(
                f"worker {worker!r} reports inner steps of {inner_step_s} s; it must be positive, and "
                f"{LONGEST_STEP_S:g} at most"
            )
        self._members[worker] = replace(self._members[worker], inner_step_s=inner_step_s)

    def leave(self, now: float, worker: str, incarnation: int) -> str:
        """End a membership if it is the caller's, for good; returns what happened, in a sentence.

        Raises:
            InvalidInputError: The name is not allowed.
        """
        _require_name(worker)
        member = self._members.get(worker)
        if member is None or member.incarnation != incarnation:
            if self._departures.is_gone(worker, incarnation):
                self._go(now, worker, incarnation, left=True)
            return f"worker {worker} is not a member; nothing to leave"
        self._go(now, worker, incarnation, left=True)
        return f"worker {worker} left; {len(self._members)} active"

    def put_in_quarantine(self, now: float, worker: str, fault: str) -> str | None:
        """End an active worker's membership, and keep it out for a while; fault says what its outer gradients were.

        Returns:
            What happened, in a sentence; None if it is no member.
        """
        member = self._members.get(worker)
        if member is None:
            return None
        self._go(now, worker, member.incarnation, left=False)
        self._silences.forget(worker)
        reason = self.quarantine.begin(now, worker, fault)
        return f"worker {worker} is put in quarantine: {reason}; {len(self._members)} active"

    def evict(self, now: float, worker: str, reason: str, duration_s: float | None) -> tuple[bool, bool]:
        """End a worker's membership, if it has one, and keep it out, for a time or until it is admitted.

        The same for all whose names begin with this one and a dot.

        Returns:
            Whether there was such a member, and whether the name was evicted already.

        Raises:
            InvalidInputError: The name is not allowed.
        """
        _require_name(worker)
        concerned = [member for member in self._members.values() if stands_for(worker, member.worker)]
        for member in concerned:
            self._go(now, member.worker, member.incarnation, left=False)
            self._silences.forget(member.worker)
        return bool(concerned), self.evictions.begin(now, worker, reason, duration_s)

    def admit(self, now: float, worker: str) -> bool:
        """End a worker's eviction and quarantine; whether there was one.

        Raises:
            InvalidInputError: The name is not allowed, or it is kept out by the eviction of a name that stands for it.
        """
        _require_name(worker)
        wider = self.evictions.wider(now, worker)
        if wider is not None:
            raise InvalidInputError(
                f"worker {worker!r} is kept out by the eviction of {wider!r}: admit {wider!r}, and evict again who is "
                "to stay out"
            )
        was_evicted = self.evictions.end(now, worker)
        return self.quarantine.end(now, worker) or was_evicted

    def refuse_kept_out(self, now: float, worker: str) -> None:
        """Turn a worker away that may not take part.

        Raises:
            QuarantinedError: The worker is in quarantine.
            EvictedError: An operator keeps the worker out.
        """
        self.quarantine.refuse(now, worker)
        self.evictions.refuse(now, worker)

    def expire(self, now: float) -> list[str]:
        """Give up the workers that were silent for too long, and let in again whose time is over; in sentences."""
        expired = [
            (member, self.allowed_silence_s(member.worker))
            for member in self._members.values()
            if now >= self._expiry_s(member)
        ]
        for member, _ in expired:
            self._go(now, member.worker, member.incarnation, left=False)
        return [
            *(self._given_up(member, now - member.seen_s, allowed_s) for member, allowed_s in expired),
            *self.quarantine.release_due(now),
            *self.evictions.release_due(now),
        ]

    def next_expiry_s(self) -> float | None:
        """When the first worker will have been silent for too long, if none says anything; None without members."""
        return min((self._expiry_s(member) for member in self._members.values()), default=None)

    def forget_gone(self, now: float) -> None:
        """Forget whom nobody needs to know any more."""
        for worker in self._departures.forget_due(now):
            del self._newest_incarnation[worker]
            self._silences.forget(worker)
        self.quarantine.forget_all_but(self._members)

    def in_ledgers(self, now: float) -> frozenset[str]:
        """Names of all whose pushes must still be known, so that what is sent again is not applied again."""
        return self.active | self._departures.in_ledgers(now)

    def take_inner_steps(self, inner_steps: int) -> None:
        """Give the fastest worker so many inner steps a round from here on."""
        self._inner_steps = inner_steps

    def inner_steps(self, worker: str) -> int:
        """Inner steps for a worker's next round: floor(H * v / v_max), at least 1, where v is its speed.

        Source: dynamic local updates, Liu et al., Asynchronous Local-SGD Training <arXiv 2401.09135>, section 5.
        """
        member = self._members.get(worker)
        if not self._dynamic or member is None or member.inner_step_s is None:
            return self._inner_steps
        fastest_s = min(peer.inner_step_s for peer in self._members.values() if peer.inner_step_s is not None)
        return max(1, math.floor(self._inner_steps * (fastest_s / member.inner_step_s)))

    def _go(self, now: float, worker: str, incarnation: int, *, left: bool) -> None:
        """End a membership, if there still is one, and remember how."""
        self._members.pop(worker, None)
        self._departures.add(now, worker, incarnation, left=left)
        self.quarantine.forget(worker)
        if left:
            self._silences.forget(worker)

    def _expiry_s(self, member: Member) -> float:
        return member.seen_s + self.allowed_silence_s(member.worker)

    def _given_up(self, member: Member, silent_s: float, allowed_s: float) -> str:
        """That a worker was given up, and why."""
        measure = (
            f"its lease of {self.lease_s:g} s"
            if allowed_s >= self.lease_s
            else f"the {allowed_s:.1f} s that its earlier heartbeats allow, asked for every {self.heartbeat_s:g} s"
        )
        return (
            f"worker {member.worker} was silent for {silent_s:.1f} s, longer than {measure}, and no longer counts as "
            f"active; {len(self._members)} active"
        )

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
        if self._departures.has_left(worker, incarnation):
            raise SupersededError(
                f"worker {worker!r} has left with this incarnation ({incarnation}), for good; this one must stop, and "
                "the worker join as a newer one"
            )

    def _lowest_free_index(self) -> int:
        taken = {member.index for member in self._members.values()}
        return next(index for index in range(len(taken) + 1) if index not in taken)


def _require_name(worker: str) -> None:
    if _WORKER_ID.fullmatch(worker) is None:
        raise InvalidInputError(
            f"worker_id {worker[:128]!r} is not allowed: use 1 to 128 letters, digits, '.', '_', ':' or '-'"
        )
