"""Carries out a shard's decisions: one event at a time per fragment, numbers in threads beside the event loop.

The way of a push: its payload is checked, the shard decides, the journal keeps the decision, a thread changes the
numbers and encodes the answers, and then whoever waits is answered. Fragments are independent, so while one is
received another is applied and another is sent. An event that has begun is never cancelled: a worker that hangs up
halfway leaves nothing half done.
"""

import asyncio
import logging
import os
import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace
from typing import Any, TypeVar

import torch

from paceline_server.buffers import MIB, Buffers
from paceline_server.config import DEFAULT_BUFFER_MIB, DEFAULT_REFERENCE_MIB, ServerConfig
from paceline_server.evidence import EvidenceKeeper, NoEvidence
from paceline_server.guard import checked_norm, median_of
from paceline_server.held import Form, HeldMemory, Holdings
from paceline_server.hosted import FragmentCopy, HostedFragment
from paceline_server.journal import (
    Configured,
    Decided,
    FragmentInitialized,
    Initialized,
    Journal,
    MembershipChanged,
    Record,
)
from paceline_server.ledger import Answer, Decision, Ledger, Outcome, answer_with_newest
from paceline_server.newest import NewestValues, Wanted
from paceline_server.received import ReceivedPush, evidence_of, follow_and_encode
from paceline_server.shard import Shard
from paceline_server.stability_watch import StabilityWatch
from paceline_server.streams import OpenStreams
from paceline_server.takeover import Progress, take_over
from paceline_server.updates import Encoded, Recipient, Written, rooms_for, share_of, write
from paceline_wire import codecs
from paceline_wire.codecs.base import Codec
from paceline_wire.errors import (
    CodecError,
    NotInitializedError,
    PacelineError,
    StorageError,
    StorageFullError,
    UnavailableError,
)
from paceline_wire.manifest import Manifest
from paceline_wire.memory import give_back_free_memory
from paceline_wire.v1 import parameter_server_pb2 as pb

_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")
Clock = Callable[[], float]


