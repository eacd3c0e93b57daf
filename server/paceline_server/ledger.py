"""The bookkeeping of one fragment: which bin is open, whose pushes are in, who waits, who was answered what.

Pure and immutable: `decide_push` and `decide_close` take the time, a ledger and a request, and return a decision with
its reason and the ledger that follows. Nothing changes until the caller keeps that ledger, so a decision can be written
to a journal first. No numbers of the model are here; see fragment.py for those.

Rules:

1. A push belongs to the bin of the newest values its worker held (its base bin). Bins are never reopened: a push whose
   bin has passed enters with the coefficients of a late one.
2. `issuing_bin` is the bin that answers name; `open_bin` is the bin the numbers are in. The numbers follow lazily: the
   next arrival opens what is missing, before it is applied (Polyak), or the close opens it before the answers are
   written (look-ahead, Nesterov).
3. Asynchronous: every push is answered at once. When `quota` answers have named a bin, the next answer starts the next
   bin. With a constant number of workers this is exactly OrMo's ceil(t / K).
4. Barrier and quorum: a push of the issuing bin waits until the bin closes; all that wait are then answered with the
   next bin. A late push is answered at once.
5. (worker, incarnation, seq) is decided once. Seen again, it is answered again, or goes on waiting.
6. A refused push counts as its worker's contribution, so that nobody waits for a worker whose numbers went bad.
7. A push enters with 1 / quota of the learning rate. Without a set quota that is the workers active when the bin began,
   or as many as there have been since: those who join during a bin push to it too.
8. Where pushes say how many tokens they stand for, the share grows with them: a push of as many as the workers' mean
   has 1 / quota, one of none has nothing. Of a push more than `late_bins` late only the part late_bins / bins_late
   enters, since an ordered push moves the parameters by nearly eta / (1 - beta) at once, however old the parameters are
   that it was computed at.
9. Participation: every push is answered at once, as in 3, but the next bin starts when all active workers have pushed
   since this one did.
10. A worker that goes on from the saved state of an earlier incarnation takes over its pushes (takeover.py).
"""

from collections.abc import Mapping, Set
from dataclasses import dataclass, field, replace
from enum import Enum

from paceline_server.rules.base import Contribution
from paceline_wire.errors import InvalidInputError, SupersededError

GRACE_SHARE = 0.25
"""A quorum waits for the others for this share of the time that recent bins took to reach their quorum."""

REFUSALS_REMEMBERED = 16
"""Refusals kept of each worker: twice the rounds that may be in flight, so whatever is sent again gets its verdict."""

_QUORUM_TIME_MEMORY = 0.8
"""Weight of the past in the running mean of the time to quorum: about the last five bins count."""


class ScheduleKind(Enum):
    """When bins close and when workers are answered."""

    ASYNC = "async"
    PARTICIPATION = "participation"
    QUORUM = "quorum"
    BARRIER = "barrier"

    @property
    def answers_at_once(self) -> bool:
        """Whether no push waits for its bin to close."""
        return self in (ScheduleKind.ASYNC, ScheduleKind.PARTICIPATION)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The schedule's settings.

    Attributes:
        kind: Which schedule.
        quota: Pushes in a bin; None: the workers active when the bin begins, or more if others join during it.
        quorum: Contributions that let a bin close under ScheduleKind.QUORUM.
        look_ahead: Whether the next bin opens before the answers that first name it (Nesterov) or after (Polyak).
        late_bins: Lateness up to which a push enters whole, and beyond which only late_bins / bins_late of it does;
            None: it always enters whole.
    """

    kind: ScheduleKind
    quota: int | None = None
    quorum: int | None = None
    look_ahead: bool = False
    late_bins: int | None = None


@dataclass(frozen=True, kw_only=True)
class Roster:
    """Who counts at this moment.

    Attributes:
        active: Names of the active workers.
        most_active: The most workers that were ever active at once.
    """

    active: frozenset[str]
    most_active: int


@dataclass(frozen=True, kw_only=True)
class PushRequest:
    """One push, without its numbers.

    Attributes:
        worker: Who pushes.
        incarnation: The worker's incarnation.
        seq: Counts the incarnation's pushes to this fragment from 1.
        base_bin: The bin that the worker's newest values named.
        problem: Why its content cannot be applied, in a sentence; None if it can.
        tokens: Tokens or samples that it stands for; None: as many as the others' mean.
    """

    worker: str
    incarnation: int
    seq: int
    base_bin: int
    problem: str | None = None
    tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a worker is told about one push.

    Attributes:
        worker: Who is answered.
        incarnation: The incarnation that pushed.
        seq: The push.
        bin: The bin that gradients computed from the answer's values belong to.
        bins_late: How late the push was when it was applied.
        refusal: Why it was not applied; None if it was.
    """

    worker: str
    incarnation: int
    seq: int
    bin: int
    bins_late: int = 0
    refusal: str | None = None


