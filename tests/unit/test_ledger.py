"""A fragment's bookkeeping: who waits for whom, who is answered what, and that every push is decided exactly once."""

import copy
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from paceline_server.ledger import (
    GRACE_SHARE,
    REFUSALS_REMEMBERED,
    Answer,
    Decision,
    Outcome,
    Schedule,
    ScheduleKind,
    next_close_s,
)
from paceline_server.rules import Rates
from paceline_server.rules.ordered_momentum import OrderedMomentum
from paceline_wire.errors import InvalidInputError, SupersededError
from support_core import ASYNC, BARRIER, QUORUM, PlayedFragment, names, normal, only_answer
from support_rules import PARTICIPATION, PlayedRule

A, B, C, D = names(4)


def played(
    kind: ScheduleKind,
    workers: int | tuple[str, ...] = 3,
    *,
    quota: int | None = None,
    quorum: int | None = None,
    look_ahead: bool = False,
) -> PlayedFragment:
    """A fragment under a schedule, with workers that have joined."""
    schedule = Schedule(kind=kind, quota=quota, quorum=quorum, look_ahead=look_ahead)
    return PlayedFragment(schedule, lr=0.5, momentum=0.5, workers=workers)


def answered(decision: Decision | None) -> dict[str, int]:
    """Whom a decision answers, and the bin that each is told."""
    assert decision is not None
    return {answer.worker: answer.bin for answer in decision.answers}


def lateness(decision: Decision) -> int:
    """How late a push was that a decision lets in."""
    assert decision.contribution is not None
    return decision.contribution.bins_late


def share(decision: Decision) -> float:
    """A push's part of the learning rate."""
    assert decision.contribution is not None
    return decision.contribution.share


# --- Asynchronous.


@pytest.mark.parametrize("look_ahead", [False, True])
def test_asynchronous_pushes_are_answered_at_once(look_ahead: bool) -> None:
    """Each answer comes with its push, and `quota` answers name each bin from the second on."""
    fragment, base_bin, named = played(ASYNC, 2, quota=3, look_ahead=look_ahead), 0, Counter[int]()
    for seq in range(1, 13):
        decision = fragment.push(A, seq, base_bin)
        answer = only_answer(decision)
        assert (A, seq) == (answer.worker, answer.seq)
        assert decision.bins_opened_after == int(look_ahead and answer.bin > base_bin)
        base_bin = answer.bin
        named[base_bin] += 1
    assert named == {1: 3, 2: 3, 3: 3, 4: 3}


def test_the_next_asynchronous_bin_counts_who_is_active_when_it_begins() -> None:
    """Without a set quota, a bin's labels and shares are those of the workers active when it began."""
    fragment = played(ASYNC, 4)
    assert share(fragment.push(A, 1, 0)) == 1 / 4
    fragment.leave(C, D)
    assert [only_answer(fragment.push(A, seq, 1)).bin for seq in (2, 3, 4)] == [1, 1, 1]
    assert only_answer(fragment.push(A, 5, 1)).bin == 2  # bin 2 begins, with 2 active workers
    assert share(fragment.push(A, 6, 2)) == 1 / 2
    assert only_answer(fragment.push(A, 7, 2)).bin == 3


def test_a_refused_asynchronous_push_takes_a_label_and_leaves_the_numbers() -> None:
    """A refusal is answered at once with a label of the open bin, and changes neither w nor u."""
    fragment = played(ASYNC, 2, quota=2)
    decision = fragment.push(A, 1, 0, problem="it is not finite")
    assert decision.outcome is Outcome.REFUSED
    assert only_answer(decision).refusal == "it is not finite"
    assert answered(decision) == {A: 1}
    assert torch.equal(fragment.initial, fragment.w)
    assert [only_answer(fragment.push(A, seq, 1)).bin for seq in (2, 3)] == [1, 2]


@pytest.mark.parametrize("kind", [ASYNC, BARRIER, QUORUM])
@pytest.mark.parametrize("base_bin", [1, 7])
def test_a_base_bin_that_has_not_begun_is_refused(kind: ScheduleKind, base_bin: int) -> None:
    """A push from a bin that no answer has named yet is refused with both bins in the sentence."""
    fragment = played(kind, 1, quorum=1 if kind is QUORUM else None)
    decision = fragment.push(A, 1, base_bin)
    assert decision.outcome is Outcome.REFUSED
    assert only_answer(decision).refusal == f"its base bin {base_bin} has not begun; the newest is 0"
    assert torch.equal(fragment.initial, fragment.w)


# --- The shares of a bin.


@pytest.mark.parametrize("kind", [BARRIER, QUORUM])
def test_workers_who_join_during_a_bin_do_not_multiply_its_step(kind: ScheduleKind) -> None:
    """A bin that began with one worker and gets a push from each of eight enters with shares that add up to one."""
    fragment = played(kind, (A,), quorum=8 if kind is QUORUM else None)
    assert answered(fragment.push(A, 1, 0)) == {A: 1}
    everybody = names(8)
    fragment.join(*everybody)
    shares = [share(fragment.push(worker, 2 if worker == A else 1, 1)) for worker in everybody]
    assert shares == [1 / 8] * 8
    assert fragment.ledger.issuing_bin == 2


def test_a_set_quota_is_every_push_share() -> None:
    """With quota 4 a push enters with a quarter of the rate, whoever is active."""
    fragment = played(ASYNC, 1, quota=4)
    first = share(fragment.push(A, 1, 0))
    fragment.join(*names(9))
    assert [first, share(fragment.push(B, 1, 0))] == [1 / 4, 1 / 4]


