"""A joined worker's exchange: moves the rounds on the exchange thread, beside the training thread.

The way of a round: the training thread hands over where each fragment started and ended; a codec thread subtracts,
encodes, and proposes a new start that includes the own push; the connection sends until the server answers; a codec
thread takes the answer in and proposes the start that follows from it. Fragments go through this one after the other,
overlapping.
"""

import asyncio
import logging
from collections.abc import Collection, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeVar

import torch

from paceline.channels import Access
from paceline.codec_threads import in_codec_thread
from paceline.connection import OutgoingPush, ReceivedUpdate
from paceline.eager import Estimate, LocalContinuation, NoEstimate, OwnOuterStep, WorkerFragment
from paceline.fragments import manifest_of
from paceline.loop import exchange_loop
from paceline.model_state import FragmentState, Snapshot
from paceline.rebase import RoundStart
from paceline.session import Session, new_worker, open_session
from paceline_wire import codecs
from paceline_wire.errors import InvalidInputError
from paceline_wire.manifest import Fragment
from paceline_wire.transfer import outgoing
from paceline_wire.v1 import parameter_server_pb2 as pb

_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")


class Overlap(Enum):
    """What a worker does while its push is under way."""

    EAGER = "eager"
    """Go on from the newest base plus the own estimate of what is in flight."""
    DELAYED = "delayed"
    """Go on from the newest base; the own push shows when its answer comes."""
    BLOCKING = "blocking"
    """Wait for the answer."""


@dataclass(kw_only=True)
class Traffic:
    """What the exchange thread has counted; read by the training thread for stats.

    Attributes:
        rounds: Rounds whose pushes are all answered.
        pushes: Pushes answered, over all fragments.
        pushes_refused: Those that the server refused.
        bins_late: Sum of the bins that pushes were late.
        bytes_up: Payload bytes of pushes.
        bytes_down: Payload bytes of updates.
    """

    rounds: int = 0
    pushes: int = 0
    pushes_refused: int = 0
    bins_late: int = 0
    bytes_up: int = 0
    bytes_down: int = 0


@dataclass(frozen=True, kw_only=True)
class ExchangeSettings:
    """What one worker asked for; None leaves it to the server.

    Attributes:
        worker_id: The worker's name.
        access: TLS and token.
        overlap: What to do while a push is under way.
        uplink: Name of the codec of pushes.
        downlink: Name of the codec of updates.
    """

    worker_id: str
    access: Access
    overlap: Overlap
    uplink: str | None
    downlink: str | None


