"""A whole run in virtual time.

Inner steps are made late and together: only when somebody needs a worker's model, at the end of its round or where it
takes a new start between two steps, are its steps made, and with them as many of every other worker that are over by
then. A task that stacks its workers' models computes them as one.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch

from paceline.fragments import manifest_of
from paceline.worker import EndedRound, Overlap, Worker, WorkerSettings
from paceline_server.config import ServerConfig
from paceline_server.construction import run_configuration
from paceline_server.ledger import PushRequest
from paceline_simulator.arrivals import Arrival, RecordedOrder
from paceline_simulator.codec_in_process import codec_in_process
from paceline_simulator.downlink import DeltaDownlink, WholeDownlink
from paceline_simulator.events import EventQueue, Priority
from paceline_simulator.network import Network
from paceline_simulator.result import Evaluation, Result
from paceline_simulator.server import SentPush, SentUpdate, SimulatedServer
from paceline_simulator.task import Task
from paceline_simulator.worker import Phase, SimulatedWorker
from paceline_simulator.workers import Absence, Manner, WorkerSpec
from paceline_wire.errors import InvalidInputError


class Simulation:
    """A run of one server and some workers.

    Answers take effect at the first boundary between two inner steps at or after their arrival; what arrives just when
    a round ends, takes effect before. The server's own work takes no time. Workers that join at the same moment are all
    members before any of them trains.

    Args:
        config: The server's configuration, as for a real run.
        task: What is trained; its workers are those of `workers`, in order.
        workers: What they are like.
        seed: Decides jitter, and nothing else: batches are the task's.
        overlap: What workers do while a push is under way.
        uplink: Codec of pushes; None: as the configuration says.
        downlink: Codec of updates; None: as the configuration says. Other ones than fp32 and bf16 write them as changes
            of what the worker holds.
        error_feedback: Whether what the uplink's codec loses is added to the next push.
        weigh_tokens: Whether pushes say how many tokens they stand for.
        evaluate_every_s: Virtual seconds between looks at the parameters; None: only at the beginning and the end of
            each `run`.
        arrival_order: The order in which pushes are let in, each at the recorded time; pushes of workers that are not
            in it come when it has ended.

    Raises:
        InvalidInputError: The arguments do not fit each other.
    """

    def __init__(
        self,
        config: ServerConfig,
        task: Task,
        workers: Sequence[WorkerSpec],
        *,
        seed: int = 0,
        overlap: Overlap = Overlap.EAGER,
        uplink: str | None = None,
        downlink: str | None = None,
        error_feedback: bool = True,
        weigh_tokens: bool = False,
        evaluate_every_s: float | None = None,
        arrival_order: Sequence[Arrival] | None = None,
    ) -> None:
        self._task = task
        self._workers = [SimulatedWorker(number, spec, seed) for number, spec in enumerate(workers)]
        names = {worker.name: worker.number for worker in self._workers}
        if not names or len(names) < len(self._workers):
            raise InvalidInputError("a simulation needs workers, and their names must differ")
        configuration = run_configuration(config)
        self._settings = WorkerSettings(
            configuration=configuration,
            overlap=overlap,
            uplink=codec_in_process(uplink or config.exchange.uplink),
            error_feedback=error_feedback,
        )
        self._orders_momentum = configuration.outer.local_momentum
        self._weigh_tokens = weigh_tokens
        first = task.tensors(0)
        self._manifest = manifest_of(first, task.averaged, config.exchange.fragment_elements)
        codec = codec_in_process(downlink or config.exchange.downlink)
        self._server = SimulatedServer(
            config,
            self._manifest,
            first,
            self._settings.uplink,
            WholeDownlink(codec) if codec.name in ("fp32", "bf16") else DeltaDownlink(codec),
            names,
        )
        self._lease_s = config.schedule.lease_s
        self._quota = config.schedule.quota
        self._evaluate_every_s = evaluate_every_s
        self._evaluations: list[Evaluation] = []
        self._max_rounds: int | None = None
        self._events = EventQueue()
        order = RecordedOrder(arrival_order) if arrival_order is not None else None
        self._network = Network(self._events, self._server, self._workers, order, self._deliver)
        self._plan()

    def run(
        self, *, until_s: float | None = None, until_pushes: int | None = None, until_rounds: int | None = None
    ) -> Result:
        """Simulate on from where the last call ended; whichever limit is reached first ends it.

        Args:
            until_s: Until this moment of virtual time; what happens at it, happens.
            until_pushes: Until the server has applied so many pushes, over all fragments.
            until_rounds: Until each worker has made so many rounds and all of them are answered.

        Raises:
            InvalidInputError: Nothing would ever end it.
        """
        if until_s is None and until_pushes is None and until_rounds is None:
            raise InvalidInputError("give a limit: until_s, until_pushes or until_rounds")
        self._max_rounds = until_rounds
        for worker in self._workers:
            if worker.phase is Phase.DONE:
                self._begin_round(worker)
        with torch.no_grad():
            if not self._evaluations:
                self._evaluate()
            while not self._reached(until_s, until_pushes):
                self._events.step()
            if until_s is not None and until_pushes is None and until_rounds is None:
                self._events.now_s = max(self._events.now_s, until_s)
            if self._evaluations[-1].time_s < self._events.now_s:
                self._evaluate()
        return self._result()

    def _reached(self, until_s: float | None, until_pushes: int | None) -> bool:
        next_s = self._events.next_s
        if next_s is None or (until_s is not None and next_s > until_s):
            return True
        if until_pushes is not None and self._server.pushes_applied >= until_pushes:
            return True
        return self._max_rounds is not None and all(
            worker.result.rounds >= self._max_rounds and not worker.rounds_in_flight for worker in self._workers
        )

    def _plan(self) -> None:
        """Put down what is known beforehand."""
        for worker in self._workers:
            self._events.put(worker.spec.joins_s, Priority.MEMBERSHIP, partial(self._join, worker))
            for absence in worker.spec.absences:
                self._events.put(absence.from_s, Priority.MEMBERSHIP, partial(self._go, worker, absence))
                if math.isfinite(absence.to_s):
                    self._events.put(absence.to_s, Priority.MEMBERSHIP, partial(self._return, worker, absence))
        if self._evaluate_every_s is not None:
            self._events.put(self._evaluate_every_s, Priority.EVALUATION, self._evaluate_again)

    # --- Workers come and go.

    def _join(self, worker: SimulatedWorker) -> None:
        worker.incarnation += 1
        self._server.join(self._now_s, worker.name, worker.incarnation)
        self._events.put(self._now_s, Priority.ADOPTION, partial(self._enter, worker, worker.incarnation))

    def _enter(self, worker: SimulatedWorker, incarnation: int) -> None:
        """Take the run's parameters and begin; by now, all who join at this moment are members."""
        if worker.incarnation != incarnation:
            return
        logic = Worker(
            self._settings,
            self._manifest,
            self._task.tensors(worker.number),
            self._server.fetch(worker.number),
            inner_steps=self._server.join(self._now_s, worker.name, incarnation),
            num_workers=self._quota or self._server.num_active,
        )
        worker.enter(logic)
        self._begin_round(worker)

    def _go(self, worker: SimulatedWorker, absence: Absence) -> None:
        if not worker.is_member:
            return
        if absence.manner is Manner.LEAVE:
            worker.quit(self._now_s)
            self._network.send_updates(self._server.leave(self._now_s, worker.name, worker.incarnation))
            return
        self._server.join(self._now_s, worker.name, worker.incarnation)  # its last sign of life
        self._events.put(self._now_s + self._lease_s, Priority.MEMBERSHIP, self._expire)
        if absence.manner is Manner.STALL:
            worker.freeze(self._now_s)
        else:
            worker.quit(self._now_s)

    def _return(self, worker: SimulatedWorker, absence: Absence) -> None:
        if absence.manner is not Manner.STALL:
            self._task.restart(worker.number)
            self._join(worker)
            return
        worker.thaw(self._now_s)
        self._server.join(self._now_s, worker.name, worker.incarnation)
        if worker.phase is Phase.TRAINING:
            self._plan_end(worker)
            self._plan_adoption(worker)
        for sent in worker.take_mail():
            self._take_update(worker, sent)

    def _expire(self) -> None:
        alive = [
            (worker.name, worker.incarnation)
            for worker in self._workers
            if worker.is_member and worker.frozen_s is None
        ]
        self._network.send_updates(self._server.expire(self._now_s, alive))

    # --- Rounds.

    def _begin_round(self, worker: SimulatedWorker) -> None:
        if self._max_rounds is not None and worker.result.rounds >= self._max_rounds:
            worker.phase = Phase.DONE
            return
        worker.begin_round(self._now_s)
        self._plan_end(worker)

    def _plan_end(self, worker: SimulatedWorker) -> None:
        ends_s = worker.step_end_s(worker.last_step)
        self._events.put(ends_s, Priority.ROUND_END, partial(self._end_round, worker, worker.plans))

    def _end_round(self, worker: SimulatedWorker, plans: int) -> None:
        if worker.plans != plans:
            return
        self._make_steps(worker, worker.last_step)
        worker.logic.adopt()
        worker.wait(self._now_s)
        self._go_on(worker)

    def _go_on(self, worker: SimulatedWorker) -> None:
        """End the waiting, if what a worker waits for has come: room in its window, or all answers."""
        if worker.logic.steps_in_round:
            if worker.rounds_in_flight >= self._settings.window:
                return
            worker.logic.adopt()
            self._push_round(worker)
            if self._settings.overlap is Overlap.BLOCKING:
                return
        elif worker.rounds_in_flight:
            return
        worker.stop_waiting(self._now_s)
        worker.logic.adopt()
        self._begin_round(worker)

    def _push_round(self, worker: SimulatedWorker) -> None:
        """Hand a round over, fragment by fragment."""
        logic = worker.logic
        if self._weigh_tokens:
            logic.count(logic.steps_in_round * self._task.tokens_per_step)
        worker.end_round()
        ended = logic.end_round(self._task.momentum(worker.number) if self._orders_momentum else None)
        if self._orders_momentum:
            self._task.reset_momentum(worker.number)
        for fragment in range(logic.num_fragments):
            self._network.send_push(self._prepared(worker, fragment, ended))

    def _prepared(self, worker: SimulatedWorker, fragment: int, ended: EndedRound) -> SentPush:
        prepared = worker.logic.prepare(fragment, ended)
        request = PushRequest(
            worker=worker.name,
            incarnation=worker.incarnation,
            seq=prepared.seq,
            base_bin=prepared.base_bin,
            tokens=ended.tokens,
        )
        return SentPush(
            worker=worker.number,
            fragment=fragment,
            request=request,
            payload=prepared.payload,
            inner_step_s=worker.reported_step_s,
        )

    def _make_steps(self, worker: SimulatedWorker, until: int) -> None:
        """Make a worker's inner steps up to one, and with them those of others that are over by now."""
        count = until - worker.logic.steps_in_round
        if count <= 0:
            return
        steps = {worker.number: count}
        for other in self._workers:
            if other.phase is Phase.TRAINING and other is not worker:
                made = other.logic.steps_in_round
                if other.step_end_s(made + 1) <= self._now_s and (pending := other.due_steps(self._now_s) - made) > 0:
                    steps[other.number] = min(pending, count)
        self._task.advance(steps)
        for number, made in steps.items():
            self._workers[number].logic.after_step(made)

    # --- Answers.

    def _deliver(self, worker: SimulatedWorker, sent: SentUpdate) -> None:
        if worker.frozen_s is None:
            self._take_update(worker, sent)
        else:
            worker.mail.append(sent)

    def _take_update(self, worker: SimulatedWorker, sent: SentUpdate) -> None:
        worker.logic.take_in(sent.fragment, sent.answer.seq, sent.update)
        worker.answered(sent.answer.seq, sent.update)
        if worker.phase is Phase.TRAINING:
            self._plan_adoption(worker)
        elif worker.phase is Phase.WAITING:
            self._go_on(worker)

    def _plan_adoption(self, worker: SimulatedWorker) -> None:
        """Let what has come take effect at the next boundary between two steps, on the round's length too."""
        boundary = worker.first_step_not_before(self._now_s)
        last_step = max(worker.logic.inner_steps, boundary, 1)
        if last_step != worker.last_step:
            worker.change_last_step(last_step)
            self._plan_end(worker)
        if boundary >= last_step:
            return  # the end of the round adopts
        if boundary <= worker.logic.steps_in_round:
            worker.logic.adopt()
        elif worker.adopts_after != boundary:
            worker.adopts_after = boundary
            adopts_s = worker.step_end_s(boundary)
            self._events.put(adopts_s, Priority.ADOPTION, partial(self._adopt, worker, boundary, worker.plans))

    def _adopt(self, worker: SimulatedWorker, boundary: int, plans: int) -> None:
        if worker.plans == plans:
            worker.adopts_after = None
            self._make_steps(worker, boundary)
            worker.logic.adopt()

    # --- What comes of it.

    @property
    def _now_s(self) -> float:
        return self._events.now_s

    def _evaluate_again(self) -> None:
        self._evaluate()
        if self._evaluate_every_s is not None and self._events.next_s is not None:
            self._events.put(self._now_s + self._evaluate_every_s, Priority.EVALUATION, self._evaluate_again)

    def _evaluate(self) -> None:
        inner_steps = sum(worker.result.inner_steps + worker.due_steps(self._now_s) for worker in self._workers)
        self._evaluations.append(
            Evaluation(
                time_s=self._now_s,
                pushes=self._server.pushes_applied,
                inner_steps=inner_steps,
                tokens=inner_steps * self._task.tokens_per_step,
                metrics=self._task.evaluate(self._server.tensors()),
            )
        )

    def _result(self) -> Result:
        return Result(
            time_s=self._now_s,
            parameters=self._server.tensors(),
            momentum=self._server.momentum(),
            evaluations=tuple(self._evaluations),
            workers=[worker.result_at(self._now_s) for worker in self._workers],
            arrivals=tuple(self._server.arrivals),
        )