class Engine:
    """A shard in operation. Belongs to one event loop, and is made in it.

    Attributes:
        shard: Its state.
        clock: Seconds that only grow.
        holdings: What workers hold, where their updates are differences to it.
        warning: What the operator should know of the settings; None if they suit the workers.
        failed: Why the shard must end, once it must.
        replay_s: Processor seconds that replaying what was decided since the newest snapshot would take.
        membership_record: The newest record of the journal that has the membership.

    Args:
        shard: Its state.
        journal: Where decisions are kept before anybody is told.
        clock: Seconds that only grow.
        send_momentum: Whether updates of parameters carry the outer momentum behind the values.
        watch: What looks whether the settings suit the workers; None: nothing.
        buffers: What payloads under way may take; None: the default of exchange.buffer_mib.
        holdings: Keeps what workers hold; None: as much as is the default of exchange.reference_mib.
        evidence: Where pushes go that were refused for what they contained; None: nowhere.
    """

    def __init__(
        self,
        shard: Shard,
        journal: Journal,
        clock: Clock = time.monotonic,
        *,
        send_momentum: bool = False,
        watch: StabilityWatch | None = None,
        buffers: Buffers | None = None,
        holdings: Holdings | None = None,
        evidence: EvidenceKeeper | None = None,
    ) -> None:
        self.shard = shard
        self.buffers = buffers or Buffers(DEFAULT_BUFFER_MIB * MIB)
        self.holdings = holdings or Holdings(DEFAULT_REFERENCE_MIB * MIB)
        self.streams = OpenStreams()
        self._newest = NewestValues(self.buffers.outgoing, self._encode_newest)
        self.clock = clock
        self.warning: str | None = None
        self.failed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.replay_s = 0.0
        self.membership_record = 0
        self._send_momentum = send_momentum
        self._watch = watch
        self._evidence = evidence or NoEvidence()
        self._journal = journal
        self._threads = ThreadPoolExecutor(max_workers=os.cpu_count() or 1, thread_name_prefix="paceline-numbers")
        self._held_memory = HeldMemory(secrets.randbits(63))
        self._locks = {index: asyncio.Lock() for index in shard.fragments}
        self._initializing = asyncio.Lock()
        self._recipients: dict[tuple[str, int, int], Recipient] = {}
        self._events: set[asyncio.Task[Any]] = set()
        self._roster_changed = asyncio.Event()
        self._membership_is_kept = True

    @property
    def initializing(self) -> asyncio.Lock:
        """Held during an upload of first parameters, so that uploads do not mix."""
        return self._initializing

    async def read_manifest(self, message: pb.Manifest) -> Manifest:
        """Read a manifest and plan its fragments, beside the event loop: it may have a million tensors.

        Raises:
            InvalidInputError: It breaks a rule of manifests.
        """

        def read() -> Manifest:
            manifest = Manifest.from_wire(message)
            _ = manifest.fragments  # kept with the manifest, for whoever asks for them on the loop
            return manifest

        return await self._in_thread(read)

    async def begin_initialization(
        self, manifest: Manifest, initialization_id: int, replaces: int | None = None
    ) -> bool:
        """Take the manifest of a first upload; False if the parameters are here already, and stay.

        Args:
            manifest: The manifest.
            initialization_id: The upload.
            replaces: The upload whose parameters this one may replace; None: none.

        Raises:
            ManifestMismatchError: The run has another manifest.
        """
        # Nobody may push to parameters that are about to be replaced.
        async with self._at_rest():
            if not self.shard.begin_initialization(manifest, initialization_id, replaces):
                return False
            self._locks = {index: asyncio.Lock() for index in self.shard.fragments}
            await self._append(
                Initialized(
                    manifest=manifest,
                    initialization_id=initialization_id,
                    shard=self.shard.index,
                    num_shards=self.shard.num_shards,
                )
            )
        return True

    async def change(self, record: Configured, apply: Callable[[], None]) -> None:
        """Keep another configuration and go on by it; no push is being decided or applied meanwhile.

        Raises:
            StorageFullError: There is no room to keep it; nothing has changed.
            UnavailableError: The journal failed, and the shard ends.
        """
        async with self._at_rest():
            await self._append(record)
            apply()
        self.roster_changed()

    def take_config(self, config: ServerConfig) -> None:
        """Judge by another configuration whether the settings suit the workers."""
        if self._watch is not None:
            self._watch.take(config)

    @asynccontextmanager
    async def _at_rest(self) -> AsyncIterator[None]:
        """Hold every fragment, so that all records before are followed and none comes meanwhile."""
        while True:
            locks = self._locks
            async with AsyncExitStack() as held:
                for lock in locks.values():
                    await held.enter_async_context(lock)
                if self._locks is locks:
                    yield
                    return

    async def initialize_fragment(self, index: int, codec: Codec, payload: torch.Tensor) -> None:
        """Take a fragment's first parameters.

        Raises:
            CodecError: They are not finite.
            InvalidInputError: The fragment does not live here, or has its parameters.
        """
        num_elements = self.shard.plan_of(index).num_elements
        self.shard.refuse_second_values(index)
        values = await self._in_thread(lambda: codecs.decode(codec, payload, num_elements))
        record = await self._append(FragmentInitialized(fragment=index, payload=payload))
        self.shard.initialize_fragment(index, values)
        self.shard.fragments[index].record = record
        if self.shard.initialized:
            # The upload's payloads are four times as large as any that come now: their memory is not needed again.
            await self._in_thread(give_back_free_memory)

    def refuse_when_full(self) -> None:
        """Say so before anything is received that could not be kept.

        Raises:
            StorageFullError: The disk was full, and still is.
        """
        self._journal.refuse_when_full()

    def submit(self, push: ReceivedPush, recipient: Recipient) -> "asyncio.Task[None]":
        """Begin to process a push; its answer goes to the recipient when its schedule says so.

        The task ends when the push is decided and applied, and its room is given back. It must not be cancelled.

        Raises:
            NotInitializedError: The shard's parameters are not complete.
        """
        fragment, _ = self.shard.hosted(push.fragment)
        self._recipients[push.request.worker, push.request.incarnation, push.fragment] = recipient
        return self._event(self._push(push, fragment))

    async def take_over(self, worker: str, previous: int, incarnation: int) -> list[Progress]:
        """Let a worker's new incarnation go on with the pushes of a previous one; how far each fragment got with them.

        Pushes of the previous one that are being processed are counted, and none enters afterwards.

        Raises:
            NotInitializedError: The shard's parameters are not complete.
            InvalidInputError: previous is not an earlier incarnation.
            SupersededError: A newer incarnation has come.
            StorageFullError: There is no room to keep that; ask again.
        """
        self.shard.refuse_uninitialized()
        events = [self._event(self._take_over(index, worker, previous, incarnation)) for index in self.shard.fragments]
        return list(await asyncio.shield(asyncio.gather(*events)))

    async def _take_over(self, index: int, worker: str, previous: int, incarnation: int) -> Progress:
        async with self._held(index) as is_there:
            if not is_there:
                raise NotInitializedError("the run was initialized anew, and knows nothing of what it replaced")
            fragment = self.shard.fragments[index]
            progress, ledger = take_over(fragment.ledger, index, worker, previous, incarnation)
            if ledger is not fragment.ledger:
                reason = f"incarnation {incarnation} of worker {worker} goes on from {previous}"
                decision = Decision(outcome=Outcome.TAKEN_OVER, reason=reason)
                record = Decided(fragment=index, time_s=self.clock(), push=None, decision=decision, ledger=ledger)
                number = await self._append(record)
                self.shard.keep(index, decision, ledger, None)
                fragment.record = number
            return progress

    async def snapshot(self, index: int, codec: Codec) -> tuple[int, Encoded]:
        """A fragment's current values, and the bin that gradients computed from them belong to; waits for room.

        Raises:
            NotInitializedError: The shard's parameters are not complete.
            InvalidInputError: The fragment does not live here.
        """
        ledger, encoded = await self._newest.get(self._wanted(index, Form(codec=codec), with_momentum=False))
        return ledger.issuing_bin, encoded

    async def newest(self, index: int, answer: Answer, form: Form) -> tuple[Answer, Encoded]:
        """What an answer is now that was decided when the buffer had no room for its values; waits for room.

        Raises:
            InvalidInputError: The fragment does not live here.
        """
        with_momentum = self._with_momentum(self.shard.hosted(index)[0])
        ledger, encoded = await self._newest.get(self._wanted(index, form, with_momentum=with_momentum))
        return answer_with_newest(self.shard.schedule, ledger, answer), encoded

    def _wanted(self, index: int, form: Form, *, with_momentum: bool) -> Wanted:
        num_elements = self.shard.hosted(index)[1].num_elements * (2 if with_momentum else 1)
        return Wanted(fragment=index, form=form, num_elements=num_elements, with_momentum=with_momentum)

    async def _encode_newest(self, wanted: Wanted, begun: Callable[[], None]) -> tuple[Ledger, Written]:
        fragment, values = self.shard.hosted(wanted.fragment)
        async with self._locks[wanted.fragment]:
            begun()
            written = await self._in_thread(
                lambda: write(values, wanted.form, self._held_memory, with_momentum=wanted.with_momentum)
            )
            return fragment.ledger, written

    def forget(self, recipient: Recipient) -> None:
        """Send nothing more to a recipient whose stream has ended."""
        for key in [key for key, value in self._recipients.items() if value is recipient]:
            del self._recipients[key]

    async def copied(self, index: int) -> FragmentCopy:
        """A copy of a fragment as it is now, for a snapshot; the fragment goes on as soon as it is made.

        Raises:
            NotInitializedError: The run was begun anew, and the fragment has no values, or is gone.
        """
        async with self._held(index) as is_there:
            if not is_there or self.shard.fragments[index].values is None:
                raise NotInitializedError(f"the run was begun anew, and fragment {index} has no values yet")
            return await self._in_thread(self.shard.fragments[index].copied)

    @asynccontextmanager
    async def _held(self, index: int) -> AsyncIterator[bool]:
        """Hold a fragment's lock; whether the run still has the fragment, which may have been begun anew meanwhile."""
        lock = self._locks.get(index)
        if lock is None:
            yield False
            return
        async with lock:
            yield self._locks.get(index) is lock

    def roster_changed(self) -> None:
        """Look again which bins close: a worker joined, left, was given up or put in quarantine."""
        self._roster_changed.set()

    async def membership_changed(self) -> bool:
        """Keep the membership as it is now, and look again which bins close; whether it could be kept.

        A full disk does not keep anybody from joining or leaving: what it does not take is kept once there is room.
        """
        self.roster_changed()
        record = MembershipChanged(time_s=self.clock(), membership=self.shard.membership.state(self.clock()))
        try:
            number = await self._append(record)
        except StorageFullError as error:
            if self._membership_is_kept:
                _log.warning("a change of the membership is not in the journal yet: %s", error)
            self._membership_is_kept = False
            return False
        self._membership_is_kept = True
        self.membership_record = max(self.membership_record, number)
        return True

    async def keep_membership(self) -> None:
        """Try again to keep a change of the membership for which the disk had no room."""
        if not self._membership_is_kept:
            await self.membership_changed()

    async def wait_for_roster(self, longest_s: float) -> None:
        """Wait until a worker joins, leaves, is given up or put in quarantine; at most so many seconds."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._roster_changed.wait(), longest_s)
            self._roster_changed.clear()

    async def close_due_bins(self) -> None:
        """Close the bins that time or a change of the membership has made due.

        Raises:
            StorageFullError: There is no room to keep that one has closed; it is due still.
        """
        for index in list(self._locks):
            await asyncio.shield(self._event(self._close_if_due(index)))

    def forget_gone(self) -> None:
        """Forget workers that have been gone for long."""
        busy = {index for index, lock in self._locks.items() if lock.locked()}
        self.shard.forget_gone(self.clock(), busy)

    def end_streams_of_others(self) -> None:
        """End the streams of all who are no longer members, and drop what those hold that have none."""
        self.streams.keep_only(self._refusal)
        self.holdings.keep_only(
            lambda worker, incarnation: self._refusal(pb.Worker(worker_id=worker, incarnation=incarnation)) is None
        )

    async def finish(self) -> None:
        """Wait for the events that have begun, and end the journal and the threads."""
        while self._events:
            await asyncio.wait(self._events)
        await self._journal.close()
        self._threads.shutdown()

    def _refusal(self, worker: pb.Worker) -> PacelineError | None:
        """Why nothing is taken from a worker now; None if it is a member."""
        return self.shard.membership.refusal(self.clock(), worker.worker_id, worker.incarnation)

    async def _push(self, push: ReceivedPush, fragment: HostedFragment) -> None:
        try:
            await self._decide_and_apply(push, fragment)
        finally:
            push.room.release()

    async def _decide_and_apply(self, push: ReceivedPush, fragment: HostedFragment) -> None:
        async with self._locks[push.fragment]:
            if self.shard.fragments.get(push.fragment) is not fragment:
                raise NotInitializedError("the run was initialized anew, and this push belongs to what it replaced")
            self.shard.membership.refuse_kept_out(self.clock(), push.request.worker)
            push = await self._inspected(push)
            now_s, request = self.clock(), push.request
            recent_norms = fragment.norms
            decision, ledger = self.shard.decide_push(now_s, push.fragment, request)
            if decision.outcome is Outcome.REFUSED and request.problem is not None:
                _log.warning(
                    "refused push %d of worker %s to fragment %d: %s",
                    request.seq,
                    request.worker,
                    push.fragment,
                    request.problem,
                )
            await self._carry_out(push.fragment, now_s, decision, ledger, push)
            if self.shard.schedule.quorum is not None:
                self._roster_changed.set()
            quarantined = self.shard.note_conduct(self.clock(), request, push.norm, decision)
        if decision.outcome is Outcome.REFUSED and request.problem is not None:
            await self._evidence.keep(evidence_of(push, request.problem, median_of(recent_norms)))
        if quarantined is not None:
            _log.warning("%s", quarantined)
            await self.membership_changed()
            self.shard.membership.refuse_kept_out(self.clock(), request.worker)
        if decision.contribution is not None:
            await self._look_at_stability(decision.contribution.bins_late)

    async def _look_at_stability(self, bins_late: int) -> None:
        """Warn once when the settings no longer suit the workers, and say so when they do again."""
        if self._watch is None:
            return
        watch, seen = self._watch, self._watch.observe(bins_late, len(self.shard.membership.active))
        if seen is None:
            return
        before, self.warning = self.warning, await self._in_thread(lambda: watch.warning(seen))
        if self.warning is not None and before is None:
            _log.warning("%s", self.warning)
        elif self.warning is None and before is not None:
            _log.info("the outer settings suit %d workers again", seen.workers)

    async def _inspected(self, push: ReceivedPush) -> ReceivedPush:
        """The push with its norm, and with the reason why its content cannot be applied, if there is one."""
        num_elements = self.shard.push_elements(push.fragment)
        norm: float | None = None
        try:
            norm = await self._in_thread(lambda: checked_norm(push.codec, push.payload, num_elements))
        except CodecError as error:
            problem: str | None = f"the outer gradient of fragment {push.fragment} cannot be applied: {error}"
        else:
            problem = self.shard.outlier_problem(push.fragment, norm)
        return replace(push, norm=norm, request=replace(push.request, problem=problem))

    async def _close_if_due(self, index: int) -> None:
        async with self._held(index) as is_there:
            now_s = self.clock()
            decided = self.shard.decide_close(now_s, index) if is_there else None
            if decided is not None:
                _log.debug("fragment %d: %s", index, decided[0].reason)
                await self._carry_out(index, now_s, *decided, None)

    async def _carry_out(
        self, index: int, now_s: float, decision: Decision, ledger: Ledger, push: ReceivedPush | None
    ) -> None:
        """Change the numbers, keep the decision, tell those who are to be answered. The fragment's lock is held."""
        fragment, values = self.shard.hosted(index)
        with_momentum = self._with_momentum(fragment)
        contributing = push if decision.contribution is not None else None
        record = Decided(
            fragment=index,
            time_s=now_s,
            push=push.request if push is not None else None,
            decision=decision,
            ledger=ledger,
            codec=contributing.codec.name if contributing is not None else None,
            payload=contributing.payload if contributing is not None else None,
            norm=push.norm if push is not None else None,
        )
        number = fragment.record if decision.outcome is Outcome.DUPLICATE else await self._append(record)
        num_elements = values.num_elements * (2 if with_momentum else 1)
        recipients = self._recipients_of(index, decision)
        present = [(recipient, form) for _, recipient, form in recipients]
        rooms = rooms_for(self.buffers.outgoing, present, num_elements)
        try:
            followed_s, written = await self._in_thread(
                lambda: follow_and_encode(
                    values, decision, contributing, set(rooms), self._held_memory, with_momentum=with_momentum
                )
            )
            self.replay_s += followed_s
            self.shard.keep(index, decision, ledger, push.request.worker if push is not None else None, record.norm)
            fragment.record = number
            for answer, recipient, form in recipients:
                recipient.deliver(index, answer, share_of(written, rooms, form))
        except Exception as error:
            self._fail(f"fragment {index} could not follow record {number}: {error!r}")
            raise
        finally:
            for room in rooms.values():
                room.release()

    def _recipients_of(self, index: int, decision: Decision) -> list[tuple[Answer, Recipient, Form]]:
        """Who is to be answered, and how each answer is to be written."""
        streams = [self._recipients.get((answer.worker, answer.incarnation, index)) for answer in decision.answers]
        return [
            (answer, stream, stream.form(index))
            for answer, stream in zip(decision.answers, streams, strict=True)
            if stream is not None
        ]

    def _with_momentum(self, fragment: HostedFragment) -> bool:
        return self._send_momentum and fragment.plan.role == "parameter"

    async def _append(self, record: Record) -> int:
        """Keep a record; returns its number.

        Raises:
            StorageFullError: There is no room for it; nothing was kept.
            UnavailableError: The journal failed, and the shard ends.
        """
        try:
            return await self._journal.append(record)
        except StorageFullError:
            raise
        except StorageError as error:
            self._fail(str(error))
            raise UnavailableError(f"the shard ends, since its journal failed: {error}") from error

    def _fail(self, reason: str) -> None:
        """End the shard: what is in memory is no longer what the journal says, and only a restart mends that."""
        if not self.failed.done():
            _log.critical("the shard ends: %s", reason)
            self.failed.set_result(reason)

    def _event(self, work: Coroutine[Any, Any, _Result]) -> "asyncio.Task[_Result]":
        task = asyncio.create_task(work)
        self._events.add(task)
        task.add_done_callback(self._events.discard)
        return task

    async def _in_thread(self, work: Callable[[], _Result]) -> _Result:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)
