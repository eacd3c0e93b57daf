"""Who takes part: leases on a played clock, indexes, incarnations, and how many inner steps each worker is given."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from paceline_server.membership import Membership
from paceline_wire.errors import InvalidInputError, NotAMemberError, SupersededError

LEASE_S = 30.0
prop = settings(deadline=None, derandomize=True, max_examples=100)


def members(*workers: str, inner_steps: int = 50, dynamic: bool = True) -> Membership:
    """A membership that workers joined at time 0, with incarnation 1."""
    membership = Membership(lease_s=LEASE_S, inner_steps=inner_steps, dynamic_inner_steps=dynamic)
    for worker in workers:
        membership.join(0.0, worker, 1)
    return membership


# --- Leases.


def test_a_lease_runs_out_when_next_expiry_says() -> None:
    """Just before the time that is announced everybody is active; at that time the silent worker is not."""
    membership = members("a")
    membership.join(5.0, "b", 1)
    due_s = membership.next_expiry_s()
    assert due_s == LEASE_S
    assert membership.expire(due_s - 0.001) == []
    (sentence,) = membership.expire(due_s)
    assert membership.active == {"b"}
    assert membership.next_expiry_s() == 5.0 + LEASE_S
    for part in ("worker a", "30.0 s", "lease of 30 s", "1 active"):
        assert part in sentence


@prop
@given(lease_s=st.floats(1e-3, 1e6), seen_s=st.floats(0, 1e9))
def test_a_lease_is_over_at_its_own_expiry_for_any_clock(lease_s: float, seen_s: float) -> None:
    """Whoever sleeps until next_expiry_s finds a lease to end, however the clock's sums round."""
    membership = Membership(lease_s=lease_s, inner_steps=1, dynamic_inner_steps=False)
    membership.join(seen_s, "a", 1)
    due_s = membership.next_expiry_s()
    assert due_s is not None
    assert len(membership.expire(due_s)) == 1


def test_every_sign_of_life_renews_the_lease() -> None:
    """Joining again and any call that requires membership start the lease anew; going back in time does not."""
    membership = members("a")
    membership.require(10.0, "a", 1)
    assert membership.next_expiry_s() == 10.0 + LEASE_S
    membership.join(20.0, "a", 1)
    assert membership.next_expiry_s() == 20.0 + LEASE_S
    membership.require(15.0, "a", 1)
    assert membership.next_expiry_s() == 20.0 + LEASE_S


def test_all_that_are_silent_expire_together_with_a_sentence_each() -> None:
    """One look ends every lease that has run out, and says so of each."""
    membership = members("a", "b", "c")
    membership.require(40.0, "b", 1)
    sentences = membership.expire(50.0)
    assert len(sentences) == 2
    assert all("silent for 50.0 s" in sentence for sentence in sentences)
    assert membership.active == {"b"}
    assert membership.expire(50.0) == []


def test_without_members_nothing_expires() -> None:
    """An empty membership announces no expiry."""
    assert members().next_expiry_s() is None
    assert members().expire(1e9) == []


def test_a_worker_whose_lease_ran_out_may_join_again() -> None:
    """The same incarnation is refused until it joins again, and then is a member as before."""
    membership = members("a")
    membership.expire(100.0)
    with pytest.raises(NotAMemberError, match="join again"):
        membership.require(100.0, "a", 1)
    membership.join(100.0, "a", 1)
    assert membership.require(100.0, "a", 1).worker == "a"


# --- Indexes.


def test_an_index_is_the_lowest_free_one_and_stays() -> None:
    """A leaver's index goes to the next who joins; nobody else's changes."""
    membership = members("a", "b", "c")
    membership.leave(0.0, "b", 1)
    assert membership.join(1.0, "d", 1)[0].index == 1
    assert membership.join(1.0, "e", 1)[0].index == 3
    assert {member.worker: member.index for member in membership.members} == {"a": 0, "c": 2, "d": 1, "e": 3}
    assert membership.join(2.0, "c", 1)[0].index == 2
    assert membership.join(2.0, "c", 2)[0].index == 2


# --- Incarnations.