# --- Participation: answered at once, in bins of one push or more from everybody.


@pytest.mark.parametrize("look_ahead", [False, True])
def test_a_bin_by_participation_begins_when_everybody_has_pushed(look_ahead: bool) -> None:
    """Each push is answered at once; the one that makes the bin complete is the first to be told of the next."""
    fragment = played(PARTICIPATION, look_ahead=look_ahead)
    told = [answered(fragment.push(worker, seq, 0)) for worker, seq in ((A, 1), (A, 2), (B, 1), (A, 3))]
    assert told == [{A: 0}, {A: 0}, {B: 0}, {A: 0}]
    decision = fragment.push(C, 1, 0)
    assert answered(decision) == {C: 1}
    assert decision.bins_opened_after == int(look_ahead)
    assert [answered(fragment.push(worker, 4, 0)) for worker in (A,)] == [{A: 1}]
    assert answered(fragment.push(B, 2, 0)) == {B: 1}
    assert answered(fragment.push(C, 2, 1)) == {C: 2}
    fragment.assert_closed_form()


@settings(deadline=None, derandomize=True, max_examples=40)
@given(num_workers=st.integers(1, 6), rounds=st.integers(1, 5), order=st.randoms(use_true_random=False))
def test_in_rounds_participation_is_the_asynchronous_loop_with_floor(
    num_workers: int, rounds: int, order: Random
) -> None:
    """With K workers that push once a round, label i is in bin floor(i / K): async's ceil, but bin 0 has 2 K - 1."""
    fragment, bins, t = played(PARTICIPATION, num_workers), dict.fromkeys(names(num_workers), 0), 0
    for seq in range(1, rounds + 1):
        workers = sorted(bins)
        order.shuffle(workers)
        for worker in workers:
            decision = fragment.push(worker, seq, bins[worker])
            assert lateness(decision) <= 1
            assert share(decision) == 1 / num_workers
            t += 1
            bins[worker] = only_answer(decision).bin
            assert bins[worker] == t // num_workers
    sizes = Counter(entered.bin for entered in fragment.entered)
    whole = range(rounds - 1)  # bins of which no push is under way any more
    assert [sizes[b] for b in whole] == [num_workers if b else 2 * num_workers - 1 for b in whole]
    fragment.assert_closed_form()


def test_a_fast_worker_adds_to_a_bin_by_participation() -> None:
    """A bin may have more pushes than workers; each has 1 / quota, so such a bin makes more than one step."""
    fragment = played(PARTICIPATION, 2)
    pushes = [fragment.push(A, seq, 0) for seq in (1, 2, 3)] + [fragment.push(B, 1, 0)]
    assert [share(decision) for decision in pushes] == [1 / 2] * 4
    assert [entered.bin for entered in fragment.entered] == [0] * 4
    assert fragment.ledger.issuing_bin == 1


def test_a_worker_that_leaves_does_not_hold_up_a_bin_by_participation() -> None:
    """Once it has left, the next push of anybody else's completes the bin, and the next one counts the others."""
    fragment = played(PARTICIPATION)
    fragment.push(A, 1, 0)
    fragment.push(B, 1, 0)
    fragment.leave(C)
    assert fragment.close() is None
    assert next_close_s(fragment.schedule, fragment.ledger) is None
    assert answered(fragment.push(A, 2, 0)) == {A: 1}
    assert share(fragment.push(A, 3, 1)) == 1 / 2
    assert answered(fragment.push(B, 2, 0)) == {B: 2}


def test_a_bin_by_participation_counts_who_joins_during_it() -> None:
    """A worker that joins is waited for by the bin, but by nobody's answer."""
    fragment = played(PARTICIPATION, 1)
    assert answered(fragment.push(A, 1, 0)) == {A: 1}
    fragment.join(B)
    assert [answered(fragment.push(A, seq, 1)) for seq in (2, 3, 4)] == [{A: 1}] * 3
    assert answered(fragment.push(B, 1, 1)) == {B: 2}


def test_a_refused_push_takes_part() -> None:
    """A worker whose numbers went bad does not keep the others in one bin for ever."""
    fragment = played(PARTICIPATION, 2)
    fragment.push(A, 1, 0)
    decision = fragment.push(B, 1, 0, problem="it is not finite")
    assert (decision.outcome, answered(decision)) == (Outcome.REFUSED, {B: 1})


def test_a_late_push_takes_part() -> None:
    """A push from long ago enters its own bin, and its worker has pushed since this one began."""
    fragment = played(PARTICIPATION, (A,))
    for seq in range(1, 4):
        fragment.push(A, seq, seq - 1)
    fragment.join(B)
    fragment.push(A, 4, 3)
    late = fragment.push(B, 1, 0)
    assert (lateness(late), answered(late)) == (3, {B: 4})
    fragment.assert_closed_form()


def test_pushes_when_nobody_is_active_make_bins_of_their_own() -> None:
    """What was under way when the last worker was lost enters and is answered."""
    fragment = played(PARTICIPATION, 2)
    fragment.leave(A, B)
    assert [answered(fragment.push(A, seq, 0)) for seq in (1, 2)] == [{A: 1}, {A: 2}]
    fragment.assert_closed_form()


