"""The guard against outliers: what is refused, how the measure follows the workers, and that norms are exact."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline_server.fragment import PIECE_ELEMENTS
from paceline_server.guard import ENOUGH_NORMS, REMEMBERED_NORMS, Guard, checked_norm, median_of, remember
from paceline_server.ledger import Decision, Outcome, PushRequest, Schedule
from paceline_server.membership import Membership
from paceline_server.rules import Rates
from paceline_server.rules.ordered_momentum import OrderedMomentum
from paceline_server.shard import Shard
from paceline_wire import codecs
from paceline_wire.errors import CodecError
from paceline_wire.manifest import Manifest, TensorSpec
from support_core import ASYNC, EXACT, normal

GUARD = Guard(outlier_factor=20.0)
prop = settings(deadline=None, derandomize=True, max_examples=100)
norms = st.floats(1e-30, 1e30)


def known(*values: float) -> tuple[float, ...]:
    """What is remembered after these norms."""
    recent: tuple[float, ...] = ()
    for value in values:
        recent = remember(recent, value)
    return recent


# --- What is an outlier.


def test_a_norm_beyond_the_factor_is_refused_with_all_that_explains_it() -> None:
    """The sentence has the fragment, the norm, the median, the factor, and what the worker may do."""
    recent = known(*[2.0] * ENOUGH_NORMS)
    assert GUARD.problem(7, 39.9, recent) is None
    sentence = GUARD.problem(7, 41.0, recent)
    assert sentence is not None
    for part in ("fragment 7", "norm 41", "last 8 pushes to the fragment, 2", "20 times", "go on from the parameters"):
        assert part in sentence


def test_nothing_is_refused_before_enough_is_known() -> None:
    """Of the first pushes to a fragment nobody can say what is usual."""
    assert GUARD.problem(0, 1e30, known(*[1.0] * (ENOUGH_NORMS - 1))) is None
    assert GUARD.problem(0, 1e30, known(*[1.0] * ENOUGH_NORMS)) is not None


def test_where_norms_differ_widely_more_is_allowed() -> None:
    """Norms over several powers of ten allow another one that alike norms would not."""
    alike, spread = known(*[1.0] * 16), known(*(10.0 ** (number % 5 - 2) for number in range(16)))
    assert median_of(alike) == median_of(spread) == 1.0
    assert GUARD.problem(0, 1e4, alike) is not None
    assert GUARD.problem(0, 1e4, spread) is None


def test_pushes_of_zeros_tell_nothing() -> None:
    """However many pushes of zeros came, they neither count as known norms nor are ever refused."""
    recent = known(*[0.0] * 64, 1.0, 1.0)
    assert recent == (1.0, 1.0)
    assert GUARD.problem(0, 0.0, known(*[1.0] * 64)) is None
    assert remember(recent, None) == recent


@prop
@given(recent=st.lists(norms, min_size=ENOUGH_NORMS, max_size=REMEMBERED_NORMS), norm=norms, scale=st.integers(-60, 60))
def test_judgement_is_free_of_units(recent: list[float], norm: float, scale: int) -> None:
    """Scaling all norms alike changes no judgement, and what is below the factor always passes."""
    base, factor = known(*recent), 2.0**scale
    allowed = GUARD.problem(0, norm, base) is None
    middle = median_of(base)
    assert middle is not None
    if norm <= middle * 19.99:
        assert allowed
    # Where it is decided by the last bit, either is right.
    for nudge in (1 - 1e-9, 1 + 1e-9):
        if (GUARD.problem(0, norm * nudge, base) is None) != allowed:
            return
    assert (GUARD.problem(0, norm * factor, known(*(value * factor for value in recent))) is None) == allowed


@prop
@given(values=st.lists(st.floats(0, 1e38), max_size=150))
def test_memory_is_bounded_and_keeps_the_latest(values: list[float]) -> None:
    """At most so many norms are remembered, in order, without zeros."""
    assert known(*values) == tuple(value for value in values if value > 0)[-REMEMBERED_NORMS:]


def test_a_change_of_scale_that_most_share_is_accepted_after_a_while() -> None:
    """When all pushes become a thousand times larger, they are refused at first and accepted from then on for good."""
    recent, refused = known(*(1.0 + number % 3 / 10 for number in range(REMEMBERED_NORMS))), []
    for number in range(2 * REMEMBERED_NORMS):
        norm = 1000.0 + number % 3
        refused.append(GUARD.problem(0, norm, recent) is not None)
        recent = remember(recent, norm)
    accepted_from = refused.index(False)
    assert 0 < accepted_from <= REMEMBERED_NORMS // 2 + 1
    assert not any(refused[accepted_from:])


def test_one_worker_of_four_never_becomes_the_measure() -> None:
    """A worker that sends outliers in every round is refused in every round, while the others are not."""
    recent = known(*[1.0] * ENOUGH_NORMS)
    for _ in range(100):
        for worker in range(4):
            norm = 1000.0 if worker == 0 else 1.0 + worker / 10
            assert (GUARD.problem(0, norm, recent) is not None) == (worker == 0)
            recent = remember(recent, norm)


# --- Norms.


@pytest.mark.parametrize("name", codecs.CODEC_NAMES)
@pytest.mark.parametrize("num_elements", [1, 255, 4096, PIECE_ELEMENTS, PIECE_ELEMENTS + 1, 2 * PIECE_ELEMENTS + 777])
def test_the_norm_is_that_of_what_is_decoded(name: str, num_elements: int) -> None:
    """Piece by piece or at once, in any codec, the norm is that of the decoded numbers."""
    codec = codecs.codec(name)
    payload = codecs.encode(codec, normal(num_elements, 3))
    decoded = codecs.decode(codec, payload, num_elements).double()
    assert math.isclose(checked_norm(codec, payload, num_elements), float(decoded.norm()), rel_tol=1e-12)


def test_the_norm_of_the_largest_numbers_is_finite() -> None:
    """Squares of float32's largest numbers do not overflow, and those of its smallest do not vanish."""
    for value in (3.4e38, 1e-38):
        payload = codecs.encode(EXACT, torch.full((10_000,), value))
        assert math.isclose(checked_norm(EXACT, payload, 10_000), 100 * value, rel_tol=1e-6)
    assert checked_norm(EXACT, codecs.encode(EXACT, torch.zeros(5)), 5) == 0.0
    assert checked_norm(EXACT, torch.empty(0, dtype=torch.uint8), 0) == 0.0


