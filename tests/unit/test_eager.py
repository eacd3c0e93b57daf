"""What a worker knows between a push and its answer: DiLoCo with eager updates in its server form, and feedback."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.eager import Estimate, LocalContinuation, NoEstimate, OwnOuterStep, PreparedPush, WorkerFragment
from paceline_server.ledger import Schedule
from paceline_wire import codecs
from paceline_wire.errors import CodecError
from support_core import BARRIER, EXACT, PlayedFragment, assert_near, names, normal, only_answer

SIZE = 5
prop = settings(deadline=None, derandomize=True, max_examples=40)
momenta = st.sampled_from([0.0, 0.5, 0.9])
each_codec = pytest.mark.parametrize("name", codecs.CODEC_NAMES)
LOSSY = [name for name in codecs.CODEC_NAMES if not codecs.codec(name).lossless]
each_lossy = pytest.mark.parametrize("name", LOSSY)

Gradient = Callable[[int, int, torch.Tensor], torch.Tensor]
"""The outer gradient of a worker in a round that starts at given parameters."""


def random_gradients(seed: int) -> Gradient:
    """Outer gradients that do not depend on the parameters."""
    return lambda worker, number, _theta: normal(SIZE, 1000 * seed + 100 * worker + number).double()


def quadratic_gradients(seed: int) -> Gradient:
    """Outer gradients of inner steps on quadratic losses: each worker is drawn to an optimum of its own."""
    pulls = 0.05 + 0.25 * torch.rand(SIZE, generator=torch.Generator().manual_seed(seed)).double()
    return lambda worker, _number, theta: pulls * (theta.double() - normal(SIZE, 1000 * seed + worker).double())


class PaperForm:
    """Algorithm 2 of the eager-updates paper, in float64: every worker has an outer optimizer of its own."""

    def __init__(self, theta: torch.Tensor, num_workers: int, *, lr: float, beta: float, nesterov: bool) -> None:
        self.thetas = [theta.double().clone() for _ in range(num_workers)]
        self._velocities = [torch.zeros_like(theta, dtype=torch.float64) for _ in range(num_workers)]
        self._previous: list[torch.Tensor] | None = None
        self._num_workers, self._lr, self._beta, self._nesterov = num_workers, lr, beta, nesterov

    def end_round(self, own: list[torch.Tensor]) -> None:
        """Take every worker's outer gradient of a round, and make each one's eager outer step."""
        for worker, gradient in enumerate(own):
            eager = gradient / self._num_workers
            if self._previous is not None:
                stale_mean = torch.stack(self._previous).mean(0)
                eager = stale_mean + (gradient - self._previous[worker]) / self._num_workers
            velocity = self._beta * self._velocities[worker] + eager
            self._velocities[worker] = velocity
            step = eager + self._beta * velocity if self._nesterov else velocity
            self.thetas[worker] = self.thetas[worker] - self._lr * step
        self._previous = own


def pushed(worker: WorkerFragment, outer_gradient: torch.Tensor, num_workers: int) -> PreparedPush:
    """Push what a round has done that ended at zero."""
    return worker.push(outer_gradient, torch.zeros_like(outer_gradient), num_workers)


def stepped(estimate: OwnOuterStep, outer_gradient: torch.Tensor) -> torch.Tensor:
    """The step that is expected of a push, with one worker."""
    return estimate.expect(codecs.compensate(EXACT, outer_gradient), outer_gradient.numel(), 1)


class ServerForm:
    """Workers that add their own expected steps to what one shard answers, a whole round later or at once."""

    def __init__(self, num_workers: int, *, lr: float, beta: float, look_ahead: bool, whole: bool = False) -> None:
        schedule = Schedule(kind=BARRIER, quota=num_workers, look_ahead=look_ahead)
        self.server = PlayedFragment(schedule, lr=lr, momentum=beta, workers=num_workers, size=SIZE)
        self._num_workers = num_workers
        self._unread: dict[str, tuple[int, torch.Tensor, int]] = {}
        self.workers = [
            WorkerFragment(
                base=self.server.initial.clone(),
                bin=0,
                codec=EXACT,
                estimate=OwnOuterStep(lr=lr, momentum=beta, look_ahead=look_ahead, whole=whole),
            )
            for _ in range(num_workers)
        ]

    @property
    def starts(self) -> list[torch.Tensor]:
        """Where each worker's next round starts."""
        return [worker.new_start() for worker in self.workers]

    def read(self) -> None:
        """Let every worker take in the answer that it was sent."""
        for name, worker in zip(names(self._num_workers), self.workers, strict=True):
            if name in self._unread:
                seq, values, newest_bin = self._unread.pop(name)
                worker.receive(seq, values, newest_bin, applied=True)

    def push(self, own: list[torch.Tensor]) -> None:
        """Let every worker push."""
        for name, worker, gradient in zip(names(self._num_workers), self.workers, own, strict=True):
            prepared = pushed(worker, gradient.float(), self._num_workers)
            decision = self.server.push(
                name, prepared.seq, prepared.base_bin, codecs.decode(EXACT, prepared.payload, SIZE)
            )
            for answer in decision.answers:
                self._unread[answer.worker] = (answer.seq, self.server.w.clone(), answer.bin)


