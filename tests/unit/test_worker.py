"""The worker's logic without threads or time: rounds, what a push carries, and the coefficients that estimates use."""

import pytest
import torch

from paceline.eager import LocalContinuation, NoEstimate, OwnOuterStep, PredictedServer, WorkerFragment
from paceline.fragments import manifest_of
from paceline.local_momentum import LocalMomentum
from paceline.worker import Overlap, ReceivedUpdate, StepTime, Worker, WorkerSettings, estimate_of
from paceline_server.ledger import Schedule
from paceline_wire import codecs
from paceline_wire.errors import InvalidInputError
from paceline_wire.v1 import parameter_server_pb2 as pb
from support_core import BARRIER, EXACT, PlayedFragment, assert_near, names, normal, only_answer

SIZE = 6


def settings(own_weight: str = "1", overlap: Overlap = Overlap.EAGER, **outer: float | bool) -> WorkerSettings:
    """A worker's settings for a run of look-ahead, lr 0.5 and momentum 0.5 unless said otherwise."""
    configuration = pb.RunConfiguration(
        outer=pb.OuterConfiguration(**{"lr": 0.5, "momentum": 0.5, "look_ahead": True, **outer}),  # type: ignore[arg-type]  # a mapping has one value type
        exchange=pb.ExchangeConfiguration(own_weight=own_weight, window=2),
    )
    return WorkerSettings(configuration=configuration, overlap=overlap, uplink=EXACT)


def worker(of: WorkerSettings, *, buffer: bool = False) -> tuple[Worker, dict[str, torch.Tensor]]:
    """A worker at zero with a parameter w, and a buffer b in a fragment of its own if asked for; and its model."""
    tensors = {"w": normal(SIZE, 1)} | ({"b": normal(2, 2)} if buffer else {})
    manifest = manifest_of(tensors, ["b"], 256)
    bases = [(torch.zeros(fragment.num_elements), 0) for fragment in manifest.fragments]
    return Worker(of, manifest, tensors, bases, inner_steps=3, num_workers=2), tensors


def update(values: torch.Tensor, **changes: object) -> ReceivedUpdate:
    """An answer with these values."""
    fields = {"bin": 1, "bins_late": 0, "refusal": None, "inner_steps": 3, "quota": 2, "num_bytes": 0}
    return ReceivedUpdate(values=values, **{**fields, **changes})  # type: ignore[arg-type]  # a mapping has one value type