class Exchanger:
    """A joined worker's exchange; made by the training thread, running on other threads until `close`.

    Args:
        address: "host:port" of any shard.
        settings: What the worker asked for.
        tensors: The live model's exchanged tensors by name, detached; set to the run's parameters.
        averaged: Names of those that are averaged without momentum.

    Raises:
        PacelineError: The run cannot be reached, or refuses this worker or its model.
    """

    def __init__(
        self,
        address: str,
        settings: ExchangeSettings,
        tensors: Mapping[str, torch.Tensor],
        averaged: Collection[str],
    ) -> None:
        self.traffic = Traffic()
        self._settings = settings
        self._loop = exchange_loop()
        self._session: Session | None = None
        try:
            session = self._wait_for(open_session(address, settings.access))
            self._session = session
            exchange = session.configuration.exchange
            self._uplink = codecs.codec(settings.uplink) if settings.uplink else codecs.codec_of_wire(exchange.uplink)
            self._downlink = (
                codecs.codec(settings.downlink) if settings.downlink else codecs.codec_of_wire(exchange.downlink)
            )
            self._enter(session, tensors, averaged)
        except BaseException:
            self.close()
            raise

    def _enter(self, session: Session, tensors: Mapping[str, torch.Tensor], averaged: Collection[str]) -> None:
        """Bring model and run together, and become a member."""
        manifest = manifest_of(tensors, averaged, session.fragment_elements)
        self._wait_for(session.initialize(manifest, tensors))
        self._wait_for(session.join(new_worker(self._settings.worker_id)))
        first = session.connections[0]
        self.worker_index = first.worker_index
        self.inner_steps = first.inner_steps
        self._num_workers = session.configuration.schedule.quota or first.active_workers
        self.states = [FragmentState(fragment, tensors) for fragment in manifest.fragments]
        self._locks = [asyncio.Lock() for _ in manifest.fragments]
        bases = self._wait_for(session.fetch_all(self._downlink))
        self._fragments = [
            WorkerFragment(base=values, bin=base_bin, codec=self._uplink, estimate=self._estimate(fragment))
            for fragment, (values, base_bin) in zip(manifest.fragments, bases, strict=True)
        ]
        self.starts = [
            RoundStart(state, state.write(values)) for state, (values, _) in zip(self.states, bases, strict=True)
        ]
        self._wait_for(self._begin_exchange(session))

    @property
    def reconnects(self) -> int:
        """How often a connection was lost and resumed, over all shards."""
        return sum(connection.reconnects for connection in self._connected().connections)

    @property
    def window(self) -> int:
        """Rounds that may be in flight before the training thread waits."""
        return (
            1 if self._settings.overlap is Overlap.BLOCKING else max(1, self._connected().configuration.exchange.window)
        )

    def report_speed(self, inner_step_s: float) -> None:
        """Tell the server, with the next messages, the mean seconds of recent inner steps."""
        for connection in self._connected().connections:
            connection.inner_step_s = inner_step_s

    def begin_round(self, starts: Sequence[Snapshot], ends: Sequence[Snapshot]) -> "Future[None]":
        """Exchange a round that has ended, given each fragment's start and end; done when all is answered."""
        return asyncio.run_coroutine_threadsafe(self._round(starts, ends), self._loop)

    def propose_canonical(self) -> None:
        """Propose the server's parameters as they are now, in every bit; nothing may be in flight."""
        bases = self._wait_for(self._connected().fetch_all(codecs.codec("fp32")))
        for fragment, start, (values, newest_bin) in zip(self._fragments, self.starts, bases, strict=True):
            fragment.rebase(values, newest_bin)
            start.propose(values)

    def close(self) -> None:
        """Leave the run. Closing twice is not an error."""
        if self._session is not None:
            self._wait_for(self._session.close())

    async def _begin_exchange(self, session: Session) -> None:
        for connection in session.connections:
            connection.begin_exchange(session.require_manifest(), self._downlink)

    async def _round(self, starts: Sequence[Snapshot], ends: Sequence[Snapshot]) -> None:
        fragments = range(len(self._fragments))
        await asyncio.gather(*(self._fragment_round(index, starts[index], ends[index]) for index in fragments))
        self.traffic.rounds += 1

    async def _fragment_round(self, index: int, start: Snapshot, end: Snapshot) -> None:
        async with self._locks[index]:
            push = await in_codec_thread(self._prepare, index, start, end)
        update = await self._connected().connection_of(index).push(push)
        async with self._locks[index]:
            await in_codec_thread(self._take_in, index, push.seq, update)
        self._count(push, update)
        if index == 0:
            self.inner_steps = update.inner_steps
            self._num_workers = update.quota

    def _prepare(self, index: int, start: Snapshot, end: Snapshot) -> OutgoingPush:
        """On a codec thread: encode a fragment's outer gradient, and propose a start that includes it."""
        fragment = self._fragments[index]
        prepared = fragment.push(start.wait() - end.wait(), self._num_workers)
        if self._settings.overlap is not Overlap.BLOCKING:
            self.starts[index].propose(fragment.new_start())
        return OutgoingPush(
            fragment=index,
            seq=prepared.seq,
            base_bin=prepared.base_bin,
            outer_gradient=outgoing(self._uplink, prepared.payload),
        )

    def _take_in(self, index: int, seq: int, update: ReceivedUpdate) -> None:
        """On a codec thread: take the answer in, and propose the start that follows from it."""
        fragment = self._fragments[index]
        applied = update.refusal is None
        fragment.receive(seq, update.values, update.bin, applied=applied)
        self.starts[index].propose(fragment.new_start(), replace=not applied)
        if not applied:
            _log.warning("the server refused a push, and this worker goes on from the run's state: %s", update.refusal)

    def _count(self, push: OutgoingPush, update: ReceivedUpdate) -> None:
        self.traffic.pushes += 1
        self.traffic.pushes_refused += update.refusal is not None
        self.traffic.bins_late += update.bins_late
        self.traffic.bytes_up += push.outer_gradient.payload.numel()
        self.traffic.bytes_down += update.num_bytes

    def _estimate(self, fragment: Fragment) -> Estimate:
        """What this worker expects of its pushes to a fragment."""
        configuration = self._connected().configuration
        own_weight = configuration.exchange.own_weight
        if self._settings.overlap is not Overlap.EAGER:
            return NoEstimate()
        if own_weight == "local":
            return LocalContinuation()
        if own_weight not in ("1", "1/M"):
            raise InvalidInputError(f"the server asks for own_weight {own_weight!r}, which this version does not know")
        whole = own_weight == "1"
        if fragment.role == "averaged":
            return OwnOuterStep(lr=1.0, momentum=0.0, look_ahead=False, whole=whole)
        outer: pb.OuterConfiguration = configuration.outer
        return OwnOuterStep(lr=outer.lr, momentum=outer.momentum, look_ahead=outer.look_ahead, whole=whole)

    def _connected(self) -> Session:
        if self._session is None:
            raise InvalidInputError("the exchange is not connected")
        return self._session

    def _wait_for(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        """Run a coroutine on the exchange thread and wait for it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()