# --- The server form is the paper's.


@pytest.mark.parametrize("gradients", [random_gradients, quadratic_gradients])
@pytest.mark.parametrize("nesterov", [True, False])
@prop
@given(num_workers=st.integers(1, 5), lr=st.sampled_from([0.4, 0.7]), beta=momenta, seed=st.integers(0, 20))
def test_the_server_form_is_the_papers_eager_update(
    gradients: Callable[[int], Gradient], nesterov: bool, num_workers: int, lr: float, beta: float, seed: int
) -> None:
    """With answers a round late and weight 1/M, every worker's every start is that of the paper's Algorithm 2."""
    if gradients is quadratic_gradients:
        lr, beta = 0.4, min(beta, 0.5)  # else the method itself is unstable, and amplifies rounding
    gradient = gradients(seed)
    ours = ServerForm(num_workers, lr=lr, beta=beta, look_ahead=nesterov)
    paper = PaperForm(ours.server.initial, num_workers, lr=lr, beta=beta, nesterov=nesterov)
    for number in range(8):
        own = [gradient(worker, number, start) for worker, start in enumerate(ours.starts)]
        ours.read()  # at the end of the round, however early the answer came: the paper does not rebase
        ours.push(own)
        paper.end_round([gradient(worker, number, theta) for worker, theta in enumerate(paper.thetas)])
        for expected, actual in zip(paper.thetas, ours.starts, strict=True):
            assert_near(expected, actual, tolerance=1e-5)


@pytest.mark.parametrize("nesterov", [True, False])
@prop
@given(num_workers=st.integers(1, 5), beta=momenta, seed=st.integers(0, 20))
def test_without_delay_it_is_blocking_diloco(nesterov: bool, num_workers: int, beta: float, seed: int) -> None:
    """Workers that are answered at once start each round from the state of torch's SGD on the mean outer gradients."""
    gradient = quadratic_gradients(seed)
    ours = ServerForm(num_workers, lr=0.7, beta=beta, look_ahead=nesterov)
    theta = torch.nn.Parameter(ours.server.initial.double())
    optimizer = torch.optim.SGD([theta], lr=0.7, momentum=beta, nesterov=nesterov and beta > 0)
    for number in range(8):
        own = [gradient(worker, number, start) for worker, start in enumerate(ours.starts)]
        theta.grad = torch.stack([gradient(worker, number, theta.detach()) for worker in range(num_workers)]).mean(0)
        optimizer.step()
        ours.push(own)
        ours.read()
        for start in ours.starts:
            assert torch.equal(ours.server.w, start)
            assert_near(theta.detach(), start, tolerance=1e-5)


