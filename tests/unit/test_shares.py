"""How much of the learning rate a push has, and the participation schedule: the ledger's newer decisions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline_server.ledger import Decision, Ledger, PushRequest, Roster, Schedule, ScheduleKind, decide_push
from support_core import ASYNC, BARRIER, QUORUM, PlayedFragment, names, normal, only_answer

PARTICIPATION = ScheduleKind.PARTICIPATION


class Table:
    """A ledger alone, and workers who push to it with the bins that they were told."""

    def __init__(self, schedule: Schedule, workers: int) -> None:
        self.schedule, self.ledger = schedule, Ledger()
        self.active = set(names(workers))
        self.bins = dict.fromkeys(self.active, 0)
        self.seqs = dict.fromkeys(self.active, 0)

    def push(self, worker: str, *, base_bin: int | None = None, tokens: int | None = None) -> Decision:
        """Let a worker push, and keep what it is told."""
        self.seqs[worker] = self.seqs.get(worker, 0) + 1
        request = PushRequest(
            worker=worker,
            incarnation=1,
            seq=self.seqs[worker],
            base_bin=self.bins.get(worker, 0) if base_bin is None else base_bin,
            tokens=tokens,
        )
        roster = Roster(active=frozenset(self.active), most_active=len(self.active))
        decision, self.ledger = decide_push(self.schedule, self.ledger, 0.0, roster, request)
        for answer in decision.answers:
            self.bins[answer.worker] = answer.bin
        return decision


def share_of(decision: Decision) -> float:
    """Return a push's part of the learning rate."""
    assert decision.contribution is not None
    return decision.contribution.share


# --- Tokens.


@given(workers=st.integers(1, 7), tokens=st.integers(1, 10**12))
def test_equal_tokens_weigh_as_none_told(workers: int, tokens: int) -> None:
    """Bit for bit 1 / quota, however many they are."""
    table = Table(Schedule(kind=ASYNC, quota=workers), workers)
    shares = {share_of(table.push(worker, tokens=tokens)) for worker in names(workers) * 3}
    assert shares == {1 / workers}


@given(tokens=st.lists(st.integers(1, 1000), min_size=2, max_size=6))
def test_the_shares_of_a_bin_are_the_parts_of_its_tokens(tokens: list[int]) -> None:
    """Once every worker has told, a round of everybody makes one step of the mean over tokens (if no share is cut)."""
    workers = names(len(tokens))
    table = Table(Schedule(kind=ASYNC, quota=len(tokens)), len(tokens))
    for worker, count in zip(workers, tokens, strict=True):
        table.push(worker, tokens=count)
    shares = [share_of(table.push(worker, tokens=count)) for worker, count in zip(workers, tokens, strict=True)]
    assert shares == pytest.approx([count / sum(tokens) for count in tokens])


def test_a_lie_about_tokens_is_bounded() -> None:
    """No push has more than a whole step, none of nothing moves anything, and nobody divides by zero."""
    table = Table(Schedule(kind=ASYNC, quota=4), 4)
    a, b, c, _ = names(4)
    assert share_of(table.push(a, tokens=0)) == 0.0
    assert share_of(table.push(b, tokens=10)) == 1 / 2
    assert share_of(table.push(c, tokens=2**63)) <= 1.0
    assert share_of(table.push(a, tokens=0)) == 0.0


def test_who_does_not_tell_counts_as_the_mean() -> None:
    """A worker that says nothing has 1 / quota among others that do."""
    table = Table(Schedule(kind=ASYNC, quota=2), 2)
    a, b = names(2)
    table.push(a, tokens=100)
    assert share_of(table.push(b)) == 1 / 2
    assert share_of(table.push(a, tokens=100)) == 1 / 2


def test_tokens_of_those_who_left_are_forgotten() -> None:
    """The mean is over the active workers."""
    table = Table(Schedule(kind=ASYNC, quota=2), 3)
    a, b, c = names(3)
    for worker, count in ((a, 10), (b, 10), (c, 10_000)):
        table.push(worker, tokens=count)
    table.active.discard(c)
    assert share_of(table.push(a, tokens=10)) == 1 / 2


# --- Late pushes.


@pytest.mark.parametrize(("late_bins", "bins_late", "part"), [(2, 0, 1.0), (2, 2, 1.0), (2, 8, 0.25), (None, 8, 1.0)])
def test_of_a_very_late_push_only_a_part_enters(late_bins: int | None, bins_late: int, part: float) -> None:
    """Up to late_bins whole, beyond it late_bins / lateness: min(1, 2 / d) is the delay-adaptive rule."""
    table = Table(Schedule(kind=ASYNC, quota=1, late_bins=late_bins), 1)
    (worker,) = names(1)
    for _ in range(bins_late):
        table.push(worker)
    decision = table.push(worker, base_bin=table.ledger.issuing_bin - bins_late)
    assert share_of(decision) == part
    assert decision.contribution is not None
    assert decision.contribution.bins_late == bins_late


