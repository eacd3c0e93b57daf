"""A shard's state and every decision about it. Pure: no sockets, no clock, no waiting.

The service (service.py) turns messages into calls of this class and carries out what comes back.
"""

from collections.abc import Container
from dataclasses import dataclass

import torch

from paceline_server.fragment import FragmentValues
from paceline_server.guard import Guard, remember
from paceline_server.hosted import FragmentCopy, HostedFragment
from paceline_server.ledger import (
    Decision,
    Ledger,
    Outcome,
    PushRequest,
    Roster,
    Schedule,
    decide_close,
    decide_push,
    next_close_s,
    without_gone,
)
from paceline_server.membership import Membership
from paceline_server.rules.base import OuterRule
from paceline_server.rules.heloco import DirectionCorrection
from paceline_server.rules.ordered_momentum import PLAIN_AVERAGE
from paceline_wire.errors import InvalidInputError, ManifestMismatchError, NotInitializedError
from paceline_wire.manifest import Fragment, Manifest


@dataclass(kw_only=True)
class Counters:
    """What the shard has done since its process began; see StatusResponse for the meanings and units."""

    pushes_applied: int = 0
    pushes_duplicate: int = 0
    pushes_refused: int = 0
    pushes_outlying: int = 0
    bytes_received: int = 0
    bytes_sent: int = 0
    bins_late_total: int = 0