def test_a_lost_answer_by_participation_names_the_bin_of_the_values_it_brings() -> None:
    """A worker that was away asks for its answer again: it gets the newest values, and so their bin."""
    fragment = played(PARTICIPATION, 2)
    fragment.push(A, 1, 0)
    fragment.leave(A)
    for seq in range(1, 7):
        fragment.push(B, seq, seq - 1)
    fragment.join(A)
    again = fragment.push(A, 1, 0)
    assert (again.outcome, answered(again)) == (Outcome.DUPLICATE, {A: 6})
    assert lateness(fragment.push(A, 2, 6)) == 0


# --- Tokens.


def counted(kind: ScheduleKind = BARRIER, workers: int = 3, *, quota: int | None = None) -> PlayedRule:
    """A fragment whose pushes may say how many tokens they stand for."""
    schedule = Schedule(kind=kind, quota=quota, quorum=None)
    return PlayedRule(schedule, OrderedMomentum(rates=Rates(peak_lr=0.5, full_momentum=0.5)), workers=workers)


def round_shares(fragment: PlayedRule, seq: int, tokens: Mapping[str, int | None]) -> list[float]:
    """The shares of one barrier round, in which everybody pushes."""
    return [share(fragment.push(worker, seq, seq - 1, tokens=count)) for worker, count in tokens.items()]


@settings(deadline=None, derandomize=True, max_examples=60)
@given(num_workers=st.integers(1, 40), tokens=st.integers(1, 2**64 - 1))
def test_equal_tokens_are_one_over_quota_to_the_bit(num_workers: int, tokens: int) -> None:
    """Counting what is equal changes nothing, whatever the count, from the first push on."""
    fragment = counted(workers=num_workers)
    for seq in (1, 2):
        assert round_shares(fragment, seq, dict.fromkeys(names(num_workers), tokens)) == [1 / num_workers] * num_workers


@settings(deadline=None, derandomize=True, max_examples=60)
@given(counts=st.lists(st.none() | st.integers(0, 1000), min_size=1, max_size=6))
def test_shares_add_up_to_one_over_a_bin_once_everybody_was_heard(counts: list[int | None]) -> None:
    """From the second bin on, in proportion to the tokens; those who tell none have 1 / quota each."""
    fragment, workers = counted(workers=len(counts)), names(len(counts))
    tokens = dict(zip(workers, counts, strict=True))
    round_shares(fragment, 1, tokens)
    shares = dict(zip(workers, round_shares(fragment, 2, tokens), strict=True))
    told = {worker: count for worker, count in tokens.items() if count is not None}
    assert {shares[worker] for worker in set(workers) - set(told)} <= {1 / len(counts)}
    if not told or any(told.values()):
        assert sum(shares.values()) == pytest.approx(1.0)
    for worker, count in told.items():
        mean = math.fsum(told.values()) / len(told)
        assert shares[worker] == pytest.approx(min(1.0, count / mean / len(counts)) if count else 0.0)


def test_no_tokens_have_no_share() -> None:
    """A push of nothing enters with nothing, even where nobody has anything."""
    fragment = counted()
    assert round_shares(fragment, 1, {A: 0, B: 0, C: 0}) == [0.0] * 3
    assert torch.equal(fragment.initial, fragment.w)
    round_shares(fragment, 2, {A: 0, B: 5, C: 5})
    assert round_shares(fragment, 3, {A: 0, B: 5, C: 5}) == [0.0, 1 / 2, 1 / 2]


def test_a_huge_count_is_one_step_at_most() -> None:
    """A worker that claims all the tokens there are moves what a full bin would, and the others all but nothing."""
    fragment = counted(quota=3)
    round_shares(fragment, 1, {A: 100, B: 100, C: 2**64 - 1})
    shares = round_shares(fragment, 2, {A: 100, B: 100, C: 2**64 - 1})
    assert shares == pytest.approx([0.0, 0.0, 1.0], abs=1e-15)
    assert max(shares) <= 1.0


def test_a_share_is_at_most_one_where_the_quota_is_small() -> None:
    """With more workers than the quota, the largest count could have more than the whole rate; it has not."""
    fragment = counted(ASYNC, 3, quota=1)
    fragment.push(A, 1, 0, tokens=1)
    fragment.push(B, 1, 0, tokens=1)
    assert share(fragment.push(C, 1, 0, tokens=1000)) == 1.0


def test_workers_that_left_are_not_counted() -> None:
    """The mean is over those who are active, and over the one who pushes."""
    fragment = counted(ASYNC, 2, quota=2)
    fragment.push(A, 1, 0, tokens=1_000_000)
    fragment.push(B, 1, 0, tokens=10)
    fragment.leave(A)
    assert share(fragment.push(B, 2, 1, tokens=10)) == 1 / 2
    assert fragment.ledger.tokens == {B: 10}
    assert share(fragment.push(A, 2, 1, tokens=30)) == pytest.approx(30 / 20 / 2)


def test_a_worker_that_stops_telling_is_not_counted() -> None:
    """What it said once does not weigh on the others' mean for ever."""
    fragment = counted(ASYNC, 2, quota=2)
    fragment.push(A, 1, 0, tokens=1_000_000)
    assert share(fragment.push(A, 2, 1)) == 1 / 2
    assert share(fragment.push(B, 1, 0, tokens=10)) == 1 / 2
    assert fragment.ledger.tokens == {B: 10}


def test_a_refused_pushs_tokens_do_not_count() -> None:
    """Numbers that went bad leave the others' shares as they are."""
    fragment = counted(ASYNC, 2, quota=2)
    fragment.push(A, 1, 0, problem="it is not finite", tokens=1_000_000)
    assert share(fragment.push(B, 1, 0, tokens=10)) == 1 / 2