class Outcome(Enum):
    """What an event did to the fragment."""

    APPLIED = "applied"
    REFUSED = "refused"
    DUPLICATE = "duplicate"
    CLOSED = "closed"
    TAKEN_OVER = "taken over"


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What happens to a fragment because of one event; the numbers follow it in this order.

    Attributes:
        outcome: What the event did.
        bins_opened_before: Bins to open first.
        contribution: How the push enters then; None if none does.
        bins_opened_after: Bins to open after it.
        answers: Who is to be answered then, with the values as they are after all of that.
        reason: Why, in a sentence.
    """

    outcome: Outcome
    bins_opened_before: int = 0
    contribution: Contribution | None = None
    bins_opened_after: int = 0
    answers: tuple[Answer, ...] = ()
    reason: str


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """The state of one fragment's bookkeeping.

    Attributes:
        open_bin: The bin that the numbers are in (c).
        issuing_bin: The bin that answers name; open_bin or the next.
        labels_left: Answers that may still name issuing_bin before the next bin starts (asynchronous).
        quota: Pushes that share the learning rate in issuing_bin; None before the first push.
        place: Pushes applied since the last full turn of quota pushes.
        tokens: What each worker's newest push said that it stands for, of those that said it.
        contributors: Workers whose pushes of issuing_bin are in (barrier, quorum), or who have pushed since it began
            (participation).
        waiting: Their answers, in order of seq, to be completed and sent when the bin closes.
        answered: Each worker's newest answer.
        refused: Each worker's latest refusals, for pushes that are sent again after newer ones were answered.
        lineages: Of each worker that went on from a saved state, the incarnations whose pushes are numbered as one row,
            the newest last.
        bin_began_s: When issuing_bin got its first push.
        quorum_s: When issuing_bin reached its quorum.
        time_to_quorum_s: Running mean of the seconds from a bin's first push to its quorum.
    """

    open_bin: int = 0
    issuing_bin: int = 0
    labels_left: int = 0
    quota: int | None = None
    place: int = 0
    tokens: Mapping[str, int] = field(default_factory=dict)
    contributors: frozenset[str] = frozenset()
    waiting: Mapping[str, tuple[Answer, ...]] = field(default_factory=dict)
    answered: Mapping[str, Answer] = field(default_factory=dict)
    refused: Mapping[str, tuple[Answer, ...]] = field(default_factory=dict)
    lineages: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    bin_began_s: float | None = None
    quorum_s: float | None = None
    time_to_quorum_s: float | None = None


def decide_push(
    schedule: Schedule, ledger: Ledger, now: float, roster: Roster, push: PushRequest
) -> tuple[Decision, Ledger]:
    """Decide about a push that has arrived whole.

    Raises:
        InvalidInputError: Its seq is not the next one; nothing was decided.
        SupersededError: A newer incarnation of the worker has pushed; nothing was decided.
    """
    seen = _seen_before(schedule, ledger, push)
    if seen is not None:
        return seen, ledger
    if push.base_bin > ledger.issuing_bin and push.problem is None:
        problem = f"its base bin {push.base_bin} has not begun; the newest is {ledger.issuing_bin}"
        push = replace(push, problem=problem)
    if push.problem is not None:
        return _settle(schedule, ledger, now, roster, push, contribution=None)
    quota = max(ledger.quota or 1, _quota(schedule, roster))
    ledger = _with_tokens(replace(ledger, quota=quota), roster, push)
    bins_late = ledger.issuing_bin - push.base_bin
    contribution = Contribution(
        bins_late=bins_late,
        share=_token_share(ledger, push, quota) * _late_part(schedule, bins_late),
        bin=push.base_bin,
        place=ledger.place,
        quota=quota,
    )
    place = 0 if contribution.completes_turn else ledger.place + 1
    return _settle(schedule, replace(ledger, place=place), now, roster, push, contribution=contribution)


def answer_with_newest(schedule: Schedule, ledger: Ledger, answer: Answer) -> Answer:
    """An answer as it is when the fragment's newest values go with it, whenever it was decided.

    It names their bin; an asynchronous one keeps the label that it was given, since each push is given one.
    """
    return answer if schedule.kind is ScheduleKind.ASYNC else replace(answer, bin=ledger.issuing_bin)


def decide_close(schedule: Schedule, ledger: Ledger, now: float, roster: Roster) -> tuple[Decision, Ledger] | None:
    """Close the issuing bin if time or a change of membership has made that due; None if it has not."""
    reason = _close_reason(schedule, ledger, now, roster)
    if reason is None:
        return None
    decision = Decision(outcome=Outcome.CLOSED, bins_opened_before=ledger.issuing_bin - ledger.open_bin, reason=reason)
    return _close(schedule, replace(ledger, open_bin=ledger.issuing_bin), now, roster, decision)


def without_gone(ledger: Ledger, known: Set[str]) -> Ledger:
    """Forget what was answered to workers that are not among the known ones, except while they have answers waiting."""
    kept = known | ledger.waiting.keys()
    if ledger.answered.keys() | ledger.refused.keys() | ledger.tokens.keys() | ledger.lineages.keys() <= kept:
        return ledger
    return replace(
        ledger,
        answered={worker: answer for worker, answer in ledger.answered.items() if worker in kept},
        refused={worker: answers for worker, answers in ledger.refused.items() if worker in kept},
        tokens={worker: count for worker, count in ledger.tokens.items() if worker in kept},
        lineages={worker: lineage for worker, lineage in ledger.lineages.items() if worker in kept},
    )


def newest_incarnation_of(ledger: Ledger, worker: str) -> int:
    """The newest incarnation of a worker that has pushed, or has taken over another's pushes; 0: none."""
    answered = ledger.answered.get(worker)
    known = [answer.incarnation for answer in ledger.waiting.get(worker, ())]
    known += [answered.incarnation] if answered is not None else []
    return max((*known, *ledger.lineages.get(worker, ())[-1:]), default=0)


