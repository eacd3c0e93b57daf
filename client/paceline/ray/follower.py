"""What a process knows of where the shards are: a thread that follows the run's address book."""

import logging
import threading
from collections.abc import Callable
from typing import Any

import ray
import ray.exceptions

from paceline.ray.status import NAMESPACE, RunSpec
from paceline_wire.errors import UnavailableError

_log = logging.getLogger(__name__)

PATIENCE_S = 20.0
"""Seconds that a question may wait in the book for a change."""

RETRY_S = 0.5
"""Seconds before the next question when the book's actor does not answer, since it is started again."""


class BookFollower:
    """A copy of the run's address book, kept up to date by a thread until `close`.

    Args:
        spec: The run.
        changed: Called on that thread with what the book says, whenever it has changed or has begun anew: empty for
            shards that it does not know, or no longer. None: nobody.
    """

    def __init__(self, spec: RunSpec, changed: Callable[[list[str]], None] | None = None) -> None:
        self._spec = spec
        self._changed = changed
        self._known = [""] * spec.num_shards
        self._is_complete = threading.Event()
        self._closed = threading.Event()
        threading.Thread(target=self._follow, name="paceline-address-book", daemon=True).start()

    def addresses(self) -> list[str]:
        """The newest known "host:port" of every shard, in order; empty as long as one has never been known.

        Answers at once: a `paceline.whereabouts.Locate`.
        """
        return list(self._known) if self._is_complete.is_set() else []

    def wait(self, timeout_s: float | None = None) -> list[str]:
        """Wait until every shard has an address, and return them.

        Raises:
            UnavailableError: Not all have reported in that time.
        """
        if not self._is_complete.wait(timeout_s):
            missing = [str(shard) for shard, address in enumerate(self._known) if not address]
            raise UnavailableError(
                f"run {self._spec.name!r}: shard {', '.join(missing)} has not started within {timeout_s} s; "
                "does the cluster have room for it (ray status)?"
            )
        return list(self._known)

    def report(self, shard: int, address: str) -> None:
        """Write into the book; what is lost on the way is written again after the next answer of the book."""
        try:
            ray.get(self._book().report.remote(shard, address), timeout=PATIENCE_S)
        except (ray.exceptions.RayError, ValueError) as error:
            _log.info("the address book does not answer: %s", error)

    def close(self) -> None:
        """Let the thread end after its question."""
        self._closed.set()

    def _book(self) -> Any:
        return ray.get_actor(self._spec.actor_name("book"), namespace=NAMESPACE)

    def _follow(self) -> None:
        version = 0
        # Asked when this process has left the cluster, Ray would join it again by itself.
        while not self._closed.is_set() and ray.is_initialized():
            try:
                answer = self._book().changed.remote(version, PATIENCE_S)
                newest, addresses = ray.get(answer, timeout=2 * PATIENCE_S)
            except (ray.exceptions.RayError, ValueError) as error:  # ValueError: no actor has that name
                _log.info("the address book does not answer: %s", error)
                version = 0
                self._closed.wait(RETRY_S)
                continue
            if newest != version:
                version = newest
                self._known = [now or before for now, before in zip(addresses, self._known, strict=True)]
                if all(self._known):
                    self._is_complete.set()
                if self._changed is not None:
                    self._changed(addresses)