@pytest.mark.parametrize("name", codecs.CODEC_NAMES)
def test_what_is_not_finite_has_no_norm(name: str) -> None:
    """NaN and infinity are refused by the codec's own check."""
    codec = codecs.codec(name)
    for bad in (torch.nan, torch.inf):
        values = torch.ones(5000).index_fill(0, torch.tensor([4990]), bad)
        with pytest.raises(CodecError, match="finite"):
            checked_norm(codec, codecs.encode(codec, values), 5000)


# --- A shard's memory of norms.


def guarded_shard() -> Shard:
    """A shard of one parameter's fragment and one buffer's."""
    shard = Shard(
        index=0,
        num_shards=1,
        rule=OrderedMomentum(rates=Rates(peak_lr=1.0, full_momentum=0.5)),
        schedule=Schedule(kind=ASYNC, quota=1),
        membership=Membership(lease_s=30.0, inner_steps=10, dynamic_inner_steps=True),
        guard=GUARD,
    )
    tensors = [TensorSpec(name=role, shape=(256,), dtype="float32", role=role) for role in ("averaged", "parameter")]
    shard.begin_initialization(Manifest.of(tensors, 256), 1)
    for index in shard.fragments:
        shard.initialize_fragment(index, torch.zeros(256))
    return shard


def push(shard: Shard, index: int, seq: int, norm: float | None, problem: str | None = None) -> Decision:
    """Let a push of a norm arrive, and make its decision the state."""
    if problem is None and norm is not None:
        problem = shard.outlier_problem(index, norm)
    request = PushRequest(worker="a", incarnation=1, seq=seq, base_bin=0, problem=problem)
    decision, ledger = shard.decide_push(0.0, index, request)
    shard.keep(index, decision, ledger, "a", norm)
    return decision


def test_every_fragment_has_its_own_measure() -> None:
    """Norms count for their fragment only, for buffers as for parameters; repeated pushes count once."""
    shard = guarded_shard()
    for index, norm in ((0, 1.0), (1, 1000.0)):
        for seq in range(1, 10):
            for _ in range(2):
                push(shard, index, seq, norm)
    assert [fragment.norms for fragment in shard.fragments.values()] == [(1.0,) * 9, (1000.0,) * 9]
    assert push(shard, 0, 10, 1000.0).outcome is Outcome.REFUSED
    assert push(shard, 1, 10, 1000.0).outcome is Outcome.APPLIED
    assert shard.fragments[0].norms == (*(1.0,) * 9, 1000.0), "refused ones count, too"


def test_what_is_not_finite_does_not_enter_the_measure() -> None:
    """A push without a norm is refused and changes no history."""
    shard = guarded_shard()
    push(shard, 0, 1, 2.0)
    assert push(shard, 0, 2, None, "not finite").outcome is Outcome.REFUSED
    assert shard.fragments[0].norms == (2.0,)
