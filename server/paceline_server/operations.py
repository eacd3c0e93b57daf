"""What operators do to a shard in operation. Every act is in the audit log, whether it was done or refused."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

from paceline_server.audit import AuditEntry, AuditLog, utc_now
from paceline_server.config import ServerConfig
from paceline_server.construction import rule_of, schedule_of
from paceline_server.engine import Engine
from paceline_server.journal import Configured
from paceline_server.live_configuration import (
    LiveConfiguration,
    Value,
    changed_by_operator,
    shaping,
    shown,
    value_of,
)
from paceline_server.rules.base import OuterRule
from paceline_server.rules.heloco import DirectionCorrection
from paceline_server.security.caller import Caller
from paceline_server.storage.snapshotter import Snapshotter, WrittenSnapshot
from paceline_wire.errors import InvalidInputError, PacelineError

_Outcome = TypeVar("_Outcome")

MOST_REASON_CHARACTERS = 500
"""Of the reason for an eviction, which the worker is told in an error."""

LONGEST_EVICTION_S = 10 * 365 * 24 * 3600.0
"""Ten years: what a status says of it must fit into its field."""

_MOST_SUBJECT_CHARACTERS = 128
"""Of what an act was about, in the audit log: what a worker's name may have. A longer one would hide other lines."""

_IN_MEMORY = "this shard has no data directory (storage.data_dir): its state is in memory and ends with the process"


@dataclass(frozen=True, kw_only=True)
class Drained:
    """What a drained shard leaves.

    Attributes:
        snapshot: The snapshot; None if there is none.
        problem: Why there is none, in a sentence; None if there is one.
    """

    snapshot: WrittenSnapshot | None
    problem: str | None


