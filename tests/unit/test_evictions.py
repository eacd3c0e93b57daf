"""Evictions: whom they keep out and for how long, that a restart does not end them, and what the worker is told."""

import pytest

from paceline_server.membership import Membership
from paceline_server.quarantine import Quarantine
from paceline_wire.errors import EvictedError, InvalidInputError, NotAMemberError, QuarantinedError


def members(*workers: str) -> Membership:
    """A membership that workers joined at time 0, with incarnation 1."""
    quarantine = Quarantine(rounds=3, duration_s=600.0)
    membership = Membership(lease_s=30.0, inner_steps=50, dynamic_inner_steps=True, quarantine=quarantine)
    for worker in workers:
        membership.join(0.0, worker, 1)
    return membership


def test_an_evicted_worker_is_out_at_once() -> None:
    """It is no member, nothing is taken from it, and it can't join, with the reason; others stay."""
    membership = members("a", "b")
    assert membership.evict(1.0, "a", "wrong data", None) == (True, False)
    assert membership.active == {"b"}
    for call in (membership.join, membership.require, membership.heartbeat):
        with pytest.raises(EvictedError, match=r"operator \(wrong data\) and is refused until it is admitted again"):
            call(2.0, "a", 2)
    membership.require(2.0, "b", 1)
    assert membership.evict(3.0, "a", "", 60.0) == (False, True)
    with pytest.raises(EvictedError, match="operator for 50 s more"):
        membership.join(13.0, "a", 2)


def test_a_name_stands_for_those_under_it() -> None:
    """Whoever acts under the evicted credential's name is out as well, under new names too; similar names are not."""
    membership = members("paris", "paris.0", "paris.0.1", "paris2")
    assert membership.evict(1.0, "paris", "", None) == (True, False)
    assert membership.active == {"paris2"}
    for worker in ("paris", "paris.0", "paris.new"):
        with pytest.raises(EvictedError):
            membership.join(2.0, worker, 2)
    membership.require(2.0, "paris2", 1)
    assert membership.admit(3.0, "paris")
    membership.join(3.0, "paris.0", 2)
    assert membership.evict(4.0, "paris.0", "", None) == (True, False)
    membership.join(4.0, "paris", 2)


def test_an_eviction_ends_with_its_time_or_by_admission() -> None:
    """After its time, or once admitted, the worker joins again; the one before its eviction may come back, too."""
    membership = members("a", "b")
    membership.evict(0.0, "a", "", 10.0)
    membership.evict(0.0, "b", "", None)
    assert membership.expire(9.9) == []
    assert [sentence for sentence in membership.expire(10.0) if "eviction of worker a is over" in sentence]
    membership.join(10.0, "a", 1)
    with pytest.raises(EvictedError):
        membership.join(1e9, "b", 1)
    assert membership.admit(1e9, "b")
    assert not membership.admit(1e9, "b")
    membership.join(1e9, "b", 1)


def test_an_eviction_survives_a_restart() -> None:
    """What is remembered has who, why and for how long still."""
    membership = members("a")
    membership.evict(5.0, "a", "wrong data", 100.0)
    membership.evict(5.0, "never-seen", "", None)
    again = members()
    again.restore(membership.state(35.0), 1000.0)
    with pytest.raises(EvictedError, match=r"\(wrong data\) for 70 s more"):
        again.join(1000.0, "a", 2)
    with pytest.raises(EvictedError, match="until it is admitted"):
        again.join(1e8, "never-seen", 1)
    again.join(1070.0, "a", 2)


def test_admission_ends_a_quarantine_too() -> None:
    """A worker in quarantine may join before its time once an operator says so."""
    membership = members("a")
    membership.put_in_quarantine(0.0, "a", "not finite")
    with pytest.raises(QuarantinedError):
        membership.join(1.0, "a", 2)
    assert membership.admit(1.0, "a")
    membership.join(1.0, "a", 2)


def test_a_name_that_none_can_have_is_refused() -> None:
    """Nothing is remembered of a name that is not allowed."""
    membership = members()
    with pytest.raises(InvalidInputError, match="is not allowed"):
        membership.evict(0.0, "no such\nname", "", None)
    assert membership.evictions.workers(0.0) == ()
    with pytest.raises(NotAMemberError):
        membership.require(0.0, "a", 1)
