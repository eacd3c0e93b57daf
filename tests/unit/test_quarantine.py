"""Quarantine: which rounds lead to it, whom it keeps out and for how long, and that a restart does not end it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline_server.conduct import Conduct
from paceline_server.ledger import Outcome, PushRequest, Schedule
from paceline_server.membership import Membership
from paceline_server.quarantine import Quarantine
from paceline_server.rules import Rates
from paceline_server.rules.ordered_momentum import OrderedMomentum
from paceline_server.shard import Shard
from paceline_wire.errors import NotAMemberError, QuarantinedError
from paceline_wire.manifest import Manifest, TensorSpec
from support_core import ASYNC

DURATION_S = 600.0
prop = settings(deadline=None, derandomize=True, max_examples=200)


def members(*workers: str, rounds: int = 3, duration_s: float = DURATION_S) -> Membership:
    """A membership that workers joined at time 0, with incarnation 1."""
    quarantine = Quarantine(rounds=rounds, duration_s=duration_s)
    membership = Membership(lease_s=30.0, inner_steps=50, dynamic_inner_steps=True, quarantine=quarantine)
    for worker in workers:
        membership.join(0.0, worker, 1)
    return membership


# --- Which rounds lead to it.


def conduct_of(*events: tuple[int, bool]) -> Conduct:
    """The conduct after pushes of rounds that were accepted (True) or refused."""
    conduct = Conduct()
    for seq, accepted in events:
        conduct = conduct.after_acceptance((1, seq)) if accepted else conduct.after_refusal((1, seq))
    return conduct


def test_a_round_counts_once_however_many_fragments_it_touches() -> None:
    """Refusals of many fragments in one round are one refused round."""
    assert len(conduct_of((1, False), (1, False), (1, False), (2, False), (1, False)).refused) == 2


def test_a_round_that_was_accepted_in_between_begins_the_row_anew() -> None:
    """Only rounds in a row count."""
    assert conduct_of((1, False), (2, False), (3, True), (4, False)).refused == ((1, 4),)
    assert conduct_of((1, False), (2, False), (3, True)).rounds_refused == 0


def test_a_round_of_which_a_part_is_accepted_counts_as_refused() -> None:
    """One bad fragment makes a round a bad one, in whatever order its fragments come."""
    for first in (True, False):
        events = [(seq, accepted) for seq in (1, 2, 3) for accepted in (first, not first)]
        assert len(conduct_of(*events).refused) == 3


@prop
@given(data=st.lists(st.lists(st.booleans(), min_size=1, max_size=4), max_size=12))
def test_the_row_is_that_of_the_last_bad_rounds(data: list[list[bool]]) -> None:
    """Rounds that come one after the other, fragment by fragment, count as their plain definition says."""
    conduct = conduct_of(*((seq, accepted) for seq, parts in enumerate(data, start=1) for accepted in parts))
    bad = [not all(parts) for parts in data]
    row = 0
    while row < len(bad) and bad[len(bad) - 1 - row]:
        row += 1
    assert conduct.rounds_refused == row


def test_a_new_incarnation_goes_on_with_the_row() -> None:
    """A worker that is started again and again does not begin with a clean slate each time."""
    quarantine = Quarantine(rounds=2, duration_s=1.0)
    assert not quarantine.note_refused("a", 1, 9)
    assert quarantine.note_refused("a", 2, 1)


# --- Whom it keeps out.


def test_a_worker_in_quarantine_is_no_member_and_is_turned_away() -> None:
    """Every call of any incarnation of it is refused until the time has passed, and others are not."""
    membership = members("a", "b")
    sentence = membership.put_in_quarantine(10.0, "a", "not finite")
    assert sentence is not None
    for part in ("worker a", "not finite in 3 rounds in a row", "1 active"):
        assert part in sentence
    assert membership.active == {"b"}
    end_s = 10.0 + DURATION_S
    for now in (10.0, end_s - 1):
        for incarnation in (1, 2):
            for call in (membership.join, membership.require, membership.heartbeat):
                with pytest.raises(QuarantinedError, match=f"for {end_s - now:.0f} s more: .*start it anew after"):
                    call(now, "a", incarnation)
    assert membership.heartbeat(11.0, "b", 1).worker == "b"
    with pytest.raises(NotAMemberError):
        membership.require(end_s, "a", 1)
    assert membership.join(end_s, "a", 1)[0].worker == "a"


def test_the_end_of_a_quarantine_is_told_once() -> None:
    """The look at time that finds it over says so, and it is no longer listed."""
    membership = members("a")
    membership.put_in_quarantine(0.0, "a", "not finite")
    (held,) = membership.quarantine.workers(100.0)
    assert (held.worker, held.remaining_s) == ("a", 500.0)
    assert membership.expire(599.0) == []
    (sentence,) = membership.expire(600.0)
    assert "quarantine of worker a is over" in sentence
    assert membership.quarantine.workers(600.0) == ()
    assert membership.expire(601.0) == []


def test_a_restart_does_not_end_a_quarantine() -> None:
    """What remained of it when the state was remembered remains, on any clock."""
    membership, restarted = members("a", "b"), members()
    membership.put_in_quarantine(1000.0, "a", "not finite")
    restarted.restore(membership.state(1100.0), 7.0)
    assert restarted.active == {"b"}
    with pytest.raises(QuarantinedError, match="for 500 s more: its outer gradients were not finite"):
        restarted.join(7.0, "a", 2)
    assert restarted.join(7.0 + 500.0, "a", 2)[0].worker == "a"


def test_who_is_no_member_is_not_put_in_quarantine() -> None:
    """A late push of a worker that has left leads nowhere."""
    membership = members("a")
    membership.leave(1.0, "a", 1)
    assert membership.put_in_quarantine(2.0, "a", "not finite") is None
    membership.join(3.0, "a", 2)


# --- What a shard makes of pushes.


def shard_of(*workers: str, duration_s: float = DURATION_S) -> Shard:
    """A shard of one fragment, with members."""
    shard = Shard(
        index=0,
        num_shards=1,
        rule=OrderedMomentum(rates=Rates(peak_lr=1.0, full_momentum=0.5)),
        schedule=Schedule(kind=ASYNC, quota=1),
        membership=members(*workers, duration_s=duration_s),
    )
    shard.begin_initialization(
        Manifest.of([TensorSpec(name="x", shape=(8,), dtype="float32", role="parameter")], 256), 1
    )
    return shard


def push(
    shard: Shard, worker: str, seq: int, *, problem: str | None = None, norm: float | None = None, base_bin: int = 0
) -> str | None:
    """Let a push arrive whose content has a problem, or none; what its conduct leads to."""
    request = PushRequest(worker=worker, incarnation=1, seq=seq, base_bin=base_bin, problem=problem)
    decision, ledger = shard.decide_push(0.0, 0, request)
    shard.keep(0, decision, ledger, worker, norm)
    assert (decision.outcome is Outcome.REFUSED) == (problem is not None or base_bin > 0)
    return shard.note_conduct(0.0, request, norm, decision)


def test_three_rounds_that_are_not_finite_lead_there() -> None:
    """Also where there is no other worker: such pushes can never be applied."""
    shard = shard_of("a")
    assert [push(shard, "a", seq, problem="nan") is None for seq in (1, 2, 3)] == [True, True, False]
    assert shard.membership.active == frozenset()
    assert (shard.refused_by_worker, shard.counters.pushes_outlying) == ({"a": 3}, 0)


def test_outliers_lead_there_while_a_minority_sends_them() -> None:
    """One of two workers, or fewer, is put in quarantine; both at once are not, since then the measure is wrong."""
    shard = shard_of("a", "b")
    for seq in (1, 2, 3):
        assert push(shard, "b", seq) is None
        assert (push(shard, "a", seq, problem="large", norm=99.0) is None) == (seq < 3)
    assert shard.membership.active == {"b"}
    assert shard.counters.pushes_outlying == 3

    shard = shard_of("a", "b")
    for seq in range(1, 9):
        for worker in ("a", "b"):
            assert push(shard, worker, seq, problem="large", norm=99.0) is None
    assert push(shard, "b", 9) is None
    assert push(shard, "a", 9, problem="large", norm=99.0) is not None


def test_a_base_from_the_future_is_no_matter_of_content() -> None:
    """Such refusals are the worker's bookkeeping, and lead to no quarantine."""
    shard = shard_of("a")
    assert all(push(shard, "a", seq, base_bin=99) is None for seq in range(1, 10))
    assert shard.refused_by_worker == {}


def test_with_a_duration_of_0_nobody_is_put_there() -> None:
    """The option turns it off."""
    shard = shard_of("a", duration_s=0.0)
    assert all(push(shard, "a", seq, problem="nan") is None for seq in range(1, 10))
    assert shard.membership.active == {"a"}
