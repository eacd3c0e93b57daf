"""`join`: makes an unchanged training loop a worker of a run, by a hook on its optimizer's step."""

import logging
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from paceline.channels import TLS, Access
from paceline.exchanger import Exchanger, ExchangeSettings
from paceline.fragments import exchanged
from paceline.link_settings import LinkSettings
from paceline.local_momentum import LocalMomentum
from paceline.placement import ExchangeOn
from paceline.whereabouts import Locate
from paceline.worker import Overlap, StepTime
from paceline.worker_state import SavedWorker
from paceline_wire.errors import InvalidInputError
from paceline_wire.v1 import parameter_server_pb2 as pb

_log = logging.getLogger(__name__)

_PATIENCE_S = 10.0
"""Seconds after which a waiting training thread says in the log what it waits for."""


@dataclass(frozen=True, kw_only=True)
class Stats:
    """What a run has cost this worker so far.

    Attributes:
        rounds: Rounds exchanged whole.
        bytes_up: Payload bytes of pushes.
        bytes_down: Payload bytes of updates.
        stalled_s: Seconds that the training thread waited for the exchange.
        lateness: Mean number of bins that pushes were late when they were applied.
        compute_utilization: Share of the time since joining that the training thread did not wait, 0 to 1.
        pushes: Pushes answered, over all fragments.
        pushes_refused: Those that the server refused.
        reconnects: How often a connection was lost and resumed.
        connections: TCP connections that pushes go over, over all shards.
        inner_steps: Inner steps in the current round.
    """

    rounds: int
    bytes_up: int
    bytes_down: int
    stalled_s: float
    lateness: float
    compute_utilization: float
    pushes: int
    pushes_refused: int
    reconnects: int
    connections: int
    inner_steps: int


