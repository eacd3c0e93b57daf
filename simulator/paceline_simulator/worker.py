"""One simulated worker in virtual time: where it is in its round, what it waits for, and what that cost."""

import math
import random
from collections import deque
from dataclasses import replace
from enum import Enum

from paceline.worker import ReceivedUpdate, StepTime, Worker
from paceline_simulator.result import WorkerResult
from paceline_simulator.server import SentUpdate
from paceline_simulator.workers import Link, WorkerSpec


class Phase(Enum):
    """What a worker is doing."""

    AWAY = "away"
    TRAINING = "training"
    WAITING = "waiting"
    """Its window is full, or it waits for the answer to its round."""
    DONE = "done"
    """It has made all the rounds that it was asked for."""


class SimulatedWorker:
    """A worker's place in virtual time; its training and its pushes are the real worker's logic.

    The end of inner step i of a round is at began_s + i step_s. Inner steps are made late: `logic.steps_in_round`
    counts those that the task has made, `due_steps` those that are over by a time.

    Args:
        number: Its number in the task.
        spec: What it is like.
        seed: Of the simulation.
    """

    def __init__(self, number: int, spec: WorkerSpec, seed: int) -> None:
        self.number = number
        self.spec = spec
        self.name = spec.name or f"worker-{number}"
        self.incarnation = 0
        self.phase = Phase.AWAY
        self.frozen_s: float | None = None
        self.result = WorkerResult(name=self.name)
        self.step_time = StepTime()
        self.uplink = Link(spec.uplink_bytes_per_s, spec.delay_s)
        self.downlink = Link(spec.downlink_bytes_per_s, spec.delay_s)
        self.began_s = 0.0
        self.step_s = spec.step_s
        self.last_step = 0
        """The inner step after which the round ends."""
        self.adopts_after: int | None = None
        """The inner step after which it takes a new start, if that is planned."""
        self.mail: list[SentUpdate] = []
        """What has come while it was frozen."""
        self.plans = 0
        """Counts changes of what was planned, so that events planned before mean nothing."""
        self._logic: Worker | None = None
        self._waiting_since_s = 0.0
        self._in_flight: deque[int] = deque()
        self._first_in_flight = 0
        self._jitter = random.Random(f"{seed}/{number}")  # noqa: S311  # not for secrets

    @property
    def logic(self) -> Worker:
        """The real worker's logic; only while the worker is there."""
        if self._logic is None:
            raise RuntimeError(f"{self.name} is away")
        return self._logic

    @property
    def is_member(self) -> bool:
        """Whether it has joined and neither left nor died."""
        return self._logic is not None

    def is_process(self, incarnation: int) -> bool:
        """Whether it is there, as this incarnation."""
        return self._logic is not None and self.incarnation == incarnation

    @property
    def rounds_in_flight(self) -> int:
        """Rounds that are not answered whole."""
        return len(self._in_flight)

    def enter(self, logic: Worker) -> None:
        """Begin as a new process."""
        self._logic = logic
        self._in_flight.clear()
        self._first_in_flight = 0
        self.mail.clear()
        self.frozen_s = None
        self.step_time = StepTime()
        self.uplink = Link(self.spec.uplink_bytes_per_s, self.spec.delay_s)
        self.downlink = Link(self.spec.downlink_bytes_per_s, self.spec.delay_s)

    def quit(self, now_s: float) -> None:
        """End as a process; what the round has done is lost."""
        self.stop_waiting(now_s)
        self.result.inner_steps += self.due_steps(now_s)
        self.result.computed_s += self.due_steps(now_s) * self.step_s
        self.phase = Phase.AWAY
        self.plans += 1
        self._logic = None

    def begin_round(self, now_s: float) -> None:
        """Begin to train."""
        sigma = self.spec.jitter
        factor = math.exp(sigma * self._jitter.gauss(0.0, 1.0) - sigma * sigma / 2) if sigma else 1.0
        self.phase = Phase.TRAINING
        self.began_s = now_s
        self.step_s = self.spec.step_s * factor
        self.change_last_step(self.logic.inner_steps)

    def change_last_step(self, step: int) -> None:
        """Let the round end after another inner step; what was planned for it is to be planned anew."""
        self.last_step = step
        self.adopts_after = None
        self.plans += 1

    def end_round(self) -> None:
        """Count the round that ends, whose steps are made."""
        steps = self.logic.steps_in_round
        self.step_time.observe(self.step_s, steps)
        self.result.inner_steps += steps
        self.result.computed_s += steps * self.step_s
        self.result.rounds += 1
        self._in_flight.append(self.logic.num_fragments)

    @property
    def reported_step_s(self) -> float:
        """The mean seconds of recent inner steps, as they travel with a push: in whole microseconds."""
        return max(1, round((self.step_time.mean_s or self.step_s) * 1e6)) / 1e6

    def answered(self, seq: int, update: ReceivedUpdate) -> None:
        """Count an answer to a fragment's push; seq counts rounds."""
        result = self.result
        result.pushes += 1
        result.pushes_refused += update.refusal is not None
        result.lateness[update.bins_late] = result.lateness.get(update.bins_late, 0) + 1
        result.bytes_down += update.num_bytes
        self._in_flight[seq - 1 - self._first_in_flight] -= 1
        while self._in_flight and self._in_flight[0] == 0:
            self._in_flight.popleft()
            self._first_in_flight += 1

    def wait(self, now_s: float) -> None:
        """Begin to wait."""
        self.phase = Phase.WAITING
        self._waiting_since_s = now_s

    def stop_waiting(self, now_s: float) -> None:
        """Count the time waited until now, if it waits; it may go on waiting."""
        if self.phase is Phase.WAITING:
            self.result.waited_s += now_s - self._waiting_since_s
            self._waiting_since_s = now_s

    def step_end_s(self, step: int) -> float:
        """When a step of the round ends."""
        return self.began_s + step * self.step_s

    def first_step_not_before(self, time_s: float) -> int:
        """The first boundary between steps at or after a time: 0 is the beginning of the round."""
        step = max(0, math.ceil((time_s - self.began_s) / self.step_s))
        while step > 0 and self.step_end_s(step - 1) >= time_s:
            step -= 1
        while self.step_end_s(step) < time_s:
            step += 1
        return step

    def due_steps(self, now_s: float) -> int:
        """Steps of the round that are over by a time."""
        if self.phase is not Phase.TRAINING:
            return self.logic.steps_in_round if self.phase is Phase.WAITING else 0
        until_s = now_s if self.frozen_s is None else self.frozen_s
        step = self.first_step_not_before(until_s)
        return min(step if self.step_end_s(step) <= until_s else step - 1, self.last_step)

    def freeze(self, now_s: float) -> None:
        """Do nothing until `thaw`."""
        self.stop_waiting(now_s)
        self.frozen_s = now_s
        self.adopts_after = None
        self.plans += 1

    def thaw(self, now_s: float) -> None:
        """Go on where it froze; time in which it was frozen counts as neither computing nor waiting."""
        if self.frozen_s is not None:
            self.began_s += now_s - self.frozen_s
            self._waiting_since_s = now_s
            self.frozen_s = None

    def take_mail(self) -> list[SentUpdate]:
        """What has come while it was frozen; it is empty then."""
        mail, self.mail = self.mail, []
        return mail

    def result_at(self, now_s: float) -> WorkerResult:
        """What it has done until now, the round that it is in included."""
        if self.frozen_s is None:
            self.stop_waiting(now_s)
        steps = self.due_steps(now_s)
        return replace(
            self.result,
            inner_steps=self.result.inner_steps + steps,
            computed_s=self.result.computed_s + steps * self.step_s,
            lateness=dict(sorted(self.result.lateness.items())),
        )
