"""A shard's state: how it gets its parameters, which fragments it hosts, what it counts, and when it looks again."""

import pytest
import torch

from paceline_server.journal import Decided
from paceline_server.ledger import Decision, Ledger, Outcome, PushRequest, Schedule
from paceline_server.membership import Membership
from paceline_server.rules import Rates
from paceline_server.rules.ordered_momentum import OrderedMomentum
from paceline_server.shard import Shard
from paceline_wire import codecs
from paceline_wire.errors import InvalidInputError, ManifestMismatchError, NotInitializedError
from paceline_wire.manifest import Manifest, TensorSpec
from support_core import ASYNC, BARRIER, EXACT, QUORUM, normal


def manifest(num_elements: int = 700, role: str = "parameter") -> Manifest:
    """A manifest of fragments of 256 elements."""
    return Manifest.of([TensorSpec(name="a", shape=(num_elements,), dtype="float32", role=role)], 256)


def empty_shard(schedule: Schedule | None = None, *, index: int = 0, num_shards: int = 1) -> Shard:
    """A shard without parameters and members."""
    return Shard(
        index=index,
        num_shards=num_shards,
        rule=OrderedMomentum(rates=Rates(peak_lr=1.0, full_momentum=0.5)),
        schedule=schedule or Schedule(kind=ASYNC, quota=1),
        membership=Membership(lease_s=30.0, inner_steps=10, dynamic_inner_steps=True),
    )


def initialized(schedule: Schedule | None = None, run: Manifest | None = None) -> Shard:
    """A shard whose fragments are all ones."""
    shard = empty_shard(schedule)
    shard.begin_initialization(run or manifest(), 5)
    for index, fragment in shard.fragments.items():
        shard.initialize_fragment(index, torch.ones(fragment.plan.num_elements))
    return shard


def push(shard: Shard, index: int, worker: str, seq: int, *, base_bin: int = 0, now: float = 0.0) -> Decision:
    """Let a push of ones arrive, and make its decision the state."""
    request = PushRequest(worker=worker, incarnation=1, seq=seq, base_bin=base_bin)
    decision, ledger = shard.decide_push(now, index, request)
    values = shard.hosted(index)[1]
    values.follow(decision, EXACT, codecs.encode(EXACT, torch.ones(values.num_elements)))
    shard.keep(index, decision, ledger, worker)
    return decision


# --- The first parameters.


def test_a_shard_is_initialized_when_its_last_fragment_has_come() -> None:
    """Before that everything that needs parameters is refused, and the sentence says what is missing."""
    shard = empty_shard()
    with pytest.raises(NotInitializedError, match="some worker must initialize the run"):
        shard.plan_of(0)
    assert shard.begin_initialization(manifest(), 5)
    assert sorted(shard.fragments) == [0, 1, 2]
    for index in (1, 0, 2):
        assert not shard.initialized
        with pytest.raises(NotInitializedError):
            shard.hosted(index)
        shard.initialize_fragment(index, torch.ones(shard.plan_of(index).num_elements))
    assert shard.initialized
    assert torch.equal(torch.ones(256), shard.hosted(1)[1].w)


def test_only_the_first_upload_counts() -> None:
    """A second upload of the same model is told that the parameters are there, and changes nothing."""
    shard = initialized()
    push(shard, 0, "a", 1)
    ledger = shard.fragments[0].ledger
    assert not shard.begin_initialization(manifest(), 6)
    assert shard.initialization_id == 5
    assert shard.fragments[0].ledger is ledger


def test_an_upload_that_broke_off_is_begun_again_from_nothing() -> None:
    """Fragments of an upload that was not finished are forgotten, so that two models' values never mix."""
    shard = empty_shard()
    shard.begin_initialization(manifest(), 5)
    shard.initialize_fragment(0, torch.zeros(256))
    assert shard.begin_initialization(manifest(), 6)
    assert shard.initialization_id == 6
    assert shard.fragments[0].values is None
    assert not shard.initialized


def test_another_model_is_refused_with_the_difference() -> None:
    """Once the run has its parameters, an upload of another manifest is refused by the name of the tensor."""
    shard = initialized()
    with pytest.raises(ManifestMismatchError, match=r"a float32\[700\] \(parameter\) here .* \[?.*701"):
        shard.begin_initialization(manifest(701), 6)
    shard.refuse_other_manifest(manifest())


def test_an_unfinished_upload_does_not_decide_the_model() -> None:
    """A wrong model whose upload broke off does not keep the right one out."""
    shard = empty_shard()
    shard.begin_initialization(manifest(701), 5)
    assert shard.begin_initialization(manifest(), 6)
    assert shard.manifest == manifest()


def test_a_shard_without_fragments_needs_no_parameters() -> None:
    """With more shards than fragments, the last ones are initialized by the manifest alone."""
    shard = empty_shard(index=4, num_shards=5)
    shard.begin_initialization(manifest(), 5)
    assert shard.initialized
    assert shard.next_close_s() is None


def test_a_fragment_lives_on_one_shard() -> None:
    """Fragment f lives on shard f modulo their number; elsewhere it is refused with that rule."""
    shard = empty_shard(index=1, num_shards=2)
    shard.begin_initialization(manifest(), 5)
    assert sorted(shard.fragments) == [1]
    for index in (0, 2, 3):
        with pytest.raises(InvalidInputError, match=f"fragment {index} does not live on shard 1 of 2"):
            shard.plan_of(index)


