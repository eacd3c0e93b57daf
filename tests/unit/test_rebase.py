"""Rebase on arrival: model and start move together, so that an outer gradient is the inner steps' work and no more."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.eager import OwnOuterStep, WorkerFragment
from paceline.fragments import manifest_of
from paceline.model_state import FragmentState
from paceline.place import Handed, Place
from paceline.rebase import RoundStart
from paceline_server.ledger import Schedule
from paceline_wire import codecs
from support_core import BARRIER, EXACT, PLACES, PlayedFragment, Where, assert_near, names, normal, only_answer

SIZE = 24
prop = settings(deadline=None, derandomize=True, max_examples=60)
each_place = pytest.mark.parametrize("where", PLACES)
each_layout = pytest.mark.parametrize("layout", ["contiguous", "transposed"])
half_precision = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


class Live:
    """A model of one tensor, trained by hand, and its start."""

    def __init__(
        self,
        initial: torch.Tensor,
        *,
        dtype: torch.dtype = torch.float32,
        where: Where = Where("cpu"),  # noqa: B008  # frozen
        layout: str = "contiguous",
        place: Place | None = None,
    ) -> None:
        shape = (initial.numel() // 4, 4)
        self.tensor = initial.to(where.device, dtype).reshape(shape)
        if layout == "transposed":
            self.tensor = self.tensor.T.contiguous().T
        tensors = {"w": self.tensor}
        (fragment,) = manifest_of(tensors, averaged=(), fragment_elements=256).fragments
        self.place = place or where.place
        self.state = FragmentState(fragment, tensors, self.place)
        self.start = RoundStart(self.state, self.place.hand_over(self.place.from_host(self.values)))

    @property
    def values(self) -> torch.Tensor:
        """A copy of what the model holds, float32 on the host."""
        return self.tensor.reshape(-1).float().cpu().clone()

    def step(self, change: torch.Tensor) -> torch.Tensor:
        """Make an inner step; returns what it really changed."""
        before = self.values
        self.tensor.add_(change.reshape(self.tensor.shape).to(self.tensor.device))
        return self.values - before

    def rebase(self, start: torch.Tensor, *, untouched: bool = False, replace: bool = False) -> None:
        """Propose a start (float32 [n] on the host), and take it."""
        self.propose(start, replace=replace)
        self.start.adopt(untouched=untouched)

    def propose(self, start: torch.Tensor, *, replace: bool = False) -> None:
        """Propose a start (float32 [n] on the host), as the exchange does."""
        with self.place.stream():
            self.start.propose(self.place.from_host(start), replace=replace)

    def outer_gradient(self) -> torch.Tensor:
        """End the round; returns its outer gradient."""
        end = self.state.read()
        return (self.start.end_round(end).take() - end.take()).cpu()


def fractions(seed: int) -> torch.Tensor:
    """Numbers of at most 12 bits, whose sums float32 holds exactly: multiples of 1/64 below 32."""
    return torch.randint(-2048, 2048, (SIZE,), generator=torch.Generator().manual_seed(seed)) / 64.0


# --- What a round's outer gradient is.


@each_place
@each_layout
@prop
@given(events=st.lists(st.booleans(), max_size=12), seed=st.integers(0, 99))
def test_the_outer_gradient_is_the_work_of_the_inner_steps(
    where: Where, layout: str, events: list[bool], seed: int
) -> None:
    """However often the start moves within a round, start minus end is what the inner steps did, exactly."""
    live = Live(fractions(seed), where=where, layout=layout)
    work, start = torch.zeros(SIZE), fractions(seed)
    for number, is_step in enumerate(events, start=1):
        if is_step:
            work += live.step(fractions(seed + number))
        else:
            start = fractions(seed + number)
            live.rebase(start)
    assert torch.equal(start + work, live.values)
    assert torch.equal(-work, live.outer_gradient())


@each_place
@half_precision
@prop
@given(events=st.lists(st.booleans(), max_size=12), seed=st.integers(0, 99))
def test_what_a_16_bit_model_does_not_take_of_a_shift_is_not_work(
    where: Where, dtype: torch.dtype, events: list[bool], seed: int
) -> None:
    """Shifts of every size, most of them rounded away in part or whole, leave start minus end the inner steps' work."""
    live = Live(100.0 + fractions(seed), dtype=dtype, where=where)
    work = torch.zeros(SIZE)
    for number, is_step in enumerate(events, start=1):
        if is_step:
            work += live.step(fractions(seed + number))
        else:
            live.rebase(live.values + normal(SIZE, seed + number) * 10.0 ** (number % 5 - 3))
    assert torch.equal(-work, live.outer_gradient())