@pytest.mark.parametrize("look_ahead", [True, False])
@prop
@given(num_workers=st.integers(1, 5), beta=momenta, seed=st.integers(0, 20))
def test_the_whole_weight_is_exact_when_all_push_the_same(
    look_ahead: bool, num_workers: int, beta: float, seed: int
) -> None:
    """With weight 1 and equal outer gradients, a worker's estimate is the very state that the server answers with."""
    gradient = random_gradients(seed)
    ours = ServerForm(num_workers, lr=0.7, beta=beta, look_ahead=look_ahead, whole=True)
    for number in range(6):
        ours.push([gradient(0, number, ours.server.w)] * num_workers)
        expected = ours.starts
        ours.read()
        for start in expected:
            assert_near(ours.server.w, start, tolerance=1e-5)


# --- Several pushes in flight.


def fragment(codec: str = "fp32", estimate: Estimate | None = None, size: int = SIZE) -> WorkerFragment:
    """A worker's fragment at base 0 and bin 0, which continues from its local end point by default."""
    return WorkerFragment(
        base=torch.zeros(size), bin=0, codec=codecs.codec(codec), estimate=estimate or LocalContinuation()
    )


def decoded(codec: str, push: PreparedPush, size: int) -> torch.Tensor:
    """What the server makes of a push."""
    return codecs.decode(codecs.codec(codec), push.payload, size)


@pytest.mark.parametrize("look_ahead", [True, False])
def test_two_pushes_in_flight_both_count(look_ahead: bool) -> None:
    """Every own step that is not in the base yet is added, and each leaves the sum when its answer comes."""
    lr, beta, num_workers = 0.7, 0.5, 2
    worker = fragment(estimate=OwnOuterStep(lr=lr, momentum=beta, look_ahead=look_ahead, whole=False))
    one, two = normal(SIZE, 1), normal(SIZE, 2)
    velocity = beta * one + two
    steps = [
        lr / num_workers * (one + beta * one if look_ahead else one),
        lr / num_workers * (two + beta * velocity if look_ahead else velocity),
    ]
    first = pushed(worker, one, num_workers)
    assert_near(-steps[0], worker.new_start(), 1e-6)
    second = pushed(worker, two, num_workers)
    assert_near(-steps[0] - steps[1], worker.new_start(), 1e-6)
    base = normal(SIZE, 3)
    worker.receive(first.seq, base, 1, applied=True)
    assert_near(base - steps[1], worker.new_start(), 1e-6)
    newest = normal(SIZE, 4)
    worker.receive(second.seq, newest, 2, applied=True)
    assert torch.equal(newest, worker.new_start())


@prop
@given(window=st.integers(1, 4), answers_read=st.integers(0, 4), seed=st.integers(0, 20))
def test_with_any_window_a_lone_worker_is_where_the_server_will_be(window: int, answers_read: int, seed: int) -> None:
    """One worker without momentum: whatever is in flight, its start is the state after all of it has been applied."""
    server = PlayedFragment(Schedule(kind=BARRIER, look_ahead=True), lr=0.7, momentum=0.0, workers=1, size=SIZE)
    estimate = OwnOuterStep(lr=0.7, momentum=0.0, look_ahead=True, whole=False)
    worker = WorkerFragment(base=server.initial.clone(), bin=0, codec=EXACT, estimate=estimate)
    name = names(1)[0]
    pushes = [pushed(worker, normal(SIZE, 10 * seed + number), 1) for number in range(window)]
    expected = worker.new_start()
    for number, push in enumerate(pushes):
        answer = only_answer(server.push(name, push.seq, push.base_bin, codecs.decode(EXACT, push.payload, SIZE)))
        if number < answers_read:
            worker.receive(answer.seq, server.w.clone(), answer.bin, applied=True)
            assert_near(expected, worker.new_start(), 1e-5)
    assert_near(expected, server.w, 1e-5)


# --- What is expected is what will be applied.


