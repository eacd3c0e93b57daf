"""The address book of a run, an actor: where its shards are now, for everybody who waits for a change.

It keeps nothing on a disk. If its node dies it begins empty, and the shards, which follow it, tell it again.
"""

import asyncio
import json
import time
from contextlib import suppress

import ray

from paceline.ray.status import RunSpec


class AddressBook:
    """Where the shards of a run are; a Ray actor on an event loop.

    Args:
        spec: The run.
    """

    def __init__(self, spec: RunSpec) -> None:
        self._spec = spec
        self._addresses = [""] * spec.num_shards
        # Never one that the book had in an earlier life, so that followers notice that it begins anew.
        self._version = time.time_ns()
        self._changed = asyncio.Condition()
        if not ray.get_runtime_context().was_current_actor_reconstructed:
            spec.data_dir.mkdir(parents=True, exist_ok=True)
            spec.mark.write_text(json.dumps({"name": spec.name, "shards": spec.num_shards}), encoding="utf-8")

    async def spec(self) -> RunSpec:
        """The run, for those who find it by its name."""
        return self._spec

    async def report(self, shard: int, address: str) -> None:
        """A shard says where it is."""
        async with self._changed:
            if self._addresses[shard] != address:
                self._addresses[shard] = address
                self._version += 1
                self._changed.notify_all()

    async def changed(self, version: int, patience_s: float) -> tuple[int, list[str]]:
        """Wait until the book differs from a version of it, so many seconds at most.

        Returns:
            Its version, and the address of every shard; empty for those that have not reported.
        """
        async with self._changed:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait_for(lambda: self._version != version), patience_s)
            return self._version, list(self._addresses)