@half_precision
def test_a_shift_that_is_rounded_away_moves_nothing(dtype: torch.dtype) -> None:
    """A shift below the model's resolution moves neither model nor start, and is no outer gradient."""
    live = Live(torch.full((SIZE,), 200.0), dtype=dtype)
    live.step(torch.ones(SIZE))
    live.rebase(torch.full((SIZE,), 200.001))
    assert torch.equal(torch.full((SIZE,), 201.0), live.values)
    assert torch.equal(torch.full((SIZE,), -1.0), live.outer_gradient())


@each_place
@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_it_does_not_matter_when_in_the_round_the_answer_comes(where: Where, num_steps: int) -> None:
    """For given inner steps, a round ends in the same place with the same outer gradient, early answer or late."""
    ends = []
    for arrival in range(num_steps + 1):
        live = Live(fractions(0), where=where)
        for number in range(num_steps):
            if number == arrival:
                live.rebase(fractions(50))
            live.step(fractions(number + 1))
        if arrival == num_steps:
            live.rebase(fractions(50))
        ends.append((live.values, live.outer_gradient()))
    for values, gradient in ends[1:]:
        assert torch.equal(ends[0][0], values)
        assert torch.equal(ends[0][1], gradient)


def test_a_new_round_starts_where_the_last_one_ended() -> None:
    """The end that was handed over is the next round's start."""
    live = Live(fractions(0))
    first = live.step(fractions(1))
    assert torch.equal(-first, live.outer_gradient())
    assert torch.equal(torch.zeros(SIZE), live.outer_gradient())
    second = live.step(fractions(2))
    assert torch.equal(-second, live.outer_gradient())


# --- Exact starts.


@each_place
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_untouched_model_becomes_the_start_exactly(where: Where, dtype: torch.dtype) -> None:
    """Before the first inner step the model is set, without the rounding of a shift, and the outer gradient is zero."""
    live = Live(1e6 * normal(SIZE, 1) if dtype is torch.float32 else normal(SIZE, 1), dtype=dtype, where=where)
    start = normal(SIZE, 2)
    live.rebase(start, untouched=True)
    assert torch.equal(start.to(dtype).float(), live.values)
    assert torch.equal(torch.zeros(SIZE), live.outer_gradient())


@each_place
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_whose_values_are_unusable_is_replaced(where: Where, dtype: torch.dtype) -> None:
    """After a refused push a model full of NaN is set to the start, where a shift would leave it NaN."""
    live = Live(normal(SIZE, 1), dtype=dtype, where=where)
    live.step(torch.full((SIZE,), float("nan")))
    live.rebase(normal(SIZE, 2), replace=True)
    assert torch.equal(normal(SIZE, 2).to(dtype).float(), live.values)
    assert torch.equal(torch.zeros(SIZE), live.outer_gradient())


# --- Proposals.


def test_the_newest_proposal_counts_once() -> None:
    """Of several proposals the last is taken; taking again, or without any, changes nothing."""
    live = Live(fractions(0))
    work = live.step(fractions(1))
    live.start.adopt(untouched=False)
    assert torch.equal(fractions(0) + work, live.values)
    live.propose(fractions(2))
    live.propose(fractions(3))
    for _ in range(2):
        live.start.adopt(untouched=False)
        assert torch.equal(fractions(3) + work, live.values)
    assert torch.equal(-work, live.outer_gradient())


def test_a_proposal_is_nothing_until_it_is_taken() -> None:
    """Proposing changes neither the model nor the start: the training thread alone does."""
    live = Live(fractions(0))
    live.propose(fractions(1))
    assert torch.equal(fractions(0), live.values)


def test_a_proposal_that_was_not_taken_is_dropped_with_its_round() -> None:
    """A proposal against the start of a round that has ended does not move the next one."""
    live = Live(fractions(0))
    work = live.step(fractions(1))
    live.propose(fractions(2))
    assert torch.equal(-work, live.outer_gradient())
    live.start.adopt(untouched=False)
    assert torch.equal(fractions(0) + work, live.values)


class Interrupting(Place):
    """A place where, once, something happens on the training thread while a proposal is being computed."""

    meanwhile: Callable[[], object] | None = None

    def to_model(self, values: torch.Tensor) -> Handed:
        """Send values, after whatever happens meanwhile."""
        meanwhile, self.meanwhile = self.meanwhile, None
        if meanwhile is not None:
            meanwhile()
        return super().to_model(values)


def interrupted(initial: torch.Tensor) -> tuple[Live, Interrupting]:
    """A live model whose next proposal can be interrupted."""
    place = Interrupting(torch.device("cpu"))
    return Live(initial, place=place), place