class Shard:
    """The fragments of one shard, its members, and its counters.

    Args:
        index: This shard's index.
        num_shards: Shards of the run.
        rule: The outer rule for parameters.
        schedule: When bins close and workers are answered.
        membership: The workers.
        correction: What is done to pushes before the rule; None: nothing.
        guard: What refuses pushes out of all proportion; None: nothing does.
    """

    def __init__(
        self,
        *,
        index: int,
        num_shards: int,
        rule: OuterRule,
        schedule: Schedule,
        membership: Membership,
        correction: DirectionCorrection | None = None,
        guard: Guard | None = None,
    ) -> None:
        self.index = index
        self.num_shards = num_shards
        self.schedule = schedule
        self.membership = membership
        self.counters = Counters()
        self.pushes_by_worker: dict[str, int] = {}
        self.refused_by_worker: dict[str, int] = {}
        self.manifest: Manifest | None = None
        self.initialization_id = 0
        self._rule = rule
        self._correction = correction
        self._guard = guard
        self._fragments: dict[int, HostedFragment] = {}
        self._without_values: set[int] = set()

    @property
    def initialized(self) -> bool:
        """Whether every fragment of this shard has its parameters."""
        return self.manifest is not None and not self._without_values

    @property
    def fragments(self) -> dict[int, HostedFragment]:
        """This shard's fragments by index; empty until the manifest is known."""
        return self._fragments

    def begin_initialization(self, manifest: Manifest, initialization_id: int, replaces: int | None = None) -> bool:
        """Take the manifest of a first upload; False if this shard has its parameters already, and they stay.

        An upload that broke off may be begun again, by anybody and with any manifest, until the last fragment has come.
        A complete one may be replaced by its name while nothing was pushed: its uploader died before it had reached
        every shard.

        Raises:
            ManifestMismatchError: The run has another manifest; the text names the first difference.
        """
        replaced = replaces == self.initialization_id and self._nothing_was_pushed
        if self.initialized and not replaced:
            self.refuse_other_manifest(manifest)
            return False
        self.take_manifest(manifest, initialization_id)
        return True

    @property
    def _nothing_was_pushed(self) -> bool:
        return all(fragment.ledger == Ledger() for fragment in self._fragments.values())

    def take_manifest(self, manifest: Manifest, initialization_id: int) -> None:
        """Begin anew with a manifest, whatever was here before."""
        self.manifest = manifest
        self.initialization_id = initialization_id
        self._fragments = {
            plan.index: HostedFragment(plan=plan, values=None, ledger=Ledger())
            for plan in manifest.fragments_of_shard(self.index, self.num_shards)
        }
        self._without_values = set(self._fragments)

    def refuse_other_manifest(self, manifest: Manifest) -> None:
        """Make sure that a worker's model is this run's.

        Raises:
            ManifestMismatchError: It is not; the text names the first difference.
        """
        difference = self.manifest.difference(manifest) if self.manifest is not None else None
        if difference is not None:
            raise ManifestMismatchError(f"this run has another model: {difference} (here: the run; there: yours)")

    def refuse_second_values(self, index: int) -> None:
        """Make sure that a fragment has no parameters yet: an upload must not undo what was trained since.

        Raises:
            InvalidInputError: It has some.
        """
        if self._fragments[index].values is not None:
            raise InvalidInputError(f"fragment {index} came twice; an upload has each fragment once")

    def initialize_fragment(self, index: int, values: torch.Tensor) -> None:
        """Give a fragment its first parameters (float32 [n]; kept, not copied)."""
        fragment = self.plan_of(index)
        trained = fragment.role == "parameter"
        self._fragments[index].values = FragmentValues(
            values,
            self._rule if trained else PLAIN_AVERAGE,
            correction=self._correction if trained else None,
            tensor_bounds=[(part.fragment_start, part.fragment_start + part.length) for part in fragment.segments],
        )
        self._without_values.discard(index)

    def restore_fragment(self, index: int, copy: FragmentCopy) -> None:
        """Take up a fragment as it was copied; its vectors are kept, not copied.

        Raises:
            StorageError: The outer rule keeps other vectors than the copy has, or of another size.
        """
        self.initialize_fragment(index, copy.vectors["w"])
        hosted = self._fragments[index]
        if hosted.values is not None:
            hosted.values.restore(copy.vectors, copy.meta.open_bin, copy.meta.newest)
        hosted.ledger = copy.meta.ledger
        hosted.record, hosted.norms = copy.meta.record, copy.meta.norms

    def take_rule(self, rule: OuterRule, correction: DirectionCorrection | None) -> None:
        """Let another outer rule, or other coefficients, take over from here on.

        Raises:
            StorageError: The rule keeps other vectors than the fragments have.
        """
        self._rule, self._correction = rule, correction
        for hosted in self._fragments.values():
            if hosted.values is not None and hosted.plan.role == "parameter":
                hosted.values.take_rule(rule, correction)

    def plan_of(self, index: int) -> Fragment:
        """A fragment's place in the plan.

        Raises:
            NotInitializedError: No manifest has come yet.
            InvalidInputError: The fragment does not live here.
        """
        if self.manifest is None:
            raise NotInitializedError(f"shard {self.index} has no parameters yet: some worker must initialize the run")
        fragment = self._fragments.get(index)
        if fragment is None:
            raise InvalidInputError(
                f"fragment {index} does not live on shard {self.index} of {self.num_shards}: the run has "
                f"{len(self.manifest.fragments)} fragments, and fragment f lives on shard f modulo {self.num_shards}"
            )
        return fragment.plan

    def refuse_uninitialized(self) -> None:
        """Make sure that the shard has its parameters.

        Raises:
            NotInitializedError: It has not.
        """
        if not self.initialized:
            raise NotInitializedError(f"shard {self.index} has no parameters yet: some worker must initialize the run")

    def hosted(self, index: int) -> tuple[HostedFragment, FragmentValues]:
        """An initialized fragment and its numbers.

        Raises:
            NotInitializedError: The shard's parameters are not complete.
            InvalidInputError: The fragment does not live here.
        """
        self.refuse_uninitialized()
        self.plan_of(index)
        fragment = self._fragments[index]
        if fragment.values is None:
            raise NotInitializedError(f"fragment {index} has no values yet; try again in a moment")
        return fragment, fragment.values

    def push_elements(self, index: int) -> int:
        """Elements in a push to a fragment: twice the fragment's where workers report their local momentum.

        Raises:
            NotInitializedError: No manifest has come yet.
            InvalidInputError: The fragment does not live here.
        """
        plan = self.plan_of(index)
        return plan.num_elements * (2 if self._rule.local_momentum and plan.role == "parameter" else 1)

    def coefficients(self, index: int) -> tuple[float, float]:
        """Outer learning rate and momentum coefficient of the bin that a fragment's answers name."""
        issuing = self._fragments[index].ledger.issuing_bin
        return self._rule.rates.lr(issuing), self._rule.rates.momentum(issuing)

    @property
    def quota(self) -> int:
        """Pushes in a bin that would begin now."""
        return self.schedule.quota or max(1, len(self.membership.active))

    def roster(self) -> Roster:
        """Who counts at this moment."""
        return Roster(active=self.membership.active, most_active=self.membership.most_active)

    def outlier_problem(self, index: int, norm: float) -> str | None:
        """Why a push of a norm is out of all proportion for a fragment, in a sentence; None if it is not."""
        return None if self._guard is None else self._guard.problem(index, norm, self._fragments[index].norms)

    def decide_push(self, now: float, index: int, push: PushRequest) -> tuple[Decision, Ledger]:
        """Decide about a push; nothing changes until `keep`.

        Raises:
            InvalidInputError: Its seq is not the next one.
        """
        return decide_push(self.schedule, self._fragments[index].ledger, now, self.roster(), push)

    def decide_close(self, now: float, index: int) -> tuple[Decision, Ledger] | None:
        """Decide whether a fragment's bin closes; nothing changes until `keep`."""
        return decide_close(self.schedule, self._fragments[index].ledger, now, self.roster())

    def keep(
        self, index: int, decision: Decision, ledger: Ledger, worker: str | None, norm: float | None = None
    ) -> None:
        """Make a decision the state, and count it; worker is the one whose push it was, norm the push's, if finite."""
        fragment, counters = self._fragments[index], self.counters
        fragment.ledger = ledger
        if decision.outcome is not Outcome.DUPLICATE:
            fragment.norms = remember(fragment.norms, norm)
        if decision.outcome is Outcome.DUPLICATE:
            counters.pushes_duplicate += 1
        elif decision.outcome is Outcome.REFUSED:
            counters.pushes_refused += 1
        elif decision.contribution is not None and worker is not None:
            counters.pushes_applied += 1
            counters.bins_late_total += decision.contribution.bins_late
            self.pushes_by_worker[worker] = self.pushes_by_worker.get(worker, 0) + 1

    def note_conduct(self, now: float, push: PushRequest, norm: float | None, decision: Decision) -> str | None:
        """Note whether a worker's push was usable; if that puts the worker in quarantine, says so in a sentence.

        Args:
            now: The time.
            push: The push, with the problem that its content has.
            norm: Its L2 norm; None if it is not finite.
            decision: What was decided about it.
        """
        quarantine, active = self.membership.quarantine, self.membership.active
        if decision.contribution is not None:
            quarantine.note_accepted(push.worker, push.incarnation, push.seq)
        if decision.outcome is not Outcome.REFUSED or push.problem is None:
            return None
        self.refused_by_worker[push.worker] = self.refused_by_worker.get(push.worker, 0) + 1
        outlying = norm is not None
        self.counters.pushes_outlying += outlying
        due = quarantine.note_refused(push.worker, push.incarnation, push.seq)
        # Where most workers send outliers, it is the measure that is behind; it catches up with what they send.
        if not due or (outlying and 2 * quarantine.num_refused(active) > len(active)):
            return None
        return self.membership.put_in_quarantine(now, push.worker, "out of proportion" if outlying else "not finite")

    def forget_gone(self, now: float, busy: Container[int]) -> None:
        """Forget workers that have been gone for long, in all fragments but those that an event is about to change."""
        self.membership.forget_gone(now)
        known = self.membership.in_ledgers(now)
        for index, fragment in self._fragments.items():
            if index not in busy:
                fragment.ledger = without_gone(fragment.ledger, known)
        self.pushes_by_worker = {worker: count for worker, count in self.pushes_by_worker.items() if worker in known}
        self.refused_by_worker = {worker: count for worker, count in self.refused_by_worker.items() if worker in known}

    def next_close_s(self) -> float | None:
        """When time alone may next close a bin, since a quorum's grace has passed."""
        times = [next_close_s(self.schedule, fragment.ledger) for fragment in self._fragments.values()]
        return min((time for time in times if time is not None), default=None)