# --- Very late pushes.


@pytest.mark.parametrize(
    ("late_bins", "expected"),
    [(None, [1.0] * 6), (1, [1.0, 1.0, 1 / 2, 1 / 3, 1 / 4, 1 / 5]), (2, [1.0, 1.0, 1.0, 2 / 3, 2 / 4, 2 / 5])],
)
@pytest.mark.parametrize("kind", [ASYNC, PARTICIPATION, BARRIER])
def test_of_a_very_late_push_a_part_enters(kind: ScheduleKind, late_bins: int | None, expected: list[float]) -> None:
    """Up to late_bins it has its share, and min(1, late_bins / d) of it beyond."""
    fragment = PlayedFragment(Schedule(kind=kind, quota=1, late_bins=late_bins), lr=0.5, momentum=0.5, workers=(A,))
    for seq in range(1, 6):
        fragment.push(A, seq, seq - 1)
    late = [fragment.push(f"late-{base_bin}", 1, base_bin) for base_bin in range(5, -1, -1)]
    # Each of them begins a bin too, where a push does.
    parts = [late_bins / max(late_bins, lateness(push)) if late_bins else 1.0 for push in late]
    assert [share(push) for push in late] == parts
    by_lateness = {lateness(push): share(push) for push in late}
    assert all(by_lateness[d] == expected[d] for d in by_lateness if d < len(expected))
    fragment.assert_closed_form()


# --- Barrier.


@pytest.mark.parametrize("look_ahead", [False, True])
def test_a_barrier_answers_all_when_the_last_has_pushed(look_ahead: bool) -> None:
    """Nobody is answered before the last active worker's push; then all are, with the next bin."""
    fragment = played(BARRIER, look_ahead=look_ahead)
    assert answered(fragment.push(A, 1, 0)) == {}
    assert fragment.close() is None
    assert answered(fragment.push(B, 1, 0)) == {}
    decision = fragment.push(C, 1, 0)
    assert answered(decision) == {A: 1, B: 1, C: 1}
    assert decision.bins_opened_after == int(look_ahead)
    assert "3 active workers" in decision.reason


@pytest.mark.parametrize("refused", [False, True])
def test_a_barrier_does_not_wait_for_a_lost_worker(refused: bool) -> None:
    """When the only worker that is missing leaves or is lost, the bin is due."""
    fragment = played(BARRIER)
    problem = "it is not finite" if refused else None
    fragment.push(A, 1, 0, problem=problem)
    fragment.push(B, 1, 0, problem=problem)
    assert fragment.close() is None
    fragment.leave(C)
    decision = fragment.close()
    assert answered(decision) == {A: 1, B: 1}
    assert decision is not None
    assert decision.outcome is Outcome.CLOSED
    assert {problem} == {answer.refusal for answer in decision.answers}


def test_a_bin_closes_although_its_contributors_are_gone() -> None:
    """A worker that contributed and left is not waited for, and its push counts."""
    fragment = played(BARRIER, 2)
    fragment.push(A, 1, 0)
    fragment.leave(A)
    assert answered(fragment.push(B, 1, 0)) == {A: 1, B: 1}
    assert [entered.bin for entered in fragment.entered] == [0, 0]


def test_an_empty_bin_never_closes() -> None:
    """Without any contribution a bin stays open, whoever leaves and however late it is."""
    fragment = played(BARRIER)
    fragment.leave(A, B, C)
    fragment.now_s = 1e6
    assert fragment.close() is None


def test_a_worker_that_joins_is_waited_for() -> None:
    """A barrier waits for a worker that joined while the bin was open."""
    fragment = played(BARRIER, 2)
    fragment.push(A, 1, 0)
    fragment.join(C)
    assert answered(fragment.push(B, 1, 0)) == {}
    assert answered(fragment.push(C, 1, 0)) == {A: 1, B: 1, C: 1}


def test_a_late_push_joins_its_own_bin() -> None:
    """A push whose bin has passed enters with that bin's coefficients, is answered at once, and nobody waits for it."""
    fragment = played(BARRIER)
    fragment.push(A, 1, 0)
    fragment.push(B, 1, 0)
    fragment.leave(C)
    fragment.close()
    fragment.join(C)
    late = fragment.push(C, 1, 0)
    assert (lateness(late), answered(late)) == (1, {C: 1})
    assert [entered.bin for entered in fragment.entered] == [0, 0, 0]
    fragment.push(A, 2, 1)
    assert answered(fragment.push(B, 2, 1)) == {}
    assert answered(fragment.push(C, 2, 1)) == {A: 2, B: 2, C: 2}
    fragment.assert_closed_form()


def test_a_quota_closes_a_barrier_before_all_are_in() -> None:
    """With quota 2 and three workers, two contributions close the bin, and the third's push is late."""
    fragment = played(BARRIER, quota=2)
    fragment.push(A, 1, 0)
    assert answered(fragment.push(B, 1, 0)) == {A: 1, B: 1}
    late = fragment.push(C, 1, 0)
    assert (lateness(late), answered(late)) == (1, {C: 1})