def test_averaged_buffers_have_a_rule_of_their_own() -> None:
    """A push to a buffer enters whole and without momentum, one to a parameter by the outer rule."""
    for role, expected in (("averaged", [0.0, -1.0]), ("parameter", [0.0, -1.5])):
        shard = initialized(run=manifest(10, role))
        for seq, value in enumerate(expected, start=1):
            push(shard, 0, "a", seq, base_bin=seq - 1)
            assert torch.equal(torch.full((10,), value), shard.hosted(0)[1].w)


# --- Decisions.


@pytest.mark.parametrize("schedule", [Schedule(kind=ASYNC, quota=2), Schedule(kind=BARRIER, look_ahead=True)])
def test_replaying_what_was_decided_gives_the_same_state(schedule: Schedule) -> None:
    """The records of a history, followed by a shard without clock and members, end in equal ledgers and bits."""
    shard, codec, records = initialized(schedule), codecs.codec("int4"), []
    for worker in ("a", "b"):
        shard.membership.join(0.0, worker, 1)
    for number in range(40):
        index, worker, seq = number % 3, "ab"[number // 3 % 2], number // 6 + 1
        ledger = shard.fragments[index].ledger
        request = PushRequest(worker=worker, incarnation=1, seq=seq, base_bin=max(0, ledger.issuing_bin - number % 4))
        decision, ledger = shard.decide_push(float(number), index, request)
        values = shard.hosted(index)[1]
        payload = codecs.encode(codec, normal(values.num_elements, number))
        records.append(
            Decided(
                fragment=index,
                time_s=float(number),
                push=request,
                decision=decision,
                ledger=ledger,
                codec=codec.name,
                payload=payload,
            )
        )
        values.follow(decision, codec, payload)
        shard.keep(index, decision, ledger, worker)
    replayed = initialized(schedule)
    for record in records:
        assert record.codec is not None
        replayed.hosted(record.fragment)[1].follow(record.decision, codecs.codec(record.codec), record.payload)
        replayed.keep(record.fragment, record.decision, record.ledger, None)
    for index, fragment in shard.fragments.items():
        assert fragment.ledger == replayed.fragments[index].ledger
        (_, values), (_, again) = shard.hosted(index), replayed.hosted(index)
        assert torch.equal(values.w, again.w)
        assert torch.equal(values.state["u"], again.state["u"])
        assert float(values.state["u"].abs().max()) > 0


def test_deciding_changes_nothing_until_it_is_kept() -> None:
    """A decision whose journal record failed leaves no trace: the push is decided again, to the same."""
    shard = initialized()
    request = PushRequest(worker="a", incarnation=1, seq=1, base_bin=0)
    first = shard.decide_push(0.0, 0, request)
    assert shard.fragments[0].ledger == Ledger()
    assert first == shard.decide_push(0.0, 0, request)


def test_fragments_are_ordered_independently() -> None:
    """Pushes to one fragment open its bins only, and seq counts for each fragment by itself."""
    shard = initialized()
    for seq in (1, 2, 3):
        push(shard, 0, "a", seq, base_bin=seq - 1)
    push(shard, 2, "a", 1)
    assert {index: fragment.ledger.issuing_bin for index, fragment in shard.fragments.items()} == {0: 3, 1: 0, 2: 1}


def test_every_push_is_counted_as_what_it_was() -> None:
    """Applied, refused and repeated pushes are counted apart, and lateness is summed over the applied ones."""
    shard = initialized()
    push(shard, 0, "a", 1)
    push(shard, 0, "b", 1)  # one bin late
    push(shard, 0, "b", 1)
    push(shard, 0, "b", 2, base_bin=99)
    counters = shard.counters
    assert (
        counters.pushes_applied,
        counters.pushes_refused,
        counters.pushes_duplicate,
        counters.bins_late_total,
    ) == (2, 1, 1, 1)
    assert shard.pushes_by_worker == {"a": 1, "b": 1}


def test_who_counts_are_the_members() -> None:
    """A barrier waits for the members of the shard, and closes by itself when the missing one leaves."""
    shard = initialized(Schedule(kind=BARRIER))
    for worker in ("a", "b"):
        shard.membership.join(0.0, worker, 1)
    assert not push(shard, 0, "a", 1).answers
    assert shard.decide_close(0.0, 0) is None
    shard.membership.leave(0.0, "b", 1)
    decided = shard.decide_close(0.0, 0)
    assert decided is not None
    shard.keep(0, *decided, None)
    assert shard.fragments[0].ledger.issuing_bin == 1
    assert shard.counters.pushes_applied == 1
    assert decided[0].outcome is Outcome.CLOSED


def test_a_bin_may_close_next_when_a_quorums_grace_has_passed() -> None:
    """Without a quorum only an event closes it."""
    shard = initialized(Schedule(kind=QUORUM, quorum=2))
    for worker in ("a", "b", "c"):
        shard.membership.join(0.0, worker, 1)
    push(shard, 1, "a", 1, now=0.0)
    assert shard.next_close_s() is None
    push(shard, 1, "b", 1, now=8.0)
    assert shard.next_close_s() == 10.0
    assert shard.decide_close(9.9, 1) is None
    decided = shard.decide_close(10.0, 1)
    assert decided is not None
    shard.keep(1, *decided, None)
    assert shard.next_close_s() is None