def next_close_s(schedule: Schedule, ledger: Ledger) -> float | None:
    """When decide_close may find the bin due without any further event; None if only an event can make it so."""
    if schedule.kind is not ScheduleKind.QUORUM or ledger.quorum_s is None:
        return None
    return ledger.quorum_s + _grace_s(ledger)


def _seen_before(schedule: Schedule, ledger: Ledger, push: PushRequest) -> Decision | None:
    """The decision about a push that was decided before; None if this is the worker's next one."""
    answered = ledger.answered.get(push.worker)
    waiting = ledger.waiting.get(push.worker, ())
    decided = [*waiting, answered] if answered is not None else list(waiting)
    newest_incarnation = newest_incarnation_of(ledger, push.worker)
    if push.incarnation < newest_incarnation:
        raise SupersededError(
            f"worker {push.worker!r} has come with a newer incarnation ({newest_incarnation}); "
            f"this one ({push.incarnation}) must stop"
        )
    newest = max((answer.seq for answer in decided if answer.incarnation == push.incarnation), default=0)
    if not 1 <= push.seq <= newest + 1:
        raise InvalidInputError(
            f"push {push.seq} of worker {push.worker!r} came where push {newest + 1} was due; send them in order"
        )
    if push.seq == newest + 1:
        return None
    key = (push.incarnation, push.seq)
    if answered is None or any(key == (answer.incarnation, answer.seq) for answer in waiting):
        reason = f"push {push.seq} is in already and waits for its bin to close"
        return Decision(outcome=Outcome.DUPLICATE, reason=reason)
    if push.seq != answered.seq:
        refusals = ledger.refused.get(push.worker, ())
        refusal = next((answer.refusal for answer in refusals if key == (answer.incarnation, answer.seq)), None)
        answered = replace(answered, seq=push.seq, bins_late=0, refusal=refusal)
    reason = f"push {push.seq} is in already; answered again"
    again = answer_with_newest(schedule, ledger, answered)
    return Decision(outcome=Outcome.DUPLICATE, answers=(again,), reason=reason)