def test_a_barrier_with_a_quota_waits_until_that_many_have_come() -> None:
    """At the start of a run with quota 3, two workers wait for the third; later, those who are left suffice."""
    fragment = played(BARRIER, 2, quota=3)
    fragment.push(A, 1, 0)
    assert answered(fragment.push(B, 1, 0)) == {}
    assert fragment.close() is None
    fragment.join(C)
    assert answered(fragment.push(C, 1, 0)) == {A: 1, B: 1, C: 1}
    fragment.leave(C)
    fragment.push(A, 2, 1)
    decision = fragment.push(B, 2, 1)
    assert answered(decision) == {A: 2, B: 2}
    assert share(decision) == 1 / 3


@pytest.mark.parametrize("kind", [BARRIER, QUORUM])
def test_a_refused_push_counts_as_its_workers_contribution(kind: ScheduleKind) -> None:
    """Nobody waits for a worker whose numbers went bad, and it learns why together with the others' answers."""
    fragment = played(kind, 2, quorum=2 if kind is QUORUM else None)
    refused = fragment.push(A, 1, 0, problem="it is not finite")
    assert (refused.outcome, answered(refused)) == (Outcome.REFUSED, {})
    decision = fragment.push(B, 1, 0)
    assert {answer.worker: (answer.refusal, answer.bin) for answer in decision.answers} == {
        A: ("it is not finite", 1),
        B: (None, 1),
    }
    assert len(fragment.entered) == 1


@pytest.mark.parametrize("look_ahead", [False, True])
def test_a_bin_of_refusals_alone_closes_too(look_ahead: bool) -> None:
    """When every push of a bin is refused, the next bin begins, and only the momentum moves the parameters."""
    fragment = played(BARRIER, 2, look_ahead=look_ahead)
    fragment.push(A, 1, 0)
    fragment.push(B, 1, 0)
    fragment.push(A, 2, 1, problem="it is not finite")
    decision = fragment.push(B, 2, 1, problem="it is not finite")
    assert answered(decision) == {A: 2, B: 2}
    assert decision.outcome is Outcome.REFUSED
    fragment.assert_closed_form()


def test_two_pushes_of_one_worker_in_a_bin_are_one_contribution() -> None:
    """With a window of two rounds both pushes enter and both are answered, but the bin still waits for the others."""
    fragment = played(BARRIER, 2)
    fragment.push(A, 1, 0)
    assert answered(fragment.push(A, 2, 0)) == {}
    decision = fragment.push(B, 1, 0)
    assert [(answer.worker, answer.seq) for answer in decision.answers] == [(A, 1), (A, 2), (B, 1)]
    assert {1} == {answer.bin for answer in decision.answers}
    assert [entered.bin for entered in fragment.entered] == [0, 0, 0]


# --- Quorum and grace.


def quorum_of_two(took_s: float = 4.0, workers: int = 3) -> PlayedFragment:
    """A fragment whose bin 0 has reached its quorum of two, took_s seconds after its first push."""
    fragment = played(QUORUM, workers, quorum=2)
    fragment.push(A, 1, 0)
    fragment.now_s += took_s
    assert answered(fragment.push(B, 1, 0)) == {}
    return fragment


def test_a_quorum_waits_a_grace_and_no_longer() -> None:
    """After the quorum the bin stays open for a share of the time the quorum took, to the moment next_close_s names."""
    fragment = quorum_of_two(took_s=4.0)
    due_s = next_close_s(fragment.schedule, fragment.ledger)
    assert due_s == 4.0 + GRACE_SHARE * 4.0
    fragment.now_s = due_s - 0.001
    assert fragment.close() is None
    fragment.now_s = due_s
    decision = fragment.close()
    assert answered(decision) == {A: 1, B: 1}
    assert decision is not None
    assert "quorum of 2" in decision.reason
    assert next_close_s(fragment.schedule, fragment.ledger) is None


def test_a_quorum_that_is_complete_does_not_wait() -> None:
    """When the last active worker has contributed, the bin closes without any grace."""
    fragment = quorum_of_two()
    fragment.now_s += 0.01
    assert answered(fragment.push(C, 1, 0)) == {A: 1, B: 1, C: 1}


def test_a_push_within_the_grace_is_in_time() -> None:
    """A third contribution during the grace joins the bin and is answered when the grace has passed."""
    fragment = quorum_of_two(workers=4)
    fragment.now_s += 0.5
    in_time = fragment.push(C, 1, 0)
    assert (lateness(in_time), answered(in_time)) == (0, {})
    fragment.now_s += 0.5
    assert answered(fragment.close()) == {A: 1, B: 1, C: 1}


def test_a_push_after_the_grace_closes_a_bin_nobody_has_looked_at() -> None:
    """A push of the open bin that comes when the grace has passed already still joins, and closes it."""
    fragment = quorum_of_two(workers=4)
    fragment.now_s += 60.0
    in_time = fragment.push(C, 1, 0)
    assert (lateness(in_time), answered(in_time)) == (0, {A: 1, B: 1, C: 1})


def test_a_straggler_of_a_quorum_joins_its_own_bin() -> None:
    """A push that comes after the close enters its own bin, is answered at once, and is no contribution to the next."""
    fragment = quorum_of_two()
    fragment.now_s += 60.0
    fragment.close()
    late = fragment.push(C, 1, 0)
    assert (lateness(late), answered(late)) == (1, {C: 1})
    assert fragment.ledger.contributors == frozenset()
    assert [entered.bin for entered in fragment.entered] == [0, 0, 0]
    fragment.assert_closed_form()


