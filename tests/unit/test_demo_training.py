"""The demo's model and paced loop, on a clock of the test's own."""

import math

import pytest
import torch

from paceline.demo.model import ModelConfig, build_model, evaluate
from paceline.demo.settings import DemoSettings
from paceline.demo.training import Pacer, build_optimizer, learning_rate, train


class FakeTime:
    """A clock that only moves when told to, and a sleep that moves it."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def clock(self) -> float:
        """Return the time."""
        return self.now_s

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.now_s += seconds


@pytest.fixture
def time() -> FakeTime:
    """A fresh clock."""
    return FakeTime()


@pytest.fixture
def pacer(time: FakeTime) -> Pacer:
    """A pacer of quarter seconds on that clock."""
    return Pacer(0.25, clock=time.clock, sleep=time.advance)


def test_a_short_step_lasts_its_pace(time: FakeTime, pacer: Pacer) -> None:
    """A step that needs less than its time is filled up to it, and isn't an overrun."""
    with pacer.step():
        time.advance(0.125)
    assert (pacer.elapsed_s, pacer.steps, pacer.overruns) == (0.25, 1, 0)


def test_a_long_step_is_counted_and_not_made_up_for(time: FakeTime, pacer: Pacer) -> None:
    """A step that overruns costs its time; the next one is paced as ever."""
    with pacer.step():
        time.advance(1.0)
    with pacer.step():
        pass
    assert (pacer.elapsed_s, pacer.steps, pacer.overruns) == (1.25, 2, 1)


def test_a_stopped_clock_is_not_training_time(time: FakeTime, pacer: Pacer) -> None:
    """What happens while the clock is stopped takes none of the training time."""
    with pacer.step():
        pass
    with pacer.stopped_clock():
        time.advance(60.0)
    assert pacer.elapsed_s == 0.25


def test_training_ends_with_its_time_and_learns(time: FakeTime) -> None:
    """Ten seconds of quarter-second steps are forty, and a text that repeats itself is learned."""
    settings = DemoSettings(seconds=10.0, model=ModelConfig(context=8, width=16, num_heads=2, num_layers=1))
    model = build_model(settings.model, seed=0)
    pacer = Pacer(0.25, clock=time.clock, sleep=time.advance)
    data = torch.tensor(list(b"ab" * 100), dtype=torch.uint8)
    results = list(train(model, build_optimizer(model, settings), data, settings, pacer, stream=0))
    assert len(results) == 40
    assert results[-1].elapsed_s == 10.0
    assert results[-1].loss < results[0].loss - 1


def test_the_rate_rises_then_falls_to_a_tenth() -> None:
    """The learning rate peaks when a twentieth of the time has passed, and ends at a tenth of the peak."""
    settings = DemoSettings(seconds=100.0, learning_rate=1.0, step_s=0.5)
    rates = [learning_rate(settings, begin_s=0.0, elapsed_s=float(second)) for second in range(101)]
    assert math.isclose(0.1, rates[0])
    assert rates.index(max(rates)) == 5
    assert sorted(rates[5:], reverse=True) == rates[5:]
    assert math.isclose(0.1, rates[-1])


def test_whoever_begins_late_begins_low() -> None:
    """A worker whose first step comes after the usual rise still has one of its own."""
    settings = DemoSettings(seconds=100.0, learning_rate=1.0, step_s=0.5)
    assert learning_rate(settings, begin_s=20.0, elapsed_s=20.0) < 0.1
    on_time = learning_rate(settings, begin_s=0.0, elapsed_s=25.0)
    assert math.isclose(on_time, learning_rate(settings, begin_s=20.0, elapsed_s=25.0))


def test_a_seed_decides_the_first_parameters() -> None:
    """All workers start alike, whatever the state of the global generator; another seed differs."""
    torch.manual_seed(1)
    first = build_model(ModelConfig(), seed=3).state_dict()
    torch.manual_seed(2)
    again = build_model(ModelConfig(), seed=3).state_dict()
    other = build_model(ModelConfig(), seed=4).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["embedding.weight"], other["embedding.weight"])


def test_an_untrained_model_knows_nothing() -> None:
    """Its loss is that of guessing evenly among 256 bytes, whatever the number of sequences."""
    model = build_model(ModelConfig(), seed=0)
    sequences = torch.randint(256, (70, 65), generator=torch.Generator().manual_seed(0))
    loss = evaluate(model, sequences[:, :-1], sequences[:, 1:])
    assert math.isclose(math.log(256), loss, rel_tol=0.02)


def test_a_model_cannot_see_ahead() -> None:
    """A byte's successors don't change what is predicted at it."""
    model = build_model(ModelConfig(context=8), seed=0)
    inputs = torch.arange(8)[None]
    changed = inputs.clone()
    changed[0, 5:] = 200
    assert torch.equal(model(inputs)[0, :5], model(changed)[0, :5])