@each_codec
@pytest.mark.parametrize("estimate", ["own", "local"])
def test_the_worker_adds_what_the_server_applies(name: str, estimate: str) -> None:
    """The expected step is made of the decoded push, feedback included: the server's next state, bit for bit."""
    size = 600
    server = PlayedFragment(Schedule(kind=BARRIER), lr=1.0, momentum=0.0, workers=1, size=size)
    own = OwnOuterStep(lr=1.0, momentum=0.0, look_ahead=False, whole=True)
    worker = WorkerFragment(
        base=server.initial.clone(),
        bin=0,
        codec=codecs.codec(name),
        estimate=own if estimate == "own" else LocalContinuation(),
    )
    for number in range(4):
        push = pushed(worker, normal(size, number), 1)
        answer = only_answer(server.push(names(1)[0], push.seq, push.base_bin, decoded(name, push, size)))
        assert torch.equal(server.w, worker.new_start())
        worker.receive(answer.seq, server.w.clone(), answer.bin, applied=True)
        assert torch.equal(server.w, worker.new_start())


@pytest.mark.parametrize("name", [name for name in LOSSY if codecs.codec(name).residual_decay == 1])
@pytest.mark.parametrize("window", [1, 3])
def test_what_a_codec_loses_comes_with_the_next_push(name: str, window: int) -> None:
    """Over many acknowledged pushes the server gets the sum of the outer gradients, but for what one push can lose."""
    size, worker, rounds = 300, fragment(name, size=300), 300
    small = 1e-3 * normal(size, 0)
    small[::256] = 1.0
    arrived, in_flight = torch.zeros(size), []
    for _ in range(rounds):
        push = pushed(worker, small, 1)
        in_flight.append(push)
        arrived += decoded(name, push, size)
        if len(in_flight) == window:
            worker.receive(in_flight.pop(0).seq, torch.zeros(size), 0, applied=True)
    missing = (rounds * small - arrived).abs().max()
    assert float(missing) < 0.1  # half of the coarsest step, int4's, is 0.07; without feedback 300 small ones are lost


@each_lossy
def test_the_loss_of_a_refused_push_is_not_carried_over(name: str) -> None:
    """After a refusal, pushes are as if the refused one had never been made; the earlier loss is still owed."""
    size = 300
    with_refusal, without = fragment(name, size=size), fragment(name, size=size)
    for worker in (with_refusal, without):
        worker.receive(pushed(worker, normal(size, 1), 1).seq, torch.zeros(size), 1, applied=True)
    refused = pushed(with_refusal, normal(size, 2), 1)
    with_refusal.receive(refused.seq, torch.zeros(size), 2, applied=False)
    payloads = [pushed(worker, normal(size, 3), 1).payload for worker in (with_refusal, without)]
    assert torch.equal(*payloads)
    plain = codecs.encode(codecs.codec(name), normal(size, 3))
    assert not torch.equal(plain, payloads[0])


@each_lossy
def test_a_push_made_while_another_is_in_flight_pays_that_ones_loss(name: str) -> None:
    """The second of two pushes in flight carries what the codec lost of the first, once."""
    size, worker = 300, fragment(name, size=300)
    decay = codecs.codec(name).residual_decay
    first = pushed(worker, normal(size, 1), 1)
    lost = decay * (normal(size, 1) - decoded(name, first, size))
    second = pushed(worker, normal(size, 2), 1)
    assert torch.equal(codecs.encode(codecs.codec(name), normal(size, 2) + lost), second.payload)
    worker.receive(first.seq, torch.zeros(size), 0, applied=True)
    lost = decay * (normal(size, 2) + lost - decoded(name, second, size))
    worker.receive(second.seq, torch.zeros(size), 0, applied=True)
    third = pushed(worker, normal(size, 3), 1)
    assert torch.equal(codecs.encode(codecs.codec(name), normal(size, 3) + lost), third.payload)


# --- Pushes that will be refused.


@each_codec
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "estimate",
    [
        NoEstimate(),
        LocalContinuation(),
        OwnOuterStep(lr=0.7, momentum=0.0, look_ahead=True, whole=True),
        OwnOuterStep(lr=0.7, momentum=0.9, look_ahead=True, whole=True),
    ],
    ids=["none", "local", "without momentum", "with momentum"],
)
def test_a_push_that_will_be_refused_is_expected_to_do_nothing(name: str, bad: float, estimate: Estimate) -> None:
    """An outer gradient that is not finite is made a push that the server refuses, and does not move the start."""
    worker = fragment(name, estimate)
    gradient = normal(SIZE, 1)
    gradient[2] = bad
    push = pushed(worker, gradient, 2)
    with pytest.raises(CodecError):
        codecs.codec(name).check(push.payload, SIZE)
    assert torch.equal(torch.zeros(SIZE), worker.new_start())


