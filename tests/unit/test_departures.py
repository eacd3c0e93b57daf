"""Workers that are gone: for how long they are known, that leaving is final, and that memory is bounded."""

import pytest

from paceline_server import departures
from paceline_server.departures import LEDGERS_REMEMBER_LEFT_S, MOST_REMEMBERED, REMEMBERED_S
from paceline_server.ledger import Answer, Ledger, Outcome, PushRequest, Roster, Schedule, decide_push, without_gone
from paceline_server.membership import Membership, MembershipState
from paceline_server.quarantine import Quarantine
from paceline_server.rules import Rates
from paceline_server.rules.ordered_momentum import OrderedMomentum
from paceline_server.shard import Shard
from paceline_wire.errors import InvalidInputError, NotAMemberError, SupersededError
from paceline_wire.manifest import Manifest, TensorSpec
from support_core import ASYNC, BARRIER

LEASE_S = 30.0


def members(*workers: str) -> Membership:
    """A membership that workers joined at time 0, with incarnation 1."""
    membership = Membership(lease_s=LEASE_S, inner_steps=50, dynamic_inner_steps=True)
    for worker in workers:
        membership.join(0.0, worker, 1)
    return membership


# --- Leaving is final, being given up is not.


@pytest.mark.parametrize("after_s", [0.0, LEDGERS_REMEMBER_LEFT_S + 1, REMEMBERED_S - 1])
def test_an_incarnation_that_left_cannot_come_back(after_s: float) -> None:
    """Nothing of it is taken any more, so its pushes need not be known for that; a newer incarnation may join."""
    membership = members("a")
    membership.leave(0.0, "a", 1)
    membership.forget_gone(after_s)
    for call in (membership.join, membership.require, membership.heartbeat):
        with pytest.raises(SupersededError, match=r"has left with this incarnation \(1\), for good"):
            call(after_s, "a", 1)
    assert membership.join(after_s, "a", 2)[0].incarnation == 2


def test_a_restart_does_not_bring_it_back() -> None:
    """Who has left, and for how long, is remembered across a restart."""
    membership, restarted = members("a", "b"), members()
    membership.leave(5.0, "a", 1)
    membership.expire(LEASE_S)
    restarted.restore(membership.state(105.0), 1.0)
    with pytest.raises(SupersededError, match="has left"):
        restarted.join(1.0, "a", 1)
    assert restarted.in_ledgers(LEDGERS_REMEMBER_LEFT_S - 100.0) == {"a", "b"}
    assert restarted.in_ledgers(LEDGERS_REMEMBER_LEFT_S - 99.0 + 1e-6) == {"b"}
    assert restarted.join(2.0, "b", 1)[0].worker == "b"


def test_leaving_after_having_been_given_up_is_final_too() -> None:
    """A worker whose Leave comes after its membership ended has left all the same; a stranger's Leave is nothing."""
    membership = members("a")
    membership.expire(LEASE_S)
    assert "nothing to leave" in membership.leave(40.0, "a", 1)
    with pytest.raises(SupersededError):
        membership.join(41.0, "a", 1)
    membership.leave(40.0, "stranger", 1)
    membership.join(41.0, "stranger", 1)


def test_a_worker_that_was_given_up_is_known_for_a_week() -> None:
    """Until then the ledgers know it, so that what it sends again is not applied again; then nothing is left of it."""
    membership = members("a")
    membership.expire(LEASE_S)
    for now in (LEASE_S, LEASE_S + REMEMBERED_S - 1):
        membership.forget_gone(now)
        assert membership.in_ledgers(now) == {"a"}
        with pytest.raises(NotAMemberError):
            membership.require(now, "a", 1)
    membership.forget_gone(LEASE_S + REMEMBERED_S)
    assert membership.in_ledgers(LEASE_S + REMEMBERED_S) == frozenset()
    assert membership.state(0.0) == MembershipState(most_active=1)


def test_workers_without_a_name_of_their_own_do_not_pile_up() -> None:
    """However many come and go, so many are remembered and no more: those that went last."""
    membership = members("stays")
    for number in range(MOST_REMEMBERED + 500):
        membership.join(float(number), f"w{number}", 1)
        membership.leave(float(number), f"w{number}", 1)
        membership.heartbeat(float(number), "stays", 1)
    membership.forget_gone(5000.0)
    state = membership.state(5000.0)
    assert [gone.worker for gone in state.gone] == [f"w{number}" for number in range(500, MOST_REMEMBERED + 500)]
    assert len(state.newest_incarnation) == MOST_REMEMBERED + 1
    assert membership.active == {"stays"}


