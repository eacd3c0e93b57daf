"""A restarted worker goes on with its pushes: each is decided once, whichever start of the worker sends it."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline_server.journal import Decided
from paceline_server.ledger import Decision, Ledger, Outcome, PushRequest, Roster, Schedule, decide_close, decide_push
from paceline_server.storage.encoding import read_record, write_record
from paceline_server.takeover import INCARNATIONS_REMEMBERED, Progress, take_over
from paceline_wire.errors import InvalidInputError, SupersededError
from support_core import ASYNC, BARRIER

AT_ONCE = Schedule(kind=ASYNC, quota=1)
TOGETHER = Schedule(kind=BARRIER, quota=2)
ROSTER = Roster(active=frozenset({"a", "b"}), most_active=2)


def pushed(
    ledger: Ledger, incarnation: int, seq: int, *, worker: str = "a", problem: str | None = None, of: Schedule = AT_ONCE
) -> tuple[Decision, Ledger]:
    """Decide about a push that is current."""
    request = PushRequest(worker=worker, incarnation=incarnation, seq=seq, base_bin=ledger.issuing_bin, problem=problem)
    return decide_push(of, ledger, 0.0, ROSTER, request)


def after(ledger: Ledger, incarnation: int, *seqs: int) -> Ledger:
    """The ledger after pushes that are applied."""
    for seq in seqs:
        decision, ledger = pushed(ledger, incarnation, seq)
        assert decision.outcome is Outcome.APPLIED
    return ledger


def progress(seq: int, *refused: int, superseded: bool = False) -> Progress:
    """How far fragment 3 got."""
    return Progress(fragment=3, seq=seq, refused=refused, superseded=superseded)


def taken_over(ledger: Ledger, previous: int, incarnation: int) -> tuple[Progress, Ledger]:
    """Let worker a go on."""
    return take_over(ledger, 3, "a", previous, incarnation)


def test_a_push_that_was_decided_is_not_decided_again() -> None:
    """Sent again by the new start it is answered; the next one has the next number."""
    found, ledger = taken_over(after(Ledger(), 5, 1, 2), 5, 6)
    assert found == progress(2)
    for seq in (1, 2):
        again, same = pushed(ledger, 6, seq)
        assert again.outcome is Outcome.DUPLICATE
        assert same is ledger
        assert [(answer.incarnation, answer.seq) for answer in again.answers] == [(6, seq)]
    assert after(ledger, 6, 3).answered["a"].seq == 3


def test_a_push_that_was_not_decided_is_taken_once() -> None:
    """What was under way when the worker died is sent again under its number."""
    found, ledger = taken_over(after(Ledger(), 5, 1), 5, 6)
    assert found == progress(1)
    ledger = after(ledger, 6, 2)
    assert pushed(ledger, 6, 2)[0].outcome is Outcome.DUPLICATE


@pytest.mark.parametrize("pushes", [0, 2])
def test_nothing_of_the_old_start_enters_afterwards(pushes: int) -> None:
    """From the moment at which progress is told, the old incarnation is refused, even if it had pushed nothing."""
    _, ledger = taken_over(after(Ledger(), 5, *range(1, pushes + 1)), 5, 6)
    for seq in range(1, pushes + 2):
        with pytest.raises(SupersededError, match="newer incarnation"):
            pushed(ledger, 5, seq)


def test_asked_again_the_answer_is_the_same() -> None:
    """A Join whose answer was lost is made again, and nothing changes."""
    found, ledger = taken_over(after(Ledger(), 5, 1), 5, 6)
    assert taken_over(ledger, 5, 6) == (found, ledger)
    assert taken_over(ledger, 5, 6)[1] is ledger


def test_refusals_are_told() -> None:
    """What was refused is named, whether or not it was the newest, and is still answered so."""
    ledger = after(Ledger(), 5, 1)
    for seq in (2, 3):
        ledger = pushed(ledger, 5, seq, problem="not finite")[1]
    found, ledger = taken_over(after(ledger, 5, 4), 5, 6)
    assert found == progress(4, 2, 3)
    assert [answer.refusal for answer in pushed(ledger, 6, 2)[0].answers] == ["not finite"]


def test_a_push_that_waits_for_its_bin_goes_on_waiting_for_the_new_start() -> None:
    """The answer goes to the new incarnation when the bin closes."""
    _, ledger = pushed(Ledger(), 5, 1, of=TOGETHER)
    found, ledger = taken_over(ledger, 5, 6)
    assert found == progress(1)
    assert not pushed(ledger, 6, 1, of=TOGETHER)[0].answers
    decision, ledger = pushed(ledger, 1, 1, worker="b", of=TOGETHER)
    assert {(answer.worker, answer.incarnation) for answer in decision.answers} == {("a", 6), ("b", 1)}
    assert decide_close(TOGETHER, ledger, 0.0, ROSTER) is None


def test_several_starts_from_one_state_count_in_one_row() -> None:
    """A start that died before it saved its state again is counted for the next one from the same state."""
    _, ledger = taken_over(after(Ledger(), 5, 1), 5, 6)
    found, ledger = taken_over(after(ledger, 6, 2), 5, 7)
    assert found == progress(2)
    found, ledger = taken_over(after(ledger, 7, 3), 6, 8)
    assert found == progress(3)
    assert pushed(ledger, 8, 2)[0].outcome is Outcome.DUPLICATE


def test_a_start_of_its_own_ends_the_row() -> None:
    """After a start that took nothing over, an older state's pushes are superseded, and a new row begins at 1."""
    ledger = after(after(Ledger(), 5, 1, 2), 6, 1)
    found, ledger = taken_over(ledger, 5, 7)
    assert found == progress(0, superseded=True)
    assert taken_over(ledger, 5, 7)[0] == found
    ledger = after(ledger, 7, 1)
    assert taken_over(ledger, 5, 8)[0].superseded
    assert taken_over(ledger, 7, 8)[0] == progress(1)