class Operations:
    """The acts of operators on one shard. Belongs to one event loop.

    Attributes:
        audit: What was done.

    Args:
        engine: The shard in operation.
        live: Its configuration.
        snapshotter: What writes its snapshots; None: its state is in memory.
        audit: What keeps the acts.
        keep_settings: Keeps changes of the configuration across restarts; None: nothing does.
        stop_serving: Takes nothing new from workers any more; returns when what they had sent is answered.
        end: Ends the process.
    """

    def __init__(
        self,
        engine: Engine,
        live: LiveConfiguration,
        snapshotter: Snapshotter | None,
        audit: AuditLog,
        *,
        keep_settings: Callable[[], None] | None,
        stop_serving: Callable[[], Awaitable[None]],
        end: Callable[[], None],
    ) -> None:
        self.audit = audit
        self._engine = engine
        self._live = live
        self._snapshotter = snapshotter
        self._keep_settings = keep_settings
        self._stop_serving = stop_serving
        self._end = end
        self._draining: asyncio.Task[Drained] | None = None
        self._begun: set[asyncio.Task[Any]] = set()

    @property
    def draining(self) -> bool:
        """Whether the shard was asked to end."""
        return self._draining is not None

    async def drain(self, caller: Caller, *, discard_state: bool) -> Drained:
        """Take no new pushes, answer those that are here, write a snapshot, and end the process.

        Raises:
            InvalidInputError: The state is in memory and would be lost, which was not allowed.
        """
        if self._snapshotter is None and not discard_state:
            sentence = f"{_IN_MEMORY}; export the parameters, and then drain with --discard"
            await self._refused(caller, "drain", InvalidInputError(sentence))
        if self._draining is None:
            self._draining = self._begin(self._drain(caller))
        return await asyncio.shield(self._draining)

    async def _drain(self, caller: Caller) -> Drained:
        try:
            await self._stop_serving()
            snapshot, problem = None, None if self._snapshotter is not None else _IN_MEMORY
            if self._snapshotter is not None:
                try:
                    snapshot = await self._snapshotter.write()
                except PacelineError as error:
                    problem = f"no snapshot could be written, and the next start replays the journal: {error}"
            await self._note(caller, "drain", new="" if snapshot is None else str(snapshot.path))
            return Drained(snapshot=snapshot, problem=problem)
        finally:
            self._end()

    async def evict(self, caller: Caller, worker: str, reason: str, duration_s: float | None) -> tuple[bool, bool]:
        """End a worker's membership and keep it out; whether it was a member, and whether it was evicted already.

        Raises:
            InvalidInputError: The name, the reason or the time is not allowed.
        """
        return await asyncio.shield(self._begin(self._evict(caller, worker, reason, duration_s)))

    async def _evict(self, caller: Caller, worker: str, reason: str, duration_s: float | None) -> tuple[bool, bool]:
        membership, now_s = self._engine.shard.membership, self._engine.clock()
        try:
            _require_terms(reason, duration_s)
            was_member, was_evicted = membership.evict(now_s, worker, reason, duration_s)
        except InvalidInputError as error:
            await self._refused(caller, "evict", error, worker)
        kept = await self._engine.membership_changed()
        self._engine.end_streams_of_others()
        time = "until admitted" if duration_s is None else f"for {duration_s:g} s"
        old = "evicted" if was_evicted else "member" if was_member else "not a member"
        new = f"evicted {time}" + (f": {reason}" if reason else "")
        await self._note(caller, "evict", worker, old=old, new=new, result=_done(kept=kept))
        return was_member, was_evicted

    async def admit(self, caller: Caller, worker: str) -> bool:
        """End a worker's eviction and quarantine; whether there was one.

        Raises:
            InvalidInputError: The name is not allowed, or the eviction of another keeps it out.
        """
        return await asyncio.shield(self._begin(self._admit(caller, worker)))

    async def _admit(self, caller: Caller, worker: str) -> bool:
        try:
            was_kept_out = self._engine.shard.membership.admit(self._engine.clock(), worker)
        except InvalidInputError as error:
            await self._refused(caller, "admit", error, worker)
        kept = await self._engine.membership_changed() if was_kept_out else True
        old = "kept out" if was_kept_out else "not kept out"
        await self._note(caller, "admit", worker, old=old, new="admitted", result=_done(kept=kept))
        return was_kept_out

    async def snapshot(self, caller: Caller) -> WrittenSnapshot:
        """Write a snapshot now.

        Raises:
            InvalidInputError: There is no data directory.
            NotInitializedError: The run has no parameters yet.
            StorageError: It cannot be written.
        """
        if self._snapshotter is None:
            await self._refused(caller, "snapshot", InvalidInputError(_IN_MEMORY))
        try:
            written = await asyncio.shield(self._begin(self._snapshotter.write()))
        except PacelineError as error:
            await self._refused(caller, "snapshot", error)
        await self._note(caller, "snapshot", new=str(written.path))
        return written

    async def configure(self, caller: Caller, values: Mapping[str, Value]) -> tuple[ServerConfig, ServerConfig, bool]:
        """Change the configuration; what it was, what it is, and whether it is kept across a restart.

        Raises:
            InvalidInputError: A value is not allowed or cannot change now; nothing has changed.
            StorageFullError: The disk has no room to note it; nothing has changed.
        """
        return await asyncio.shield(self._begin(self._configure(caller, values)))

    async def _configure(self, caller: Caller, values: Mapping[str, Value]) -> tuple[ServerConfig, ServerConfig, bool]:
        async with self._live.changing:
            before = self._live.config
            try:
                local_momentum = rule_of(before)[0].local_momentum
                after = changed_by_operator(before, values, local_momentum=local_momentum)
                if after != before:
                    # Before it is in the journal, which could not be replayed with a rule that cannot be made.
                    rule = rule_of(after)
                    await self._engine.change(Configured(config=shaping(after)), lambda: self._take(after, *rule))
            except PacelineError as error:
                for key, value in values.items():
                    await self._note_change(caller, before, key, value, f"refused: {error}")
                raise
            is_kept = await self._kept()
        for key, value in values.items():
            await self._note_change(caller, before, key, value, "done" if is_kept else "done, until the next restart")
        return before, after, is_kept

    def _begin(self, act: Coroutine[Any, Any, _Outcome]) -> "asyncio.Task[_Outcome]":
        """Begin an act that goes on to its end, should its caller hang up."""
        task = asyncio.create_task(act)
        self._begun.add(task)
        task.add_done_callback(self._begun.discard)
        return task

    def _take(self, config: ServerConfig, rule: OuterRule, correction: DirectionCorrection | None) -> None:
        shard = self._engine.shard
        shard.take_rule(rule, correction)
        shard.schedule = schedule_of(config)
        shard.membership.take_inner_steps(config.exchange.inner_steps)
        self._engine.take_config(config)
        self._live.take(config)

    async def _kept(self) -> bool:
        if self._keep_settings is None:
            return False
        try:
            await asyncio.to_thread(self._keep_settings)
        except PacelineError:
            return False
        return True

    async def _note_change(self, caller: Caller, before: ServerConfig, key: str, value: Value, result: str) -> None:
        await self._note(caller, "configure", key, old=shown(value_of(before, key)), new=shown(value), result=result)

    async def _refused(self, caller: Caller, act: str, error: PacelineError, subject: str = "") -> NoReturn:
        """Note a refusal, and raise it."""
        await self._note(caller, act, subject, result=f"refused: {error}")
        raise error

    async def _note(
        self, caller: Caller, act: str, subject: str = "", *, old: str = "", new: str = "", result: str = "done"
    ) -> None:
        await self.audit.add(
            AuditEntry(
                time=utc_now(),
                shard=self._engine.shard.index,
                who=caller.name,
                peer=caller.peer,
                act=act,
                subject=subject[:_MOST_SUBJECT_CHARACTERS],
                old=old,
                new=new,
                result=result,
            )
        )


def _require_terms(reason: str, duration_s: float | None) -> None:
    """Refuse what is no reason or no time of an eviction."""
    if len(reason) > MOST_REASON_CHARACTERS or not (reason.isprintable() or not reason):
        raise InvalidInputError(
            f"the reason should be one line of at most {MOST_REASON_CHARACTERS} printable characters"
        )
    if duration_s is not None and not 0 < duration_s <= LONGEST_EVICTION_S:
        raise InvalidInputError(
            "the time of an eviction should be above 0, and ten years at most; leave it out for one without end"
        )


def _done(*, kept: bool) -> str:
    """What the audit log says of an act that changed the membership."""
    return "done" if kept else "done, and kept across a restart once the disk has room"