def _settle(
    schedule: Schedule,
    ledger: Ledger,
    now: float,
    roster: Roster,
    push: PushRequest,
    *,
    contribution: Contribution | None,
) -> tuple[Decision, Ledger]:
    """Decide when the push is answered, and what its bin does."""
    answer = Answer(
        worker=push.worker,
        incarnation=push.incarnation,
        seq=push.seq,
        bin=ledger.issuing_bin,
        bins_late=contribution.bins_late if contribution is not None else 0,
        refusal=push.problem,
    )
    decision = Decision(
        outcome=Outcome.REFUSED if contribution is None else Outcome.APPLIED,
        bins_opened_before=0 if contribution is None else ledger.issuing_bin - ledger.open_bin,
        contribution=contribution,
        reason=push.problem or "",
    )
    if contribution is not None:
        ledger = replace(ledger, open_bin=ledger.issuing_bin)
    if schedule.kind.answers_at_once:
        return _answer_at_once(schedule, ledger, roster, decision, answer)
    if answer.bins_late > 0:
        late = f"{answer.bins_late} bins late; applied in its own bin and answered at once"
        return replace(decision, answers=(answer,), reason=late), _with_answers(ledger, (answer,))
    ledger = _contribute(schedule, ledger, now, answer)
    reason = _close_reason(schedule, ledger, now, roster)
    if reason is None:
        return replace(decision, reason=push.problem or f"waits for bin {ledger.issuing_bin} to close"), ledger
    if contribution is None:
        decision = replace(decision, bins_opened_before=ledger.issuing_bin - ledger.open_bin)
        ledger = replace(ledger, open_bin=ledger.issuing_bin)
    return _close(schedule, ledger, now, roster, replace(decision, reason=push.problem or reason))


def _answer_at_once(
    schedule: Schedule, ledger: Ledger, roster: Roster, decision: Decision, answer: Answer
) -> tuple[Decision, Ledger]:
    """Give the answer a label of the issuing bin, starting the next bin if this one's labels are used up."""
    opened_after = 0
    if schedule.kind is ScheduleKind.PARTICIPATION:
        ledger = replace(ledger, contributors=ledger.contributors | {answer.worker})
    if _next_bin_starts(schedule, ledger, roster):
        quota = _quota(schedule, roster)
        issuing = ledger.issuing_bin + 1
        opened_after = issuing - ledger.open_bin if schedule.look_ahead else 0
        ledger = replace(
            ledger,
            issuing_bin=issuing,
            labels_left=quota,
            quota=quota,
            open_bin=ledger.open_bin + opened_after,
            contributors=frozenset(),
        )
    ledger = replace(ledger, labels_left=max(0, ledger.labels_left - 1))
    answer = replace(answer, bin=ledger.issuing_bin)
    decision = replace(
        decision,
        bins_opened_after=opened_after,
        answers=(answer,),
        reason=decision.reason or f"{answer.bins_late} bins late; answered at once with bin {answer.bin}",
    )
    return decision, _with_answers(ledger, (answer,))


def _next_bin_starts(schedule: Schedule, ledger: Ledger, roster: Roster) -> bool:
    """Whether the answer that is due now is the first to name the next bin."""
    if schedule.kind is ScheduleKind.ASYNC:
        return ledger.labels_left == 0
    return roster.active <= ledger.contributors


def _with_tokens(ledger: Ledger, roster: Roster, push: PushRequest) -> Ledger:
    """Note what a push stands for, and forget it of those who left."""
    if push.tokens is None and not ledger.tokens:
        return ledger
    counted = roster.active - {push.worker}
    tokens = {worker: count for worker, count in ledger.tokens.items() if worker in counted}
    if push.tokens is not None:
        tokens[push.worker] = push.tokens
    return replace(ledger, tokens=tokens)


