"""How long a peer may be silent follows from its own gaps, within bounds, whatever a few outliers were."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline_wire.errors import InvalidInputError
from paceline_wire.liveness import FIRST_GAPS, REMEMBERED_GAPS, Gaps

SECONDS = st.floats(0, 1e6)
MANY_GAPS = st.lists(SECONDS, min_size=FIRST_GAPS, max_size=3 * REMEMBERED_GAPS)


def after(gaps_s: list[float], *, floor_s: float = 0.0, longest_s: float = 1e12) -> Gaps:
    """Gaps that have seen a history."""
    gaps = Gaps(floor_s=floor_s, longest_s=longest_s)
    for gap_s in gaps_s:
        gaps.observe(gap_s)
    return gaps


@given(st.lists(SECONDS, max_size=2 * REMEMBERED_GAPS), SECONDS, SECONDS)
def test_the_bounds_hold_for_every_history(gaps_s: list[float], floor_s: float, more_s: float) -> None:
    """What is allowed is never below the floor nor above the longest."""
    longest_s = floor_s + more_s
    assert floor_s <= after(gaps_s, floor_s=floor_s, longest_s=longest_s).allowed_s <= longest_s


@given(st.lists(SECONDS, max_size=FIRST_GAPS - 1))
def test_a_short_history_allows_the_longest(gaps_s: list[float]) -> None:
    """Until five gaps are known, nothing is concluded from them."""
    assert after(gaps_s, floor_s=1, longest_s=20).allowed_s == 20


@given(MANY_GAPS)
def test_one_lost_message_is_never_silence(gaps_s: list[float]) -> None:
    """A gap of twice the median, which one lost heartbeat makes, is always allowed."""
    recent = sorted(gaps_s[-REMEMBERED_GAPS:])
    assert after(gaps_s).allowed_s >= 2 * recent[(len(recent) - 1) // 2]


@given(st.floats(0.001, 100), st.lists(SECONDS, max_size=REMEMBERED_GAPS // 2 - 1), st.randoms())
def test_outliers_change_nothing(usual_s: float, outliers_s: list[float], random: object) -> None:
    """As long as most gaps are alike, the others do not count, however large and wherever they come."""
    gaps_s = [usual_s] * (REMEMBERED_GAPS - len(outliers_s)) + outliers_s
    random.shuffle(gaps_s)  # type: ignore[attr-defined]  # hypothesis gives a random.Random
    assert after(gaps_s).allowed_s == pytest.approx(3 * usual_s)


@given(MANY_GAPS, st.lists(SECONDS, min_size=REMEMBERED_GAPS, max_size=REMEMBERED_GAPS))
def test_an_old_history_is_forgotten(old_s: list[float], new_s: list[float]) -> None:
    """Only the last 32 gaps count."""
    assert after(old_s + new_s).allowed_s == after(new_s).allowed_s


@given(MANY_GAPS)
def test_the_allowance_grows_with_the_gaps(gaps_s: list[float]) -> None:
    """A link on which everything takes twice as long is allowed twice as much."""
    assert after([2 * gap_s for gap_s in gaps_s]).allowed_s == pytest.approx(2 * after(gaps_s).allowed_s)


@given(MANY_GAPS, st.floats(0.01, 1e3))
def test_spread_is_allowed_for(gaps_s: list[float], shift_s: float) -> None:
    """Gaps that are all longer by some seconds allow three times those seconds more: the spread counts apart."""
    later = after([gap_s + shift_s for gap_s in gaps_s]).allowed_s
    assert later == pytest.approx(after(gaps_s).allowed_s + 3 * shift_s, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("bounds", [(-1.0, 20.0), (21.0, 20.0), (1.0, float("inf")), (float("nan"), 20.0)])
def test_bounds_that_make_no_sense_are_refused(bounds: tuple[float, float]) -> None:
    """Bounds out of order, negative or not finite are the caller's mistake."""
    with pytest.raises(InvalidInputError, match="silence"):
        Gaps(floor_s=bounds[0], longest_s=bounds[1])


@pytest.mark.parametrize("gap_s", [-0.1, float("nan"), float("inf")])
def test_a_gap_that_makes_no_sense_is_refused(gap_s: float) -> None:
    """A negative or endless gap is not noted."""
    gaps = Gaps(floor_s=1, longest_s=20)
    with pytest.raises(InvalidInputError, match="gap"):
        gaps.observe(gap_s)