def test_no_time_closes_a_bin_without_its_quorum() -> None:
    """One contribution of two that are needed waits for as long as it takes."""
    fragment = played(QUORUM, 3, quorum=2)
    fragment.push(A, 1, 0)
    fragment.now_s += 1e6
    assert fragment.close() is None
    assert next_close_s(fragment.schedule, fragment.ledger) is None


def test_a_quorum_that_cannot_be_reached_closes_when_all_are_in() -> None:
    """With fewer active workers than the quorum, the bin closes with the last of them."""
    fragment = played(QUORUM, 2, quorum=3)
    fragment.push(A, 1, 0)
    assert answered(fragment.push(B, 1, 0)) == {A: 1, B: 1}


def test_the_grace_follows_the_recent_bins() -> None:
    """The time to quorum is a running mean, so that one slow bin changes the grace by a fifth of its difference."""
    fragment = quorum_of_two(took_s=4.0)
    fragment.push(C, 1, 0)
    fragment.push(A, 2, 1)
    fragment.now_s += 14.0
    fragment.push(B, 2, 1)
    assert fragment.ledger.time_to_quorum_s == pytest.approx(0.8 * 4.0 + 0.2 * 14.0)
    assert next_close_s(fragment.schedule, fragment.ledger) == pytest.approx(18.0 + GRACE_SHARE * 6.0)


# --- Pushes that come again.


def test_an_asynchronous_duplicate_gets_its_label_again() -> None:
    """A push that was answered is answered again with the label it was given, and nothing changes."""
    fragment = played(ASYNC, 2, quota=1)
    first = fragment.push(A, 1, 0)
    for seq in range(1, 4):
        fragment.push(B, seq, 0)
    ledger, w = fragment.ledger, fragment.w.clone()
    again = fragment.push(A, 1, 0)
    assert again.outcome is Outcome.DUPLICATE
    assert first.answers == again.answers
    assert ledger == fragment.ledger
    assert torch.equal(w, fragment.w)


def test_a_waiting_duplicate_goes_on_waiting() -> None:
    """A push that waits for its bin is not answered early when it is sent again, and enters once."""
    fragment = played(BARRIER, 2)
    fragment.push(A, 1, 0)
    again = fragment.push(A, 1, 0)
    assert (again.outcome, answered(again)) == (Outcome.DUPLICATE, {})
    assert [(answer.worker, answer.seq) for answer in fragment.push(B, 1, 0).answers] == [(A, 1), (B, 1)]
    assert len(fragment.entered) == 2


def test_a_duplicate_after_others_went_on_names_the_bin_of_the_values_it_gets() -> None:
    """Where bins close by participation, an answer given again carries the newest values and so names their bin."""
    fragment = played(BARRIER, 2)
    fragment.push(A, 1, 0)
    fragment.push(B, 1, 0)  # A's answer is lost on the way, and then A
    fragment.leave(A)
    fragment.push(B, 2, 1)
    fragment.push(B, 3, 2)
    fragment.join(A)
    again = fragment.push(A, 1, 0)
    assert answered(again) == {A: 3}
    assert lateness(fragment.push(A, 2, 3)) == 0


@pytest.mark.parametrize("refused_seq", [1, 2])
def test_a_duplicate_is_told_its_own_verdict(refused_seq: int) -> None:
    """Of two pushes in flight one was refused; both are sent again, and each is told what became of it."""
    fragment = played(ASYNC, 1)
    for seq in (1, 2):
        fragment.push(A, seq, 0, problem="it is not finite" if seq == refused_seq else None)
    verdicts = {seq: only_answer(fragment.push(A, seq, 0)).refusal for seq in (1, 2)}
    assert {1: None, 2: None, refused_seq: "it is not finite"} == verdicts


def test_what_is_remembered_of_refusals_is_bounded() -> None:
    """A worker that is refused again and again leaves its latest refusals only."""
    fragment = played(ASYNC, 1)
    for seq in range(1, 3 * REFUSALS_REMEMBERED):
        fragment.push(A, seq, 0, problem="it is not finite")
    assert len(fragment.ledger.refused[A]) == REFUSALS_REMEMBERED


@pytest.mark.parametrize("kind", [ASYNC, BARRIER])
@pytest.mark.parametrize("seq", [0, 3, 100])
def test_a_gap_in_seq_is_an_error(kind: ScheduleKind, seq: int) -> None:
    """A push that is neither the next one nor one seen before is an error that names the one that was due."""
    fragment = played(kind, 2)
    fragment.push(A, 1, 0)
    ledger = fragment.ledger
    with pytest.raises(InvalidInputError, match="push 2 was due"):
        fragment.push(A, seq, 0)
    assert ledger is fragment.ledger
    with pytest.raises(InvalidInputError, match="push 1 was due"):
        fragment.push(B, 0 if seq == 0 else 2, 0)


def test_an_answer_given_early_is_not_forgotten_when_an_older_push_is_answered() -> None:
    """A late push answered while the one before it waits stays decided: it cannot enter twice, nor stop its worker."""
    fragment = played(BARRIER, 2)
    for seq in (1, 2):
        fragment.push(A, seq, seq - 1)
        fragment.push(B, seq, seq - 1)
    assert answered(fragment.push(A, 3, 2)) == {}
    assert answered(fragment.push(A, 4, 0)) == {A: 2}  # from an old base: late, so answered at once
    waiting_again = fragment.push(A, 3, 2)
    assert (waiting_again.outcome, answered(waiting_again)) == (Outcome.DUPLICATE, {})
    fragment.push(B, 3, 2)
    entered = len(fragment.entered)
    assert [fragment.push(A, seq, 0).outcome for seq in (3, 4)] == [Outcome.DUPLICATE] * 2
    assert entered == len(fragment.entered)
    assert fragment.push(A, 5, 3).outcome is Outcome.APPLIED


