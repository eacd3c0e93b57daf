"""What one push does to w and u in time, early or late, on the shard's own decisions and numbers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline_server.ledger import Schedule
from support_core import ASYNC, BARRIER, PlayedFragment, assert_near, normal, only_answer

SIZE = 3
BINS_TO_SETTLE = 700
"""At the largest momentum used here, 0.97, less than 1e-9 of the displacement is left after so many bins."""

prop = settings(deadline=None, derandomize=True, max_examples=60)
momenta = st.sampled_from([0.0, 0.3, 0.5, 0.9, 0.97])
rates = st.sampled_from([0.05, 0.4, 0.7, 1.0])
bins = st.integers(0, 12)


class OnePush:
    """A fragment on which everything is silent but for one push of gradient g that belongs to bin 0.

    `pacer` moves the bins along with pushes of zeros; `walker` holds the first answer and pushes once.
    """

    def __init__(self, *, lr: float, momentum: float, quota: int = 1, look_ahead: bool = False) -> None:
        schedule = Schedule(kind=ASYNC, quota=quota, look_ahead=look_ahead)
        self.g = normal(SIZE, 3)
        self.eta, self.beta = lr / quota, momentum
        self.played = PlayedFragment(
            schedule, lr=lr, momentum=momentum, workers=("pacer", "walker"), initial=torch.zeros(SIZE)
        )
        self._paces, self._pacer_bin = 0, 0

    def open_bins(self, bin_number: int) -> None:
        """Push zeros until so many bins are open."""
        while self.played.open_bin < bin_number:
            self._paces += 1
            decision = self.played.push("pacer", self._paces, self._pacer_bin, torch.zeros(SIZE))
            self._pacer_bin = only_answer(decision).bin

    def push(self) -> int:
        """Let the one push arrive; returns how many bins late it entered."""
        return only_answer(self.played.push("walker", 1, 0, self.g)).bins_late

    def response(self, age: int) -> float:
        """By how much of g a push that belongs age bins back has moved w."""
        return self.eta * (1 - self.beta ** (age + 1)) / (1 - self.beta)

    def assert_responded(self) -> None:
        """Compare w and u with the step response, for the bins that have opened since bin 0."""
        age = self.played.open_bin
        assert_near(-self.response(age) * self.g.double(), self.played.w)
        assert_near(self.eta * self.beta**age * self.g.double(), self.played.u)
        self.played.assert_closed_form()


@prop
@given(lr=rates, beta=momenta, quota=st.integers(1, 4), late=bins)
def test_a_late_push_moves_w_at_once_by_all_it_would_have_done(lr: float, beta: float, quota: int, late: int) -> None:
    """A push d bins late moves w by eta (1 - beta^(d+1)) / (1 - beta) when it enters, and nothing moved before."""
    run = OnePush(lr=lr, momentum=beta, quota=quota)
    run.open_bins(late)
    assert_near(torch.zeros(SIZE, dtype=torch.float64), run.played.w, tolerance=0.0)
    entered_late = run.push()
    # Without look-ahead the numbers are opened lazily, so the next bin may have been issued before they are in it.
    assert entered_late in (late, late + 1)
    assert_near(-run.response(entered_late) * run.g.double(), run.played.w)


@prop
@given(lr=rates, beta=momenta, quota=st.integers(1, 4), look_ahead=st.booleans(), late=bins, more=bins)
def test_the_step_response_does_not_depend_on_the_lateness(
    lr: float, beta: float, quota: int, look_ahead: bool, late: int, more: int
) -> None:
    """After d bins a push has moved w by eta (1 - beta^(d+1)) / (1 - beta), late or not, whatever is published."""
    run = OnePush(lr=lr, momentum=beta, quota=quota, look_ahead=look_ahead)
    run.open_bins(late)
    run.push()
    run.assert_responded()
    for bin_number in range(run.played.open_bin, late + more + 1):
        run.open_bins(bin_number)
        run.assert_responded()


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.97])
@pytest.mark.parametrize("late", [0, 1, 7, 60])
def test_in_the_end_every_push_has_done_the_same(beta: float, late: int) -> None:
    """The final displacement is eta / (1 - beta), however late the push came, and nothing is left in u."""
    run = OnePush(lr=0.7, momentum=beta)
    run.open_bins(late)
    run.push()
    run.open_bins(late + BINS_TO_SETTLE)
    assert_near(-run.eta / (1 - beta) * run.g.double(), run.played.w)
    assert_near(torch.zeros(SIZE, dtype=torch.float64), run.played.u, tolerance=1e-7)


@prop
@given(lr=rates, beta=momenta, late=bins, more=bins)
def test_late_and_on_time_meet(lr: float, beta: float, late: int, more: int) -> None:
    """Once the late one is in, two runs that differ only in when the push came have the same w and u."""
    runs = [OnePush(lr=lr, momentum=beta, look_ahead=True) for _ in range(2)]
    on_time, behind = runs
    on_time.push()
    behind.open_bins(late)
    behind.push()
    last = max(run.played.open_bin for run in runs) + more
    for run in runs:
        run.open_bins(last)
    assert_near(on_time.played.w.double(), behind.played.w)
    assert_near(on_time.played.u.double(), behind.played.u)


@prop
@given(lr=rates, beta=momenta, look_ahead=st.booleans(), rounds_missed=st.integers(1, 8))
def test_a_lost_worker_of_a_barrier_lands_where_it_would_have_been(
    lr: float, beta: float, look_ahead: bool, rounds_missed: int
) -> None:
    """A barrier that went on without a worker takes its push late: at its share, by the step response of its bin."""
    schedule = Schedule(kind=BARRIER, look_ahead=look_ahead)
    played = PlayedFragment(schedule, lr=lr, momentum=beta, workers=("stays", "lost"), initial=torch.zeros(SIZE))
    played.leave("lost")
    for number in range(rounds_missed):
        played.push("stays", number + 1, number, torch.zeros(SIZE))
    played.join("lost")
    g = normal(SIZE, 4)
    answer = only_answer(played.push("lost", 1, 0, g))
    assert answer.bins_late == rounds_missed
    eta, age = lr / 2, played.open_bin
    assert age == rounds_missed
    assert_near(-eta * (1 - beta ** (age + 1)) / (1 - beta) * g.double(), played.w)
    played.assert_closed_form()