def test_own_momentum_goes_on_while_a_push_is_refused() -> None:
    """After a refused push, the momentum of the earlier ones still decays by one power a push."""
    estimate = OwnOuterStep(lr=1.0, momentum=0.5, look_ahead=False, whole=True)
    one, zero = torch.ones(1), torch.zeros(1)
    assert [float(stepped(estimate, g)) for g in (one, zero, one)] == [1.0, 0.5, 1.25]


# --- The estimates.


def test_local_continuation_goes_on_from_the_local_end() -> None:
    """Start minus the outer gradient is where the inner steps ended."""
    worker, gradient = fragment(), normal(SIZE, 1)
    pushed(worker, gradient, 4)
    assert torch.equal(-gradient, worker.new_start())


def test_no_estimate_goes_on_from_the_base() -> None:
    """Blocking and delayed workers see their own push when its answer comes."""
    worker = fragment(estimate=NoEstimate())
    push = pushed(worker, normal(SIZE, 1), 4)
    assert torch.equal(torch.zeros(SIZE), worker.new_start())
    worker.receive(push.seq, normal(SIZE, 2), 3, applied=True)
    assert torch.equal(normal(SIZE, 2), worker.new_start())


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_an_estimate_changes_neither_gradient_nor_earlier_steps(momentum: float) -> None:
    """Estimates keep nothing of what they are given, and steps in flight stay what they were."""
    estimate = OwnOuterStep(lr=0.7, momentum=momentum, look_ahead=True, whole=True)
    gradient = normal(SIZE, 1)
    first = stepped(estimate, gradient)
    before = first.clone()
    gradient.zero_()
    stepped(estimate, normal(SIZE, 2))
    assert torch.equal(before, first)
    gradient = normal(SIZE, 3)
    stepped(estimate, gradient)
    assert torch.equal(normal(SIZE, 3), gradient)


def test_a_start_does_not_change_when_later_pushes_come() -> None:
    """Starts that were handed out stay as they were, and so does the base."""
    base, starts = torch.zeros(SIZE), []
    estimate = OwnOuterStep(lr=0.7, momentum=0.5, look_ahead=True, whole=True)
    worker = WorkerFragment(base=base, bin=0, codec=EXACT, estimate=estimate)
    for seed in range(3):
        pushed(worker, normal(SIZE, seed), 1)
        starts.append((worker.new_start(), worker.new_start().clone()))
    assert all(torch.equal(start, copy) for start, copy in starts)
    assert torch.equal(torch.zeros(SIZE), base)


def test_newer_values_change_the_base_and_nothing_else() -> None:
    """Values that were fetched take the base's place, bin and all; what is in flight is still added."""
    worker, gradient = fragment(), normal(SIZE, 1)
    pushed(worker, gradient, 1)
    worker.rebase(normal(SIZE, 2), 7)
    assert torch.equal(normal(SIZE, 2) - gradient, worker.new_start())
    assert pushed(worker, normal(SIZE, 3), 1).base_bin == 7


def test_pushes_are_numbered_and_name_the_newest_bin() -> None:
    """Seq counts from 1 without gaps, refused pushes included; the base bin is that of the newest answer."""
    worker = fragment()
    pushes = [pushed(worker, normal(SIZE, 1), 1), pushed(worker, normal(SIZE, 2), 1)]
    worker.receive(1, torch.zeros(SIZE), 5, applied=True)
    pushes.append(pushed(worker, normal(SIZE, 3), 1))
    worker.receive(2, torch.zeros(SIZE), 6, applied=False)
    pushes.append(pushed(worker, normal(SIZE, 4), 1))
    assert [(push.seq, push.base_bin) for push in pushes] == [(1, 0), (2, 0), (3, 5), (4, 6)]