@settings(max_examples=30, deadline=None)
@given(late=st.integers(1, 2000), beta=st.sampled_from([0.0, 0.5, 0.9]))
def test_a_push_of_an_hour_ago_moves_little(late: int, beta: float) -> None:
    """At once it moves w by at most late_bins / d of a timely push's final lr / (quota (1 - beta))."""
    schedule = Schedule(kind=ASYNC, quota=1, late_bins=16)
    played = PlayedFragment(schedule, lr=0.7, momentum=beta, workers=1, initial=torch.zeros(3))
    (worker,) = names(1)
    base = 0
    for seq in range(1, late + 1):
        base = only_answer(played.push(worker, seq, base, torch.zeros(3))).bin
    played.push(worker, late + 1, base - late)
    limit = 0.7 / (1 - beta) * min(1.0, 16 / late)
    assert float(played.w.abs().max()) <= limit * (1 + 1e-5)


# --- Places in the order of arrival.


def test_places_count_arrivals_and_begin_anew_after_a_turn() -> None:
    """Pushes are numbered within the quota in order of arrival, whoever they are from; refused ones have no place."""
    played = PlayedFragment(Schedule(kind=ASYNC, quota=3), lr=1.0, momentum=0.0, workers=3)
    a, b, _ = names(3)
    decisions = [played.push(a, 1, 0), played.push(a, 2, 1), played.push(b, 1, 0, problem="not finite")]
    decisions += [played.push(b, 2, 0), played.push(a, 3, 1)]
    contributions = [decision.contribution for decision in decisions]
    assert [push.place if push is not None else None for push in contributions] == [0, 1, None, 2, 0]
    assert [push.completes_turn for push in contributions if push is not None] == [False, False, True, False]


def test_a_turn_ends_where_the_quota_shrinks() -> None:
    """With fewer workers the turn is complete at once, not never."""
    table = Table(Schedule(kind=ASYNC), 4)
    a, *others = names(4)
    for worker in (a, *others[:2]):
        table.push(worker)
    table.active = {a}
    decisions = [table.push(a) for _ in range(8)]
    assert all(decision.contribution is not None for decision in decisions)
    assert sum(decision.contribution.completes_turn for decision in decisions if decision.contribution) >= 5


# --- Participation.


def test_a_bin_closes_when_everybody_has_pushed_and_nobody_waits() -> None:
    """Every push is answered at once; the push that makes it everybody is the first to be told the next bin."""
    table = Table(Schedule(kind=PARTICIPATION), 3)
    a, b, c = names(3)
    told = [only_answer(table.push(worker)).bin for worker in (a, a, b, a, c, b)]
    assert told == [0, 0, 0, 0, 1, 1]


def test_who_left_is_not_needed() -> None:
    """The next push after a worker left closes the bin if it was the last that was missing."""
    table = Table(Schedule(kind=PARTICIPATION), 3)
    a, b, c = names(3)
    table.push(a)
    table.push(b)
    table.active.discard(c)
    assert only_answer(table.push(a)).bin == 1


def test_in_turn_it_is_the_asynchronous_schedule_one_push_later() -> None:
    """With K workers in turn, bins hold K pushes under both; OrMo's first ends after one push, this one's after K."""
    workers = 3
    told = {}
    for kind in (ASYNC, PARTICIPATION):
        table = Table(Schedule(kind=kind, quota=workers), workers)
        told[kind] = [only_answer(table.push(worker)).bin for worker in names(workers) * 4]
    assert told[ASYNC][: -workers + 1] == told[PARTICIPATION][workers - 1 :]


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from([ASYNC, PARTICIPATION, QUORUM, BARRIER]),
    look_ahead=st.booleans(),
    beta=st.sampled_from([0.0, 0.5, 0.9]),
    late_bins=st.sampled_from([None, 1, 3]),
    events=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9), st.integers(0, 4)), max_size=60),
)
def test_the_closed_form_holds_whoever_comes_and_goes(
    kind: ScheduleKind, look_ahead: bool, beta: float, late_bins: int | None, events: list[tuple[int, int, int]]
) -> None:
    """Any schedule, joins, leaves, late pushes and time passing: the numbers are the closed form of what entered."""
    quorum = 2 if kind is QUORUM else None
    schedule = Schedule(kind=kind, look_ahead=look_ahead, quorum=quorum, late_bins=late_bins)
    played = PlayedFragment(schedule, lr=0.5, momentum=beta, workers=2, size=2)
    everybody = names(4)
    seqs, bins = dict.fromkeys(everybody, 0), dict.fromkeys(everybody, 0)
    shares: list[float] = []
    for number, (index, action, age) in enumerate(events):
        worker = everybody[index]
        played.now_s += 0.25
        if action == 0:
            played.join(worker)
        elif action == 1:
            played.leave(worker)
        if action < 2:
            decision = played.close()
        elif worker in played.active:
            seqs[worker] += 1
            base = max(0, bins[worker] - age)
            decision = played.push(worker, seqs[worker], base, normal(2, number))
            if decision.contribution is not None:
                shares.append(decision.contribution.share)
        else:
            continue
        for answer in decision.answers if decision is not None else ():
            bins[answer.worker] = answer.bin
    # PlayedFragment notes what entered with its share, so this is the closed form of exactly that.
    played.assert_closed_form()
    assert all(0 < share <= 1 for share in shares)