# --- Workers that start again.


@pytest.mark.parametrize("kind", [ASYNC, BARRIER, QUORUM])
def test_a_new_incarnation_counts_from_one(kind: ScheduleKind) -> None:
    """A worker that starts again pushes with seq 1, which is not taken for the push of its earlier life."""
    fragment = played(kind, 2, quorum=2 if kind is QUORUM else None)
    fragment.push(A, 1, 0)
    decision = fragment.push(A, 1, 0, incarnation=2)
    assert decision.outcome is Outcome.APPLIED
    assert len(fragment.entered) == 2
    with pytest.raises(InvalidInputError, match="push 2 was due"):
        fragment.push(A, 3, 0, incarnation=2)


@pytest.mark.parametrize("kind", [ASYNC, BARRIER])
@pytest.mark.parametrize("seq", [1, 2])
def test_an_earlier_incarnations_push_cannot_overtake(kind: ScheduleKind, seq: int) -> None:
    """A push of a superseded life that arrives after the new one's is refused, and the new one goes on undisturbed."""
    fragment = played(kind, 2)
    fragment.push(A, 1, 0, incarnation=2)
    ledger = fragment.ledger
    with pytest.raises(SupersededError, match="incarnation"):
        fragment.push(A, seq, 0, incarnation=1)
    assert ledger is fragment.ledger
    assert fragment.push(A, 1, 0, incarnation=2).outcome is Outcome.DUPLICATE
    assert fragment.push(A, 2, 0, incarnation=2).outcome is Outcome.APPLIED


def test_both_lives_of_a_worker_are_answered() -> None:
    """A worker lost with a push waiting, and started again within the bin, has both pushes in it."""
    fragment = played(BARRIER, 2)
    fragment.push(A, 1, 0)
    fragment.push(A, 1, 0, incarnation=2)
    decision = fragment.push(B, 1, 0)
    lives = [(answer.worker, answer.incarnation, answer.seq) for answer in decision.answers]
    assert lives == [(A, 1, 1), (A, 2, 1), (B, 1, 1)]
    assert fragment.push(A, 2, 1, incarnation=2).outcome is Outcome.APPLIED


def test_deciding_changes_nothing_that_was_there() -> None:
    """A ledger never changes: deciding from it again, as after a journal that failed, gives the same decision."""
    fragment = played(BARRIER, 2)
    fragment.push(A, 1, 0)
    before, kept = fragment.ledger, copy.deepcopy(fragment.ledger)
    first = fragment.push(B, 1, 0)
    assert kept == before
    fragment.ledger, fragment.open_bin = before, before.open_bin
    assert first == fragment.push(B, 1, 0)


# --- Everything at once.


@dataclass
class Life:
    """One incarnation of a worker, as it sees itself."""

    name: str
    incarnation: int
    base_bin: int
    seq: int = 0
    refused: set[int] = field(default_factory=set)
    unanswered: set[int] = field(default_factory=set)