def _token_share(ledger: Ledger, push: PushRequest, quota: int) -> float:
    """1 / quota, times the push's tokens over the mean of the workers' newest pushes; at most 1."""
    if push.tokens is None:
        return 1 / quota
    if push.tokens == 0:
        return 0.0
    # One division of whole numbers, so that equal counts give the very number 1 / quota.
    return min(1.0, push.tokens * len(ledger.tokens) / (sum(ledger.tokens.values()) * quota))


def _late_part(schedule: Schedule, bins_late: int) -> float:
    if schedule.late_bins is None or bins_late <= schedule.late_bins:
        return 1.0
    return schedule.late_bins / bins_late


def _contribute(schedule: Schedule, ledger: Ledger, now: float, answer: Answer) -> Ledger:
    """Count a push of the issuing bin."""
    contributors = ledger.contributors | {answer.worker}
    began = ledger.bin_began_s if ledger.bin_began_s is not None else now
    quorum_s, mean = ledger.quorum_s, ledger.time_to_quorum_s
    if quorum_s is None and schedule.quorum is not None and len(contributors) >= schedule.quorum:
        quorum_s = now
        took = now - began
        mean = took if mean is None else _QUORUM_TIME_MEMORY * mean + (1 - _QUORUM_TIME_MEMORY) * took
    return replace(
        ledger,
        contributors=contributors,
        waiting={**ledger.waiting, answer.worker: (*ledger.waiting.get(answer.worker, ()), answer)},
        bin_began_s=began,
        quorum_s=quorum_s,
        time_to_quorum_s=mean,
    )


def _close_reason(schedule: Schedule, ledger: Ledger, now: float, roster: Roster) -> str | None:
    """Why the issuing bin closes now, or None if it does not."""
    if schedule.kind.answers_at_once or not ledger.contributors:
        return None
    count = len(ledger.contributors)
    if schedule.quota is not None and count >= schedule.quota:
        return f"bin {ledger.issuing_bin} has its quota of {schedule.quota} pushes"
    assembled = schedule.quota is None or roster.most_active >= schedule.quota
    if assembled and roster.active <= ledger.contributors:
        return f"all {len(roster.active)} active workers have contributed to bin {ledger.issuing_bin}"
    if schedule.kind is ScheduleKind.QUORUM and ledger.quorum_s is not None:
        grace_s = _grace_s(ledger)
        if now >= ledger.quorum_s + grace_s:
            return f"bin {ledger.issuing_bin} has a quorum of {count} and {grace_s:.3f} s of grace have passed"
    return None


def _close(
    schedule: Schedule, ledger: Ledger, now: float, roster: Roster, decision: Decision
) -> tuple[Decision, Ledger]:
    """Close the issuing bin and answer all that wait with the next one."""
    issuing = ledger.issuing_bin + 1
    answers = tuple(replace(answer, bin=issuing) for pending in ledger.waiting.values() for answer in pending)
    ledger = _with_answers(ledger, answers)
    opened_after = issuing - ledger.open_bin if schedule.look_ahead else 0
    ledger = replace(
        ledger,
        issuing_bin=issuing,
        open_bin=ledger.open_bin + opened_after,
        quota=_quota(schedule, roster),
        contributors=frozenset(),
        waiting={},
        bin_began_s=None,
        quorum_s=None,
    )
    return replace(decision, bins_opened_after=opened_after, answers=answers), ledger


def _with_answers(ledger: Ledger, answers: tuple[Answer, ...]) -> Ledger:
    """Remember answers; one that was given after a newer push's does not hide that one."""
    answered, refused = dict(ledger.answered), dict(ledger.refused)
    for answer in answers:
        before = answered.get(answer.worker)
        if before is None or (before.incarnation, before.seq) < (answer.incarnation, answer.seq):
            answered[answer.worker] = answer
        if answer.refusal is not None:
            refused[answer.worker] = (*refused.get(answer.worker, ()), answer)[-REFUSALS_REMEMBERED:]
    return replace(ledger, answered=answered, refused=refused)


def _grace_s(ledger: Ledger) -> float:
    return GRACE_SHARE * (ledger.time_to_quorum_s or 0.0)


def _quota(schedule: Schedule, roster: Roster) -> int:
    return schedule.quota or max(1, len(roster.active))