def test_a_worker_that_is_back_is_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Coming back ends being gone, and so does joining as a newer incarnation."""
    monkeypatch.setattr(departures, "MOST_REMEMBERED", 0)
    membership = members("a", "b")
    membership.expire(LEASE_S)
    membership.join(LEASE_S, "a", 1)
    membership.join(LEASE_S, "b", 2)
    membership.forget_gone(LEASE_S)
    assert membership.in_ledgers(LEASE_S) == {"a", "b"}
    assert membership.state(0.0).newest_incarnation == {"a": 1, "b": 2}


def test_what_a_worker_had_under_way_when_it_went_is_not_noted_for_ever() -> None:
    """The conduct of workers that are not active is forgotten; that of active ones counts on."""
    membership = Membership(
        lease_s=LEASE_S,
        inner_steps=50,
        dynamic_inner_steps=True,
        quarantine=Quarantine(rounds=2, duration_s=1.0),
    )
    membership.join(0.0, "stays", 1)
    for worker in ("stays", "gone"):
        membership.quarantine.note_refused(worker, 1, 1)
    membership.forget_gone(1.0)
    assert membership.quarantine.note_refused("stays", 1, 2)
    assert not membership.quarantine.note_refused("gone", 1, 2)


# --- Ledgers.


def answer(worker: str) -> Answer:
    """An answer to a worker's first push."""
    return Answer(worker=worker, incarnation=1, seq=1, bin=0, refusal="no")


def test_a_ledger_forgets_whom_nobody_knows() -> None:
    """Answers, refusals and tokens of others stay; nothing else changes, and without need nothing at all."""
    names = ("a", "b")
    ledger = Ledger(
        issuing_bin=3,
        answered={name: answer(name) for name in names},
        refused={name: (answer(name),) for name in names},
        tokens=dict.fromkeys(names, 5),
    )
    assert without_gone(ledger, {"a", "b", "c"}) is ledger
    expected = Ledger(issuing_bin=3, answered={"a": answer("a")}, refused={"a": (answer("a"),)}, tokens={"a": 5})
    assert without_gone(ledger, {"a"}) == expected


def test_who_has_an_answer_waiting_is_never_forgotten() -> None:
    """A push that waits for its bin to close stays decided, whoever is gone."""
    schedule, roster = Schedule(kind=BARRIER), Roster(active=frozenset({"a", "b"}), most_active=2)
    push = PushRequest(worker="a", incarnation=1, seq=1, base_bin=0)
    _, ledger = decide_push(schedule, Ledger(), 0.0, roster, push)
    assert without_gone(ledger, frozenset()) == ledger
    assert decide_push(schedule, without_gone(ledger, frozenset()), 1.0, roster, push)[0].outcome is Outcome.DUPLICATE


def test_a_shard_forgets_in_every_fragment_that_is_not_busy() -> None:
    """Long after a worker left, no fragment and no counter knows it; a worker that was given up is still known."""
    shard = Shard(
        index=0,
        num_shards=1,
        rule=OrderedMomentum(rates=Rates(peak_lr=1.0, full_momentum=0.5)),
        schedule=Schedule(kind=ASYNC, quota=1),
        membership=members("left", "lost"),
    )
    shard.begin_initialization(
        Manifest.of([TensorSpec(name="x", shape=(512,), dtype="float32", role="parameter")], 256), 1
    )
    requests = [PushRequest(worker=worker, incarnation=1, seq=1, base_bin=0) for worker in ("left", "lost")]
    for index in (0, 1):
        for request in requests:
            decision, ledger = shard.decide_push(0.0, index, request)
            shard.keep(index, decision, ledger, request.worker)
    shard.membership.leave(1.0, "left", 1)
    shard.membership.expire(LEASE_S)
    shard.forget_gone(LEASE_S, busy=())
    assert all(shard.fragments[index].ledger.answered.keys() == {"left", "lost"} for index in (0, 1))
    shard.forget_gone(LEDGERS_REMEMBER_LEFT_S + 1.0, busy={1})
    assert shard.fragments[0].ledger.answered.keys() == {"lost"}
    assert shard.fragments[1].ledger.answered.keys() == {"left", "lost"}
    assert shard.pushes_by_worker == {"lost": 2}
    assert shard.decide_push(0.0, 0, requests[1])[0].outcome is Outcome.DUPLICATE
    shard.forget_gone(LEDGERS_REMEMBER_LEFT_S + 61.0, busy=())
    assert shard.fragments[1].ledger.answered.keys() == {"lost"}
    # What a forgotten worker had under way cannot be told from a gap, and is not applied.
    shard.forget_gone(2 * REMEMBERED_S, busy=())
    late = PushRequest(worker="lost", incarnation=1, seq=2, base_bin=0)
    with pytest.raises(InvalidInputError, match=r"push 2 .* where push 1 was due"):
        shard.decide_push(0.0, 0, late)