class LedgerMachine(RuleBasedStateMachine):
    """Workers that join, push, are refused, send again, get lost and start again, under any schedule."""

    @initialize(
        kind=st.sampled_from([ASYNC, PARTICIPATION, BARRIER, QUORUM]),
        quota=st.none() | st.integers(1, 4),
        quorum=st.integers(1, 3),
        look_ahead=st.booleans(),
    )
    def begin(self, kind: ScheduleKind, quota: int | None, quorum: int, look_ahead: bool) -> None:
        """Choose a schedule, and let two workers join."""
        schedule = Schedule(
            kind=kind,
            quota=quota,
            quorum=min(quorum, quota or quorum) if kind is QUORUM else None,
            look_ahead=look_ahead,
        )
        self.fragment = PlayedFragment(schedule, lr=0.3, momentum=0.6, size=2)
        self.lives: dict[str, Life] = {}
        self.past_lives: list[Life] = []
        self.applied = Counter[tuple[str, int, int]]()
        for _ in range(2):
            self.join()

    @precondition(lambda self: len(self.lives) < 5)
    @rule()
    def join(self) -> None:
        """Let a new worker join, from the newest values."""
        name = f"worker-{len(self.lives)}"
        self.lives[name] = Life(name=name, incarnation=1, base_bin=self.fragment.ledger.issuing_bin)
        self.fragment.join(name)

    @rule(pick=st.integers(0, 4))
    def lose(self, pick: int) -> None:
        """Let a worker leave or its lease run out; it may push what was under way all the same."""
        self.fragment.leave(self.life(pick).name)

    @rule(pick=st.integers(0, 4))
    def come_back(self, pick: int) -> None:
        """Let a worker whose lease ran out join again."""
        self.fragment.join(self.life(pick).name)

    @rule(pick=st.integers(0, 4))
    def start_again(self, pick: int) -> None:
        """Let a worker die and start anew from the newest values."""
        old = self.life(pick)
        self.past_lives.append(old)
        base_bin = self.fragment.ledger.issuing_bin
        self.lives[old.name] = Life(name=old.name, incarnation=old.incarnation + 1, base_bin=base_bin)
        self.fragment.join(old.name)

    @rule(pick=st.integers(0, 4), refused=st.sampled_from([False, False, False, True]), older=st.integers(0, 2))
    def push(self, pick: int, refused: bool, older: int) -> None:
        """Let a worker push, from its newest base or an older one, whatever else of it is in flight."""
        life = self.life(pick)
        life.seq += 1
        life.unanswered.add(life.seq)
        if refused:
            life.refused.add(life.seq)
        entered = len(self.fragment.entered)
        decision = self.fragment.push(
            life.name,
            life.seq,
            max(0, life.base_bin - (older if older < 2 else 0)),
            normal(2, 10 * life.seq + pick),
            incarnation=life.incarnation,
            problem="it is not finite" if refused else None,
        )
        assert decision.outcome is (Outcome.REFUSED if refused else Outcome.APPLIED)
        assert len(self.fragment.entered) - entered == (0 if refused else 1)
        self.receive(decision)
        if self.fragment.schedule.kind.answers_at_once:
            assert not life.unanswered

    @rule(pick=st.integers(0, 4), back=st.integers(0, 3))
    def send_again(self, pick: int, back: int) -> None:
        """Let a worker send a push again; it is told its verdict, or goes on waiting."""
        life = self.life(pick)
        seq = life.seq - back
        if seq < 1:
            return
        ledger = self.fragment.ledger
        decision = self.fragment.push(life.name, seq, 0, incarnation=life.incarnation)
        assert decision.outcome is Outcome.DUPLICATE
        assert ledger == self.fragment.ledger
        if seq in life.unanswered:
            assert not decision.answers
        else:
            answer = only_answer(decision)
            assert (life.name, life.incarnation, seq) == (answer.worker, answer.incarnation, answer.seq)
            assert (seq in life.refused) == (answer.refusal is not None)

    @rule(pick=st.integers(0, 4), ahead=st.integers(2, 4))
    def skip(self, pick: int, ahead: int) -> None:
        """Let a worker leave out a seq, or count from 0."""
        life, ledger = self.life(pick), self.fragment.ledger
        for seq in (0, life.seq + ahead):
            with pytest.raises(InvalidInputError):
                self.fragment.push(life.name, seq, 0, incarnation=life.incarnation)
        assert ledger is self.fragment.ledger

    @precondition(lambda self: self.past_lives)
    @rule(pick=st.integers(0, 20), ahead=st.integers(0, 1))
    def push_from_the_past(self, pick: int, ahead: int) -> None:
        """Let a push of an earlier life arrive after the new life's first."""
        old = self.past_lives[pick % len(self.past_lives)]
        if not self.lives[old.name].seq:
            return
        ledger = self.fragment.ledger
        with pytest.raises(SupersededError):
            self.fragment.push(old.name, max(1, old.seq + ahead), 0, incarnation=old.incarnation)
        assert ledger is self.fragment.ledger

    @rule(elapsed_s=st.sampled_from([0.0, 0.1, 1.0, 30.0]))
    def look(self, elapsed_s: float) -> None:
        """Let time pass, and the shard look whether the bin closes."""
        self.fragment.now_s += elapsed_s
        decision = self.fragment.close()
        if decision is not None:
            assert decision.outcome is Outcome.CLOSED
            self.receive(decision)
            assert self.fragment.close() is None

    @invariant()
    def the_numbers_are_the_closed_form(self) -> None:
        """W and u are the closed form of what entered."""
        self.fragment.assert_closed_form()

    @invariant()
    def exactly_those_wait_who_were_not_answered(self) -> None:
        """No answer is lost, and none is given twice."""
        waiting = self.fragment.ledger.waiting.values()
        held = [(answer.worker, answer.incarnation, answer.seq) for pending in waiting for answer in pending]
        lives = [*self.lives.values(), *self.past_lives]
        owed = {(life.name, life.incarnation, seq) for life in lives for seq in life.unanswered}
        assert len(held) == len(set(held))
        assert owed == set(held)

    def teardown(self) -> None:
        """Whatever happened: once every active worker has pushed and time has passed, nobody waits."""
        if not hasattr(self, "fragment"):
            return
        fragment = self.fragment
        if fragment.schedule.quota is not None and fragment.most_active < fragment.schedule.quota:
            return
        issuing_bin = fragment.ledger.issuing_bin
        for pick, life in enumerate(list(self.lives.values())):
            # A first push that is late is answered at once; the next one is of the open bin.
            for _ in range(2):
                if life.name in fragment.active and not life.unanswered and fragment.ledger.issuing_bin == issuing_bin:
                    self.push(pick, refused=False, older=0)
        self.look(1e6)
        assert not any(life.unanswered for life in [*self.lives.values(), *self.past_lives])

    def life(self, pick: int) -> Life:
        """One of the workers."""
        return list(self.lives.values())[pick % len(self.lives)]

    def receive(self, decision: Decision) -> None:
        """Let answers arrive: each to a push that was not answered yet, with its verdict and the newest bin."""
        for answer in decision.answers:
            life = self._addressee(answer)
            life.unanswered.remove(answer.seq)
            assert answer.bin == self.fragment.ledger.issuing_bin
            assert (answer.seq in life.refused) == (answer.refusal is not None)
            life.base_bin = answer.bin

    def _addressee(self, answer: Answer) -> Life:
        lives = [*self.lives.values(), *self.past_lives]
        return next(life for life in lives if (life.name, life.incarnation) == (answer.worker, answer.incarnation))


LedgerMachine.TestCase.settings = settings(deadline=None, derandomize=True, max_examples=150, stateful_step_count=50)
TestLedgerMachine = LedgerMachine.TestCase