class Run:
    """A worker's membership of a run; made by `join`, a context manager.

    The training thread calls everything here. Leaving the context without an exception flushes.

    Args:
        exchanger: The exchange thread.
        optimizer: Its steps are the inner steps.
        inner_steps: Inner steps in a round; None: as the server says, round by round.
        overlap: What to do while a push is under way.
    """

    def __init__(
        self, exchanger: Exchanger, optimizer: torch.optim.Optimizer, inner_steps: int | None, overlap: Overlap
    ) -> None:
        self._exchanger = exchanger
        self._worker = exchanger.worker
        self._own_inner_steps = inner_steps
        self._overlap = overlap
        self._local_momentum = exchanger.local_momentum
        self._in_flight: deque[Future[None]] = deque()
        self._stalled_s = 0.0
        self._joined_s = time.perf_counter()
        self._step_began_s: float | None = None
        self._step_time = StepTime()
        self._hook = optimizer.register_step_post_hook(self._after_step)

    @property
    def worker_index(self) -> int:
        """This worker's number among the active ones at the time of joining, for dividing data."""
        return self._exchanger.worker_index

    @property
    def round(self) -> int:
        """The number of the current round, from 0."""
        return self._worker.round

    @property
    def inner_steps(self) -> int:
        """Inner steps in the current round."""
        return self._own_inner_steps or self._worker.inner_steps

    def count(self, tokens: int) -> None:
        """Add tokens (or samples) to what the current round stands for; its share of the learning rate grows with them.

        Never called, a round counts as much as the others' mean. Workers of a run should count the same thing.

        Raises:
            InvalidInputError: tokens is negative.
        """
        if tokens < 0:
            raise InvalidInputError(f"{tokens} tokens cannot be counted; a round stands for none or more")
        self._worker.count(tokens)

    def stats(self) -> Stats:
        """What the run has cost so far."""
        traffic = self._exchanger.traffic
        elapsed_s = time.perf_counter() - self._joined_s
        return Stats(
            rounds=traffic.rounds,
            bytes_up=traffic.bytes_up,
            bytes_down=traffic.bytes_down,
            stalled_s=self._stalled_s,
            lateness=traffic.bins_late / max(traffic.pushes, 1),
            compute_utilization=max(0.0, 1 - self._stalled_s / max(elapsed_s, 1e-9)),
            pushes=traffic.pushes,
            pushes_refused=traffic.pushes_refused,
            reconnects=self._exchanger.reconnects,
            connections=self._exchanger.connections,
            inner_steps=self.inner_steps,
        )

    def flush(self) -> None:
        """Push what the current round has done, wait for all answers, and adopt the server's parameters exactly.

        Raises:
            PacelineError: The server refuses this worker for good.
        """
        if self._worker.steps_in_round:
            self._wait_for_room(self._exchanger.window)
            self._end_round()
        self._wait_for_room(1)
        with torch.no_grad():
            self._worker.adopt()
        self._worker.adopt_canonical(self._exchanger.fetch_canonical())

    def state_dict(self) -> dict[str, Any]:
        """All that this worker must remember so that its own restart costs nothing: for a checkpoint of the script.

        Callable between any two inner steps; what is in flight stays so, and is part of the state. Save it together
        with model and optimizer. It holds up to 16 bytes for every parameter, and up to 12 for each round in flight.

        Returns:
            A nested dict of tensors, ints, strings, lists and None, which torch.save and
            torch.load(weights_only=True) take. Its tensors are not to be changed.

        Raises:
            PacelineError: The exchange has failed for good.
        """
        return self._exchanger.saved().to_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a process that has ended saved its state.

        Join with that process's worker_id, then call this before the first inner step. Pushes that were in flight are
        settled or sent again, so that each counts once; the model is set to the run's newest parameters, plus what is
        expected of the pushes in flight, plus what the unfinished round had done; and that round goes on at its step.

        Where the process had ended the round and pushed it before it died, the round is finished once more and its push
        is not applied again. Where it had pushed more than that, the state is too old: the unfinished round and the
        pushes in flight are dropped with a warning in the log, and a new round begins at the run's parameters.

        Args:
            state: What `state_dict` returned.

        Raises:
            InvalidInputError: The run has begun already here, or the state is of another worker, model or run.
            PacelineError: The server refuses this worker, or cannot be reached.

        Example:
            with paceline.join(address, model, optimizer, worker_id="a") as run:
                if checkpoint is not None:
                    run.load_state_dict(checkpoint["run"])
        """
        if self._worker.round or self._worker.steps_in_round or self._in_flight:
            raise InvalidInputError(
                "load_state_dict came after the first inner step, or a second time: call it once, right after join"
            )
        with torch.no_grad():
            self._in_flight.extend(self._exchanger.restore(SavedWorker.from_dict(state)))

    def close(self) -> None:
        """Leave the run at once; what is in flight may or may not count."""
        self._hook.remove()
        self._exchanger.close()

    def __enter__(self) -> "Run":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.flush()
        finally:
            self.close()

    def _after_step(self, optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        """The optimizer-step boundary: the only place where the model changes but by inner steps."""
        if _skipped_by_scaler(optimizer):
            return
        self._time_step()
        self._worker.after_step()
        with torch.no_grad():
            self._worker.adopt()
            if self._worker.is_full(self._own_inner_steps):
                self._wait_for_room(self._exchanger.window)
                self._worker.adopt()
                self._end_round()
                if self._overlap is Overlap.BLOCKING:
                    self._wait_for_room(1)
                    self._worker.adopt()
        self._step_began_s = time.perf_counter()

    def _end_round(self) -> None:
        """Hand the round over and go on at once."""
        if self._step_time.mean_s is not None:
            self._exchanger.report_speed(self._step_time.mean_s, self.inner_steps)
        if self._local_momentum is None:
            ended = self._worker.end_round()
        else:
            ended = self._worker.end_round(self._local_momentum.read())
            self._local_momentum.reset()
        self._in_flight.append(self._exchanger.begin_round(ended))

    def _wait_for_room(self, window: int) -> None:
        """Wait until fewer than window rounds are in flight; raises what ended the exchange, if something did."""
        began_s = time.perf_counter()
        try:
            while self._in_flight and (len(self._in_flight) >= window or self._in_flight[0].done()):
                self._wait_for_oldest(began_s)
        except BaseException:  # also whoever interrupts the wait: the script has its model again
            self._exchanger.take_model_back()
            raise
        self._stalled_s += time.perf_counter() - began_s

    def _wait_for_oldest(self, began_s: float) -> None:
        """Wait a while for the oldest round in flight; its warning counts from began_s."""
        try:
            self._in_flight[0].result(_PATIENCE_S)
        except TimeoutError:
            waited_s = time.perf_counter() - began_s
            _log.warning("round %d waits for its answer for %.0f s now", self.round, waited_s)
            return
        self._in_flight.popleft()

    def _time_step(self) -> None:
        if self._step_began_s is None:
            return
        self._step_time.observe(time.perf_counter() - self._step_began_s)


def join(
    address: str,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    inner_steps: int | None = None,
    worker_id: str | None = None,
    token: str | None = None,
    tls: TLS | str | Path | bool | None = None,
    uplink: str | None = None,
    downlink: str | None = None,
    overlap: str = "eager",
    connections: int | str | None = None,
    max_uplink_mbit: float | None = None,
    exchange_on: str = "auto",
    locate: Locate | None = None,
) -> Run:
    """Join a run with a model and the optimizer that trains it.

    The model is set to the run's parameters; the first worker to come gives the run its own. From then on every
    `inner_steps` optimizer steps make a round, whose outer gradient is pushed while training goes on. Trainable
    parameters are exchanged, tied ones once; floating persistent buffers are averaged; frozen parameters and integer
    buffers stay local, and so does the optimizer's state.

    Args:
        address: "host:port" of any shard of the run.
        model: Its parameters may be on any device, in float32, bfloat16 or float16.
        optimizer: Any torch optimizer; steps that an AMP GradScaler skips do not count.
        inner_steps: Inner steps in a round; None: as the server says, which gives slower workers fewer.
        worker_id: This worker's name, the same after a restart; None: a new name from the credential's,
            host and process.
        token: The run's token; None: that in the variable PACELINE_TOKEN, or in the file PACELINE_TOKEN_FILE names.
        tls: None: no TLS; True: verify with the system's authorities; a path: with that CA file; or a `TLS`.
        uplink: Codec of pushes; None: as the server says.
        downlink: Codec of updates; None: as the server says.
        overlap: "eager": never wait while the window has room, and see own work at once; "delayed": the same, but own
            work shows when its answer comes; "blocking": wait for every answer.
        connections: TCP connections to each shard, 1 to 8, or "auto": as many as pay; None: as the server says.
        max_uplink_mbit: Mbit/s that pushes may take, to all shards together; None: as the server says.
        exchange_on: Where outer gradients are encoded and updates decoded, and what the exchange remembers is kept:
            "device": where the model is, which on a GPU takes up to 36 bytes of its memory for every parameter;
            "host"; "auto": on the GPU where that is at most an eighth of its memory.
        locate: Says where the run's shards are now, as "host:port" of each in order, for shards that move (see
            `paceline.whereabouts.Locate`); None: they stay at the addresses at which they were found.

    Returns:
        The run, a context manager.

    Raises:
        InvalidInputError: An argument or a tensor is not as said.
        ManifestMismatchError: The run trains another model; the text names the first tensor that differs.
        UnavailableError: The server cannot be reached, or one of the certificates does not verify.
        UnauthenticatedError: The token is missing or wrong.

    Example:
        with paceline.join("ps.example.org:7070", model, optimizer) as run:
            for batch in loader:
                loss = model(batch)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
    """
    if overlap not in [kind.value for kind in Overlap]:
        raise InvalidInputError(f"overlap {overlap!r} is not one of {', '.join(kind.value for kind in Overlap)}")
    if exchange_on not in [kind.value for kind in ExchangeOn]:
        known = ", ".join(kind.value for kind in ExchangeOn)
        raise InvalidInputError(f"exchange_on {exchange_on!r} is not one of {known}")
    if inner_steps is not None and inner_steps < 1:
        raise InvalidInputError(f"inner_steps is {inner_steps}; it must be at least 1")
    settings = ExchangeSettings(
        worker_id=worker_id,
        access=Access.of(tls, token),
        overlap=Overlap(overlap),
        uplink=uplink,
        downlink=downlink,
        link=LinkSettings(connections=connections, max_uplink_mbit=max_uplink_mbit),
        exchange_on=ExchangeOn(exchange_on),
        locate=locate,
    )
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    persistent = model.state_dict(keep_vars=True).keys()
    buffers = {
        name: buffer for name, buffer in model.named_buffers() if name in persistent and buffer.is_floating_point()
    }
    tensors = exchanged({**trained, **buffers})
    parameters = {name: parameter for name, parameter in trained.items() if name in tensors}

    def momentum_of(configuration: pb.RunConfiguration) -> LocalMomentum | None:
        outer, asked = configuration.outer, configuration.exchange.inner_steps
        if not outer.local_momentum:
            return None
        if inner_steps not in (None, asked):
            raise InvalidInputError(
                f"inner_steps is {inner_steps}; this run's outer rule orders the workers' momentum, which decays by "
                f"the {asked} inner steps of every worker's round: leave it out"
            )
        return LocalMomentum(optimizer, parameters, outer.momentum)

    exchanger = Exchanger(address, settings, tensors, buffers.keys(), momentum_of)
    return Run(exchanger, optimizer, inner_steps, Overlap(overlap))


def _skipped_by_scaler(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an AMP GradScaler found infinite gradients in this step.

    For most optimizers the scaler then does not call step at all; fused ones are called, and skip the step themselves.
    """
    found_inf = getattr(optimizer, "found_inf", None)
    return isinstance(found_inf, torch.Tensor) and bool(found_inf.item())