def test_other_workers_are_left_alone() -> None:
    """Another worker's pushes keep their numbers and incarnation."""
    ledger = pushed(after(Ledger(), 5, 1), 5, 1, worker="b")[1]
    _, after_it = taken_over(ledger, 5, 6)
    assert after_it.answered["b"] == ledger.answered["b"]
    assert replace(after_it, answered={}, lineages={}) == replace(ledger, answered={}, lineages={})


def test_the_row_is_bounded() -> None:
    """Whatever the number of starts, the ledger remembers so many; a state older than those is superseded."""
    ledger = after(Ledger(), 1, 1)
    for incarnation in range(2, 2 * INCARNATIONS_REMEMBERED):
        _, ledger = taken_over(ledger, incarnation - 1, incarnation)
    assert len(ledger.lineages["a"]) == INCARNATIONS_REMEMBERED
    assert taken_over(ledger, 1, 1000)[0].superseded


@pytest.mark.parametrize(("previous", "incarnation"), [(5, 5), (6, 5), (0, 5)])
def test_only_an_earlier_incarnation_can_be_taken_over(previous: int, incarnation: int) -> None:
    """A start that is not newer is refused with the numbers."""
    with pytest.raises(InvalidInputError, match=f"incarnation {incarnation} from incarnation {previous}"):
        taken_over(Ledger(), previous, incarnation)


def test_a_newer_start_is_not_overtaken() -> None:
    """A start that was itself replaced meanwhile must stop."""
    with pytest.raises(SupersededError, match="newer incarnation"):
        taken_over(after(Ledger(), 9, 1), 5, 6)


@given(st.lists(st.booleans(), max_size=12))
def test_the_journal_has_it(lives: list[bool]) -> None:
    """A record of a takeover is read back as it was written, lineages included."""
    ledger = Ledger()
    for incarnation, pushes in enumerate(lives, 2):
        found, ledger = taken_over(ledger, incarnation - 1, incarnation)
        ledger = after(ledger, incarnation, found.seq + 1) if pushes else ledger
    decision = Decision(outcome=Outcome.TAKEN_OVER, reason="restarted")
    record = Decided(fragment=0, time_s=0.0, push=None, decision=decision, ledger=ledger)
    assert read_record(write_record(record)) == record
