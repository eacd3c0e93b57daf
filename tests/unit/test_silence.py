"""How long a worker may be silent: the lease at first, then what its own heartbeats make likely, never more."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline_server.membership import Membership
from paceline_server.silence import LOST_HEARTBEATS, heartbeat_interval_s
from paceline_wire.errors import NotAMemberError
from paceline_wire.liveness import FIRST_GAPS

LEASE_S, BEAT_S = 30.0, 2.0
FLOOR_S = LOST_HEARTBEATS * BEAT_S
prop = settings(deadline=None, derandomize=True, max_examples=100)


def membership_of(*workers: str, lease_s: float = LEASE_S) -> Membership:
    """A membership that workers joined at time 0, with incarnation 1."""
    membership = Membership(lease_s=lease_s, inner_steps=50, dynamic_inner_steps=True)
    for worker in workers:
        membership.join(0.0, worker, 1)
    return membership


def beat(membership: Membership, worker: str, *gaps_s: float, now: float = 0.0) -> float:
    """Let a worker send heartbeats with gaps between them; returns when the last came."""
    for gap_s in gaps_s:
        now += gap_s
        membership.heartbeat(now, worker, 1)
    return now


@prop
@given(lease_s=st.floats(1e-3, 604800))
def test_heartbeats_are_asked_for_often_enough(lease_s: float) -> None:
    """At least three in a lease, never more than every two seconds apart, nor so often that they are a burden."""
    interval_s = heartbeat_interval_s(lease_s)
    assert interval_s <= min(2.0, lease_s / 3)
    assert interval_s >= min(0.2, lease_s / 3)
    assert membership_of(lease_s=lease_s).heartbeat_s == interval_s
    if 3.0 <= lease_s <= 30.0:
        assert interval_s == lease_s / 15


def test_until_there_is_a_history_the_lease_holds() -> None:
    """A worker that has sent few heartbeats is given its whole lease."""
    membership = membership_of("a")
    now = beat(membership, "a", *[BEAT_S] * (FIRST_GAPS - 1))
    assert membership.allowed_silence_s("a") == LEASE_S
    beat(membership, "a", BEAT_S, now=now)
    assert membership.allowed_silence_s("a") == FLOOR_S


def test_a_regular_worker_is_given_up_after_a_few_heartbeats() -> None:
    """It is given up when next_expiry_s says, long before its lease, and the sentence says how long, and why."""
    membership = membership_of("a", "b")
    now = beat(membership, "a", *[BEAT_S] * 10)
    due_s = membership.next_expiry_s()
    assert due_s == now + FLOOR_S
    assert membership.expire(due_s - 0.001) == []
    (sentence,) = membership.expire(due_s)
    assert membership.active == {"b"}
    for part in (
        "worker a",
        "silent for 6.0 s",
        "the 6.0 s that its earlier heartbeats allow",
        "every 2 s",
        "1 active",
    ):
        assert part in sentence


def test_bytes_on_a_stream_end_a_silence_but_make_no_history() -> None:
    """A worker that sends a thousand messages a second is not expected to go on so."""
    membership = membership_of("a")
    now = beat(membership, "a", *[BEAT_S] * 10)
    for number in range(1000):
        membership.require(now + number / 1000, "a", 1)
    assert membership.allowed_silence_s("a") == FLOOR_S
    assert membership.next_expiry_s() == now + 0.999 + FLOOR_S


@prop
@given(gaps_s=st.lists(st.floats(0, 100), min_size=0, max_size=80))
def test_what_is_allowed_lies_between_the_floor_and_the_lease(gaps_s: list[float]) -> None:
    """Whatever the history, a few heartbeats may be missing, and the lease is never exceeded."""
    membership = membership_of("a", lease_s=1000.0)
    beat(membership, "a", *gaps_s)
    assert LOST_HEARTBEATS * membership.heartbeat_s <= membership.allowed_silence_s("a") <= 1000.0
    if 1 <= len(gaps_s) < FIRST_GAPS:
        assert membership.allowed_silence_s("a") == 1000.0


def test_a_worker_behind_a_bad_link_is_given_more() -> None:
    """Heartbeats that come late allow later ones; each worker is judged by its own."""
    membership = membership_of("good", "bad")
    for number in range(1, 20):
        membership.heartbeat(2.0 * number, "good", 1)
        membership.heartbeat(2.0 * number + (number % 3), "bad", 1)
    assert membership.allowed_silence_s("good") == FLOOR_S
    assert FLOOR_S < membership.allowed_silence_s("bad") < LEASE_S


def test_a_worker_that_was_given_up_and_came_back_is_given_more() -> None:
    """The silence that it came back after, and half as much again, is allowed the next time; never above the lease."""
    membership = membership_of("a")
    now = beat(membership, "a", *[BEAT_S] * 10)
    for silence_s, allowed_s in ((10.0, 15.0), (18.0, 27.0), (100.0, LEASE_S)):
        assert len(membership.expire(now + silence_s)) == 1
        now += silence_s
        with pytest.raises(NotAMemberError):
            membership.heartbeat(now, "a", 1)
        membership.join(now, "a", 1)
        assert membership.allowed_silence_s("a") == allowed_s
        now = beat(membership, "a", *[BEAT_S] * 40, now=now)
        assert membership.allowed_silence_s("a") == allowed_s


def test_a_new_incarnation_begins_its_history_anew() -> None:
    """A worker that was started again may run elsewhere: its lease holds until its own heartbeats count."""
    membership = membership_of("a")
    now = beat(membership, "a", *[BEAT_S] * 10)
    membership.join(now, "a", 2)
    assert membership.allowed_silence_s("a") == LEASE_S


def test_after_a_restart_the_lease_holds() -> None:
    """Histories are not remembered: after a restart of the shard every worker has its whole lease."""
    membership, restarted = membership_of("a"), membership_of()
    now = beat(membership, "a", *[BEAT_S] * 10)
    restarted.restore(membership.state(now), 5.0)
    assert restarted.next_expiry_s() == 5.0 + LEASE_S
    beat(restarted, "a", *[BEAT_S] * 10, now=5.0)
    assert restarted.allowed_silence_s("a") == FLOOR_S