def decoded(payload: torch.Tensor) -> torch.Tensor:
    """What the server makes of a push."""
    return codecs.decode(EXACT, payload, payload.numel() // 4)


# --- Rounds.


def test_a_worker_begins_where_the_run_is() -> None:
    """The live model is set to what was fetched."""
    _, tensors = worker(settings())
    assert torch.equal(torch.zeros(SIZE), tensors["w"])


def test_a_round_is_full_after_its_steps_and_the_next_begins_at_none() -> None:
    """The worker's own number of steps counts before the server's."""
    logic, _ = worker(settings())
    assert logic.untouched
    logic.after_step(2)
    assert not logic.untouched
    assert not logic.is_full()
    assert logic.is_full(2)
    logic.after_step()
    assert logic.is_full()
    logic.end_round()
    assert (logic.round, logic.steps_in_round, logic.untouched) == (1, 0, True)


def test_tokens_are_those_of_the_round() -> None:
    """They add up, and a round in which nobody counted says so."""
    logic, _ = worker(settings())
    logic.count(3)
    logic.count(4)
    assert logic.end_round().tokens == 7
    assert logic.end_round().tokens is None
    logic.count(0)
    assert logic.end_round().tokens == 0


def test_a_round_pushes_what_the_inner_steps_did_and_goes_on_from_the_estimate() -> None:
    """Start minus end is pushed; the next round starts from base minus what is expected of it."""
    logic, tensors = worker(settings("1", momentum=0.0))
    work = normal(SIZE, 3)
    tensors["w"] -= work
    logic.after_step(3)
    push = logic.prepare(0, logic.end_round())
    assert torch.equal(work, decoded(push.payload))
    logic.adopt()
    assert torch.equal(-0.5 * work, tensors["w"])
    logic.take_in(0, push.seq, update(normal(SIZE, 4), inner_steps=9))
    logic.adopt()
    assert torch.equal(normal(SIZE, 4), tensors["w"])
    assert logic.inner_steps == 9


def test_blocking_workers_stay_until_the_answer() -> None:
    """Nothing is proposed before the answer; the window is one round, whatever the run's."""
    of = settings(overlap=Overlap.BLOCKING)
    logic, tensors = worker(of)
    tensors["w"] += 1
    logic.after_step(3)
    logic.prepare(0, logic.end_round())
    logic.adopt()
    assert torch.equal(torch.ones(SIZE), tensors["w"])
    assert of.window == 1
    assert settings().window == 2


@pytest.mark.parametrize("refusal", [None, "it has an infinity"])
def test_the_exchange_sets_a_model_that_is_lent(refusal: str | None) -> None:
    """A blocking worker's model is read where it is and set as answers come; the next round starts there."""
    logic, tensors = worker(settings(overlap=Overlap.BLOCKING))
    work = normal(SIZE, 3)
    tensors["w"] -= work
    logic.after_step(3)
    ended = logic.end_round()
    assert logic.is_lent
    push = logic.prepare(0, ended)
    assert torch.equal(work, decoded(push.payload))
    logic.take_in(0, push.seq, update(normal(SIZE, 4), refusal=refusal))
    assert torch.equal(normal(SIZE, 4), tensors["w"])
    logic.adopt()
    assert not logic.is_lent
    tensors["w"] -= work
    assert torch.equal(normal(SIZE, 4) - tensors["w"], decoded(logic.prepare(0, logic.end_round()).payload))


def test_only_the_training_thread_sets_a_tensor_that_is_scattered_in_memory() -> None:
    """Each write of its fragments rewrites all of such a tensor, so none of them may be set beside another."""
    tensors = {"w": normal(2 * 256, 1).reshape(256, 2).T}
    manifest = manifest_of(tensors, (), 256)
    bases = [(torch.zeros(256), 0)] * 2
    logic = Worker(settings(overlap=Overlap.BLOCKING), manifest, tensors, bases, inner_steps=3, num_workers=2)
    tensors["w"] += 1.0
    logic.after_step(3)
    ended = logic.end_round()
    pushes = [logic.prepare(index, ended) for index in range(2)]
    for index, push in enumerate(pushes):
        logic.take_in(index, push.seq, update(torch.full((256,), 4.0 + index)))
    assert torch.equal(torch.ones(2, 256), tensors["w"])
    logic.adopt()
    assert torch.equal(torch.tensor([[4.0], [5.0]]).expand(2, 256), tensors["w"])


def test_a_model_that_was_taken_back_is_not_set_any_more() -> None:
    """After a wait that broke off the model is the script's: what comes then is proposed, and no inner step is lost."""
    tensors = {"v": normal(SIZE, 1), "w": normal(256, 2)}
    manifest = manifest_of(tensors, (), 256)
    bases = [(torch.zeros(fragment.num_elements), 0) for fragment in manifest.fragments]
    logic = Worker(settings(overlap=Overlap.BLOCKING), manifest, tensors, bases, inner_steps=3, num_workers=2)
    sizes = [fragment.num_elements for fragment in manifest.fragments]
    for tensor in tensors.values():
        tensor += 8.0
    logic.after_step(3)
    ended = logic.end_round()
    pushes = [logic.prepare(index, ended) for index in range(2)]
    logic.take_in(0, pushes[0].seq, update(torch.full((sizes[0],), 2.0)))
    logic.take_back()
    before = [tensor.clone() for tensor in tensors.values()]
    for tensor in tensors.values():
        tensor += 1.0
    logic.after_step()
    logic.take_in(1, pushes[1].seq, update(torch.full((sizes[1],), 4.0)))
    assert all(torch.equal(old + 1.0, tensor) for old, tensor in zip(before, tensors.values(), strict=True))
    logic.adopt()
    values = torch.cat([tensors["v"], tensors["w"]])
    assert torch.equal(torch.cat((torch.full((sizes[0],), 3.0), torch.full((sizes[1],), 5.0))), values)
    ended = logic.end_round()
    gradients = [decoded(logic.prepare(index, ended).payload) for index in range(2)]
    assert torch.equal(torch.full((SIZE + 256,), -1.0), torch.cat(gradients))


def test_an_answer_to_an_earlier_start_does_not_set_the_model_under_inner_steps() -> None:
    """A blocking worker that went on with pushes in flight trains meanwhile: their answers shift the model."""
    logic, tensors = worker(settings(overlap=Overlap.BLOCKING))
    logic.after_step(3)
    push = logic.prepare(0, logic.end_round())
    logic.adopt()
    tensors["w"] += 1.0
    logic.after_step()
    logic.take_in(0, push.seq, update(torch.full((SIZE,), 2.0)))
    assert torch.equal(torch.ones(SIZE), tensors["w"])
    logic.adopt()
    assert torch.equal(torch.full((SIZE,), 3.0), tensors["w"])


def test_canonical_parameters_replace_the_model() -> None:
    """With nothing in flight the model becomes the run's in every bit, steps made meanwhile or not."""
    logic, tensors = worker(settings())
    tensors["w"] += 0.1
    logic.after_step()
    logic.adopt_canonical([(normal(SIZE, 5), 7)])
    assert torch.equal(normal(SIZE, 5), tensors["w"])
    assert logic.prepare(0, logic.end_round()).base_bin == 7


# --- Local momentum.


def test_local_momentum_follows_the_outer_gradient_of_parameters_only() -> None:
    """A push of a parameter has both; one of a buffer has the outer gradient alone."""
    logic, tensors = worker(settings(local_momentum=True), buffer=True)
    work, momentum = normal(SIZE, 3), normal(SIZE, 4)
    tensors["w"] -= work
    logic.after_step(3)
    ended = logic.end_round({"w": momentum})
    payloads = [decoded(logic.prepare(index, ended).payload) for index in range(2)]
    assert sorted(payload.numel() for payload in payloads) == [2, 2 * SIZE]
    assert torch.equal(torch.cat((work, momentum)), max(payloads, key=torch.numel))
    logic.adopt()
    assert torch.equal(-0.5 * work, tensors["w"])  # what is expected is the outer gradient's own step


def sgd(**arguments: float | bool) -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
    """A parameter and torch's SGD for it."""
    parameter = torch.nn.Parameter(torch.zeros(3))
    return parameter, torch.optim.SGD([parameter], **{"lr": 0.1, "momentum": 0.9, **arguments})  # type: ignore[arg-type]  # a mapping has one value type


def test_local_momentum_is_sgds_with_the_rate_inside() -> None:
    """After steps along one gradient it is p = beta p + lr g, and after a reset it begins anew."""
    parameter, optimizer = sgd()
    momentum = LocalMomentum(optimizer, {"x": parameter}, 0.9)
    assert torch.equal(torch.zeros(3), momentum.read()["x"])
    for expected in (0.1, 0.19):
        parameter.grad = torch.ones(3)
        optimizer.step()
        assert_near(torch.full((3,), expected), momentum.read()["x"], 1e-6)
    momentum.reset()
    assert torch.equal(torch.zeros(3), momentum.read()["x"])
    optimizer.step()
    assert_near(torch.full((3,), 0.1), momentum.read()["x"], 1e-6)


@pytest.mark.parametrize(
    "arguments", [{"momentum": 0.8}, {"momentum": 0.0}, {"nesterov": True}, {"dampening": 0.1}], ids=str
)
def test_an_optimizer_with_other_momentum_is_refused(arguments: dict[str, float | bool]) -> None:
    """The run's coefficient, no nesterov, no dampening; the sentence says what there is."""
    parameter, optimizer = sgd(**arguments)
    with pytest.raises(InvalidInputError, match=r"torch\.optim\.SGD needs momentum 0\.9"):
        LocalMomentum(optimizer, {"x": parameter}, 0.9)


def test_an_optimizer_without_momentum_is_refused() -> None:
    """AdamW's moments are not what OrLoMo orders."""
    parameter = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(InvalidInputError, match="not AdamW"):
        LocalMomentum(torch.optim.AdamW([parameter]), {"x": parameter}, 0.9)


# --- Estimates.


@pytest.mark.parametrize(
    ("of", "expected"),
    [
        (settings("1"), OwnOuterStep),
        (settings("1/M"), OwnOuterStep),
        (settings("local"), LocalContinuation),
        (settings("predicted"), PredictedServer),
        (settings("predicted", local_momentum=True), OwnOuterStep),
        (settings("predicted", overlap=Overlap.DELAYED), NoEstimate),
        (settings("1", overlap=Overlap.BLOCKING), NoEstimate),
    ],
)
def test_the_estimate_is_the_configurations(of: WorkerSettings, expected: type) -> None:
    """Workers that are eager estimate as the run says; buffers never have momentum."""
    fragments = manifest_of({"w": torch.zeros(3), "b": torch.zeros(3)}, ["b"], 256).fragments
    kinds = {fragment.role: type(estimate_of(of, fragment)) for fragment in fragments}
    assert kinds["parameter"] is expected
    assert kinds["averaged"] in (expected, OwnOuterStep)


def test_an_estimate_of_a_later_version_is_refused() -> None:
    """A server may be newer than its workers."""
    with pytest.raises(InvalidInputError, match="psychic"):
        worker(settings("psychic"))


@pytest.mark.parametrize("look_ahead", [True, False])
def test_a_prediction_is_what_the_server_publishes_when_all_push_the_same(look_ahead: bool) -> None:
    """From the newest base and its momentum on, it is the server's own arithmetic."""
    server = PlayedFragment(Schedule(kind=BARRIER, look_ahead=look_ahead), lr=0.7, momentum=0.8, workers=1, size=SIZE)
    fragment = WorkerFragment(
        base=server.initial.clone(),
        bin=0,
        codec=EXACT,
        estimate=PredictedServer(lr=0.7, momentum=0.8, look_ahead=look_ahead),
    )
    for number in range(5):
        push = fragment.push(normal(SIZE, 10 + number), torch.zeros(SIZE), 3)
        predicted = fragment.new_start()
        answer = only_answer(server.push(names(1)[0], push.seq, push.base_bin, decoded(push.payload)))
        assert_near(server.w, predicted, 1e-6)
        fragment.receive(answer.seq, server.w.clone(), answer.bin, applied=True, momentum=server.u.clone())
        assert torch.equal(server.w, fragment.new_start())


def test_predictions_of_several_pushes_follow_each_other() -> None:
    """Look-ahead, two in flight, momentum known: each fills a bin; without in-flight pushes the base is the start."""
    lr, beta = 0.5, 0.5
    estimate = PredictedServer(lr=lr, momentum=beta, look_ahead=True)
    base, u, one, two = (normal(SIZE, seed) for seed in range(4))
    first = base - beta * u - lr * (1 + beta) * one
    assert_near(first, estimate.start(base, u, [one]), 1e-6)
    second = first - beta * (beta * (u + lr * one)) - lr * (1 + beta) * two
    assert_near(second, estimate.start(base, u, [one, two]), 1e-6)
    assert torch.equal(base, estimate.start(base, u, []))
    assert_near(base - lr * (1 + beta) * one, estimate.start(base, None, [one]), 1e-6)
    assert torch.equal(normal(SIZE, 0), base)
    assert torch.equal(normal(SIZE, 1), u)


@pytest.mark.parametrize("own_weight", ["1", "predicted"])
def test_estimates_use_the_coefficients_that_the_run_has_now(own_weight: str) -> None:
    """New coefficients change what the next push is expected to do; an update without any changes nothing."""
    logic, tensors = worker(settings(own_weight, momentum=0.0))
    values = torch.zeros(SIZE)
    expected = []
    for told in ({}, {"lr": 0.1, "momentum": 0.0}, {}):
        tensors["w"] -= 1.0
        logic.after_step(3)
        push = logic.prepare(0, logic.end_round())
        logic.adopt()
        expected.append(float(tensors["w"][0]))
        logic.take_in(0, push.seq, update(values, **told))
        logic.adopt()
    assert expected == pytest.approx([-0.5, -0.5, -0.1])


def test_the_coefficients_of_buffers_never_change() -> None:
    """They are averaged at rate 1 without momentum, whatever the parameters' schedule says."""
    logic, tensors = worker(settings("1"), buffer=True)
    for _ in range(2):
        tensors["b"] += 2.0
        logic.after_step(3)
        ended = logic.end_round()
        pushes = [logic.prepare(index, ended) for index in range(2)]
        logic.adopt()
        assert torch.equal(torch.full((2,), 2.0), tensors["b"])
        for index, push in enumerate(pushes):
            size = push.payload.numel() // 4
            logic.take_in(index, push.seq, update(torch.zeros(size), lr=0.1, momentum=0.9))
        logic.adopt()


def test_the_time_of_a_step_is_a_mean_that_forgets() -> None:
    """Many steps at once count as one after the other."""
    together, apart = StepTime(), StepTime()
    assert together.mean_s is None
    for took_s, steps in ((1.0, 3), (2.0, 5), (0.5, 1)):
        together.observe(took_s, steps)
        for _ in range(steps):
            apart.observe(took_s)
    assert together.mean_s == pytest.approx(apart.mean_s)
