"""A run on a Ray cluster, as whoever launched or attached to it sees it: its status, its end, and where it is."""

import time
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import ray
import ray.exceptions

from paceline.ray.follower import BookFollower
from paceline.ray.shard import STOP_S
from paceline.ray.status import NAMESPACE, ActorStatus, RunSpec
from paceline_wire.errors import PacelineError, UnavailableError

ANSWER_S = 5.0
"""Seconds after which an actor that says nothing counts as unreachable for now."""

LOOK_EVERY_S = 0.5
"""Seconds between two looks at whether the workers are done."""


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """What all actors of a run say of themselves.

    Attributes:
        shards: Of every shard, by index.
        workers: Of every worker, by index.
    """

    shards: list[ActorStatus]
    workers: list[ActorStatus]


class RayRun:
    """A run on a Ray cluster; made by `launch` and `attach`.

    A context manager that stops the run. Left alone, the run goes on when this process ends: its actors are detached.

    Args:
        spec: The run.
    """

    def __init__(self, spec: RunSpec) -> None:
        self._spec = spec
        self._book = BookFollower(spec)

    @property
    def name(self) -> str:
        """Its name on the cluster."""
        return self._spec.name

    @property
    def address(self) -> str:
        """Where the shard of index 0 is now, "host:port": for `paceline status` and `paceline export`.

        Raises:
            UnavailableError: The shards have not all started.
        """
        return self._book.wait(ANSWER_S)[0]

    def locate(self) -> list[str]:
        """Where all shards are now, in order: give it to `paceline.connect` and `paceline.join` as locate."""
        return self._book.addresses()

    def status(self) -> RunStatus:
        """What every actor says of itself."""
        return RunStatus(shards=self.status_of_shards(), workers=self._statuses("worker", self._spec.num_workers))

    def status_of_shards(self) -> list[ActorStatus]:
        """What every shard's actor says of itself."""
        return self._statuses("shard", self._spec.num_shards)

    def wait(self, timeout_s: float | None = None) -> list[Any]:
        """Wait until every worker is done, whatever dies meanwhile, and return what they returned, by index.

        Args:
            timeout_s: Seconds; None: for ever.

        Raises:
            PacelineError: A worker's training function failed; the text has its traceback. The others go on.
            TimeoutError: They are not done in that time.
        """
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        results: dict[int, Any] = {}
        while len(results) < self._spec.num_workers:
            for status in self._statuses("worker", self._spec.num_workers):
                if status.state == "failed":
                    raise PacelineError(f"worker {status.index} of run {self.name!r} failed: {status.error}")
                if status.state == "done" and status.index not in results:
                    self._collect(status.index, results)
            if deadline_s is not None and time.monotonic() > deadline_s:
                missing = [index for index in range(self._spec.num_workers) if index not in results]
                raise TimeoutError(f"run {self.name!r}: workers {missing} are not done within {timeout_s} s")
            time.sleep(LOOK_EVERY_S)
        return [results[index] for index in range(self._spec.num_workers)]

    def stop(self) -> None:
        """End all actors: workers at once, shards once they have finished what they have begun. Data stay.

        Stopping twice is not an error.
        """
        self._book.close()
        for index in range(self._spec.num_workers):
            _kill(self._spec.actor_name("worker", index))
        shards = [self._spec.actor_name("shard", index) for index in range(self._spec.num_shards)]
        stopping = [actor.stop.remote() for name in shards if (actor := _found(name)) is not None]
        if stopping:
            ray.wait(stopping, num_returns=len(stopping), timeout=2 * STOP_S)
        for name in (*shards, self._spec.actor_name("book")):
            _kill(name)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _collect(self, index: int, results: dict[int, Any]) -> None:
        """Fetch a result; a worker that dies at this very moment trains its end once more."""
        actor = _found(self._spec.actor_name("worker", index))
        if actor is not None:
            with suppress(ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
                results[index] = ray.get(actor.result.remote(), timeout=ANSWER_S)

    def _statuses(self, kind: str, count: int) -> list[ActorStatus]:
        actors = [_found(self._spec.actor_name(kind, index)) for index in range(count)]
        if all(actor is None for actor in actors) and actors:
            raise UnavailableError(f"run {self.name!r} is no longer on the cluster: it was stopped")
        asked = {index: actor.status.remote() for index, actor in enumerate(actors) if actor is not None}
        if asked:
            ray.wait(list(asked.values()), num_returns=len(asked), timeout=ANSWER_S)
        return [_answer(index, asked.get(index)) for index in range(count)]


def _answer(index: int, asked: Any) -> ActorStatus:
    if asked is None:
        return ActorStatus(index=index, state="unreachable", error="the cluster has no such actor")
    try:
        status: ActorStatus = ray.get(asked, timeout=0)
    except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
        return ActorStatus(index=index, state="unreachable", error=f"{type(error).__name__}: {error}")
    return status


def _found(name: str) -> Any:
    """The actor of a name; None if there is none."""
    try:
        return ray.get_actor(name, namespace=NAMESPACE)
    except ValueError:
        return None


def _kill(name: str) -> None:
    actor = _found(name)
    if actor is not None:
        ray.kill(actor, no_restart=True)