def test_a_newer_incarnation_supersedes_the_older() -> None:
    """The newer one is the member at once; the older one is told to stop, whatever it tries."""
    membership = members("a")
    member, sentence = membership.join(1.0, "a", 5)
    assert member.incarnation == 5
    assert "new incarnation" in sentence
    assert len(membership.active) == 1
    for attempt in (membership.require, membership.join):
        with pytest.raises(SupersededError, match="newer incarnation"):
            attempt(1.0, "a", 1)
    membership.leave(0.0, "a", 5)
    with pytest.raises(SupersededError) as refused:
        membership.join(2.0, "a", 4)
    assert refused.value.newest_incarnation == 5


def test_only_the_member_itself_can_leave() -> None:
    """An old incarnation that leaves does not end the new one's membership; leaving twice is not an error."""
    membership = members("a")
    membership.join(1.0, "a", 2)
    assert "not a member" in membership.leave(0.0, "a", 1)
    assert membership.active == {"a"}
    assert "worker a left; 0 active" in membership.leave(0.0, "a", 2)
    assert "not a member" in membership.leave(0.0, "a", 2)


@pytest.mark.parametrize("worker", ["", "a b", "a/b", "ü", "a\n", "x" * 129])
def test_a_name_that_is_not_allowed_is_refused(worker: str) -> None:
    """Names are 1 to 128 letters, digits, '.', '_', ':' and '-'; nothing else becomes a member."""
    membership = members()
    with pytest.raises(InvalidInputError, match="worker_id"):
        membership.join(0.0, worker, 1)
    assert not membership.active


def test_an_incarnation_is_positive() -> None:
    """Incarnation 0, which an unset field has on the wire, is refused."""
    with pytest.raises(InvalidInputError, match="incarnation 0"):
        members().join(0.0, "a", 0)


def test_most_active_is_the_highest_count_there_was() -> None:
    """It grows with the active workers and never shrinks; a new incarnation counts no second time."""
    membership = members("a", "b")
    membership.join(0.0, "b", 2)
    membership.leave(0.0, "a", 1)
    membership.join(0.0, "c", 1)
    assert membership.most_active == 2
    membership.join(0.0, "a", 2)
    membership.expire(1e9)
    assert (len(membership.active), membership.most_active) == (0, 3)


# --- Dynamic local updates.


@prop
@given(
    inner_steps=st.integers(1, 5000),
    fastest_us=st.integers(1, 10**7),
    others_us=st.lists(st.integers(0, 10**8), max_size=5),
)
def test_inner_steps_are_in_proportion_to_speed(inner_steps: int, fastest_us: int, others_us: list[int]) -> None:
    """The fastest get H, the others floor(H v / v_max) up to one float division's rounding, but never less than 1."""
    step_us = [fastest_us, *(fastest_us + extra for extra in others_us)]
    membership = members(*(f"w{number}" for number in range(len(step_us))), inner_steps=inner_steps)
    for number, us in enumerate(step_us):
        membership.report_speed(f"w{number}", us / 1e6)
    for number, us in enumerate(step_us):
        exact = Fraction(inner_steps * fastest_us, us)
        given_steps = membership.inner_steps(f"w{number}")
        if us == fastest_us:
            assert given_steps == inner_steps
        assert max(1, int(exact * (1 - Fraction(1, 2**50)))) <= given_steps <= max(1, int(exact))


def test_a_worker_of_unknown_speed_gets_all_inner_steps() -> None:
    """Until it has told its speed, and after it started again, a worker is given H."""
    membership = members("a", "b")
    membership.report_speed("a", 0.1)
    assert membership.inner_steps("b") == 50
    membership.report_speed("b", 0.2)
    assert membership.inner_steps("b") == 25
    membership.join(1.0, "b", 2)
    assert membership.inner_steps("b") == 50
    assert membership.inner_steps("a") == 50


def test_the_fastest_that_is_left_counts() -> None:
    """When the fastest worker leaves, the others are measured by the next."""
    membership = members("a", "b", "c")
    for worker, inner_step_s in (("a", 0.1), ("b", 0.2), ("c", 0.4)):
        membership.report_speed(worker, inner_step_s)
    assert membership.inner_steps("c") == 12
    membership.leave(0.0, "a", 1)
    assert membership.inner_steps("c") == 25