def test_a_proposal_against_a_start_that_moved_is_computed_again() -> None:
    """If the training thread takes an earlier proposal meanwhile, the shift is counted from the start it moved to."""
    live, place = interrupted(fractions(0))
    work = live.step(fractions(1))
    live.propose(fractions(2))
    place.meanwhile = lambda: live.start.adopt(untouched=False)
    live.propose(fractions(3))
    assert place.meanwhile is None
    assert torch.equal(fractions(2) + work, live.values)
    live.start.adopt(untouched=False)
    assert torch.equal(fractions(3) + work, live.values)
    assert torch.equal(-work, live.outer_gradient())


def test_a_proposal_that_is_computed_while_its_round_ends_is_dropped() -> None:
    """It knows nothing of the round's own push, so it must not take the model back to before it."""
    live, place = interrupted(fractions(0))
    work = live.step(fractions(1))
    ended: list[torch.Tensor] = []
    place.meanwhile = lambda: ended.append(live.outer_gradient())
    live.propose(fractions(2))
    assert torch.equal(-work, ended[0])
    live.start.adopt(untouched=False)
    assert torch.equal(fractions(0) + work, live.values)
    live.rebase(fractions(3))
    assert torch.equal(fractions(3), live.values)
    assert torch.equal(torch.zeros(SIZE), live.outer_gradient())


# --- Whole rounds.


@each_place
@pytest.mark.parametrize("nesterov", [True, False])
def test_with_answers_at_once_a_rebased_worker_is_blocking_diloco(where: Where, nesterov: bool) -> None:
    """A live model rebased without delay starts every round from what torch's SGD makes of its outer gradients."""
    lr, beta = 0.7, 0.5
    server = PlayedFragment(
        Schedule(kind=BARRIER, look_ahead=nesterov), lr=lr, momentum=beta, workers=1, initial=normal(SIZE, 1)
    )
    live = Live(normal(SIZE, 1), where=where)
    estimate = OwnOuterStep(lr=lr, momentum=beta, look_ahead=nesterov, whole=False)
    worker = WorkerFragment(base=normal(SIZE, 1), bin=0, codec=EXACT, estimate=estimate)
    theta = torch.nn.Parameter(normal(SIZE, 1).double())
    optimizer = torch.optim.SGD([theta], lr=lr, momentum=beta, nesterov=nesterov)
    for number in range(5):
        for _ in range(3):
            live.step(-0.1 * (live.values - normal(SIZE, 100 + number)))
        gradient = live.outer_gradient()
        push = worker.push(gradient, torch.zeros(SIZE), 1)
        live.rebase(worker.new_start(), untouched=True)
        answer = only_answer(
            server.push(names(1)[0], seq=push.seq, base_bin=push.base_bin, gradient=_decoded(push.payload))
        )
        worker.receive(answer.seq, server.w.clone(), answer.bin, applied=True)
        live.rebase(worker.new_start(), untouched=True)
        end = theta.detach().clone()
        for _ in range(3):
            end -= 0.1 * (end - normal(SIZE, 100 + number).double())
        theta.grad = theta.detach() - end
        optimizer.step()
        assert torch.equal(server.w, live.values)
        assert_near(theta.detach(), live.values, 1e-5)


@each_place
@pytest.mark.parametrize("arrival", [0, 1, 2, 3])
def test_an_answer_in_the_middle_of_a_round_moves_the_round_to_it(where: Where, arrival: int) -> None:
    """After the answer, model and start are as if the round had begun with it; the outer gradient is the work."""
    server = PlayedFragment(Schedule(kind=BARRIER), lr=0.5, momentum=0.0, workers=1, initial=fractions(0))
    live = Live(fractions(0), where=where)
    estimate = OwnOuterStep(lr=0.5, momentum=0.0, look_ahead=False, whole=False)
    worker = WorkerFragment(base=fractions(0), bin=0, codec=EXACT, estimate=estimate)
    live.step(fractions(1))
    push = worker.push(live.outer_gradient(), torch.zeros(SIZE), 1)
    live.propose(worker.new_start())  # half of the step that the inner steps made
    answer = only_answer(
        server.push(names(1)[0], seq=push.seq, base_bin=push.base_bin, gradient=_decoded(push.payload))
    )
    work = torch.zeros(SIZE)
    for number in range(4):
        work += live.step(fractions(10 + number))
        if number == arrival:
            worker.receive(answer.seq, server.w.clone(), answer.bin, applied=True)
            live.propose(worker.new_start())
        live.start.adopt(untouched=False)
    assert torch.equal(server.w + work, live.values)
    assert torch.equal(-work, live.outer_gradient())


def _decoded(payload: torch.Tensor) -> torch.Tensor:
    return codecs.decode(EXACT, payload, SIZE)
