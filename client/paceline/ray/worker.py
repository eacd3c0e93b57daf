"""A worker of a run as a Ray actor: calls the training function, again after each start, until it returns."""

import logging
import os
import threading
import traceback
from typing import Any

import ray
import ray.cloudpickle

from paceline.ray.follower import BookFollower
from paceline.ray.status import ActorStatus, RunSpec
from paceline.ray.training import Train, WorkerContext
from paceline_wire.errors import PacelineError

_log = logging.getLogger(__name__)

RETRY_S = 2.0
"""Seconds before training begins again after the run could not be reached."""


class WorkerActor:
    """One worker; a Ray actor.

    The training function has a thread of its own, so that the actor answers meanwhile. It is called as soon as the
    actor starts, and not by a task of whoever launched the run: so the cluster alone can start it again.

    Args:
        spec: The run.
        index: Which of its workers this is.
        train: The training function, as Ray's cloudpickle writes it.
    """

    def __init__(self, spec: RunSpec, index: int, train: bytes) -> None:
        self._spec = spec
        self._index = index
        self._state = "waiting"
        self._error = ""
        self._result: Any = None
        self._book = BookFollower(spec)
        threading.Thread(target=self._train, args=(train,), name="paceline-training", daemon=True).start()

    def status(self) -> ActorStatus:
        """What this actor is doing."""
        node = ray.get_runtime_context().get_node_id()
        return ActorStatus(index=self._index, state=self._state, node=node, pid=os.getpid(), error=self._error)

    def result(self) -> Any:
        """What the training function has returned; None before."""
        return self._result

    def _train(self, pickled: bytes) -> None:
        try:
            train: Train = ray.cloudpickle.loads(pickled)
            while not self._trained(train):
                threading.Event().wait(RETRY_S)
        except Exception as error:  # noqa: BLE001  # a user's function: whoever waits for the run is told
            self._error = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
            self._state = "failed"

    def _trained(self, train: Train) -> bool:
        """Whether the training function has returned; not if the run could not be reached, which may pass."""
        self._book.wait()
        context = WorkerContext(self._spec, self._index, self._book.addresses)
        self._state = "training"
        try:
            self._result = train(context)
        except PacelineError as error:
            if not error.retryable:
                raise
            _log.warning("worker %d begins again: %s", self._index, error)
            self._state, self._error = "waiting", f"{type(error).__name__}: {error}"
            return False
        self._state = "done"
        return True