def test_without_dynamic_inner_steps_everybody_gets_all() -> None:
    """With the option off, speeds change nothing."""
    membership = members("a", "b", dynamic=False)
    membership.report_speed("a", 0.1)
    membership.report_speed("b", 10.0)
    assert membership.inner_steps("b") == 50


@pytest.mark.parametrize("inner_step_s", [0.0, -1.0, float("nan"), float("inf")])
def test_a_speed_that_cannot_be_is_refused(inner_step_s: float) -> None:
    """Durations that are not positive numbers are refused, and the last one told stays."""
    membership = members("a", "b")
    membership.report_speed("a", 0.1)
    membership.report_speed("b", 0.2)
    with pytest.raises(InvalidInputError, match="inner steps"):
        membership.report_speed("b", inner_step_s)
    assert membership.inner_steps("b") == 25


# --- Everything at once.


class MembershipMachine(RuleBasedStateMachine):
    """Workers that join, renew, start again, leave and fall silent, beside a plain model of the three rules."""

    names = st.sampled_from(["a", "b", "c", "d", "e"])

    @initialize()
    def begin(self) -> None:
        """Begin without members."""
        self.membership = members()
        self.now_s = 0.0
        self.seen_s: dict[str, float] = {}
        self.indexes: dict[str, int] = {}
        self.incarnations: dict[str, int] = {}
        self.left: set[tuple[str, int]] = set()

    @rule(worker=names, newer=st.booleans())
    def join(self, worker: str, newer: bool) -> None:
        """Let a worker join with its incarnation or the next; the same one does not come back once it has left."""
        incarnation = max(1, self.incarnations.get(worker, 0) + newer)
        if (worker, incarnation) in self.left:
            with pytest.raises(SupersededError, match="has left"):
                self.membership.join(self.now_s, worker, incarnation)
            return
        member, sentence = self.membership.join(self.now_s, worker, incarnation)
        if worker not in self.indexes:
            self.indexes[worker] = min(set(range(9)) - set(self.indexes.values()))
        self.incarnations[worker] = incarnation
        self.seen_s[worker] = self.now_s
        assert (worker, incarnation, self.indexes[worker]) == (member.worker, member.incarnation, member.index)
        assert worker in sentence

    @rule(worker=names)
    def live(self, worker: str) -> None:
        """Let a worker give a sign of life."""
        if worker in self.seen_s:
            self.membership.require(self.now_s, worker, self.incarnations[worker])
            self.seen_s[worker] = self.now_s
        else:
            gone = (worker, self.incarnations.get(worker, 1)) in self.left
            with pytest.raises(SupersededError if gone else NotAMemberError):
                self.membership.require(self.now_s, worker, self.incarnations.get(worker, 1))

    @rule(worker=names)
    def leave(self, worker: str) -> None:
        """Let a worker leave, member or not."""
        self.membership.leave(self.now_s, worker, self.incarnations.get(worker, 1))
        if worker in self.incarnations:
            self.left.add((worker, self.incarnations[worker]))
        self.seen_s.pop(worker, None)
        self.indexes.pop(worker, None)

    @rule(elapsed_s=st.sampled_from([0.0, 1.0, LEASE_S / 2, LEASE_S]))
    def wait(self, elapsed_s: float) -> None:
        """Let time pass, and look for leases that ran out."""
        self.now_s += elapsed_s
        silent = [worker for worker, seen_s in self.seen_s.items() if self.now_s >= seen_s + LEASE_S]
        assert len(silent) == len(self.membership.expire(self.now_s))
        for worker in silent:
            del self.seen_s[worker], self.indexes[worker]

    @invariant()
    def the_members_are_the_models(self) -> None:
        """Members, indexes and the next expiry are those of the model."""
        assert self.membership.active == set(self.seen_s)
        assert {member.worker: member.index for member in self.membership.members} == self.indexes
        due_s = min(self.seen_s.values()) + LEASE_S if self.seen_s else None
        assert self.membership.next_expiry_s() == due_s


MembershipMachine.TestCase.settings = settings(deadline=None, derandomize=True, max_examples=40, stateful_step_count=40)
TestMembershipMachine = MembershipMachine.TestCase
