"""A joined worker's exchange: moves the rounds on the exchange thread, beside the training thread.

The way of a round: the training thread hands over where each fragment started and ended; a codec thread subtracts,
encodes, and proposes a new start that includes the own push; the connection sends until the server answers; a codec
thread takes the answer in and proposes the start that follows from it. Fragments go through this one after the other,
overlapping.
"""

import asyncio
import logging
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, TypeVar

import torch

from paceline.channels import Access
from paceline.codec_threads import in_codec_thread
from paceline.fragments import manifest_of
from paceline.link_settings import LinkSettings
from paceline.local_momentum import LocalMomentum
from paceline.loop import exchange_loop
from paceline.place import Place
from paceline.placement import ExchangeOn, places_of
from paceline.pushes import OutgoingPush
from paceline.session import Session, new_worker, open_session
from paceline.whereabouts import Locate
from paceline.worker import EndedRound, Overlap, ReceivedUpdate, Worker, WorkerSettings
from paceline.worker_state import SavedFragment, SavedPush, SavedWorker, staleness
from paceline_wire import codecs
from paceline_wire.errors import InvalidInputError
from paceline_wire.transfer import outgoing
from paceline_wire.v1 import parameter_server_pb2 as pb

_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")


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
        link: How it uses its link.
        exchange_on: Where to encode and decode.
        locate: Says where the shards are now; None: they stay where they are.
    """

    worker_id: str | None
    access: Access
    overlap: Overlap
    uplink: str | None
    downlink: str | None
    link: LinkSettings
    exchange_on: ExchangeOn = ExchangeOn.AUTO
    locate: Locate | None = None


@dataclass(frozen=True, eq=False)
class _Sent:
    """A push that was handed to its connection, and the update that will answer it."""

    push: OutgoingPush
    update: "asyncio.Task[ReceivedUpdate]"


class Exchanger:
    """A joined worker's exchange; made by the training thread, running on other threads until `close`.

    Args:
        address: "host:port" of any shard.
        settings: What the worker asked for.
        tensors: The live model's exchanged tensors by name, detached; set to the run's parameters.
        averaged: Names of those that are averaged without momentum.
        momentum_of: Finds the momentum of the inner steps, if the run orders it; asked before the run is touched.

    Raises:
        PacelineError: The run cannot be reached, or refuses this worker or its model.
    """

    def __init__(
        self,
        address: str,
        settings: ExchangeSettings,
        tensors: Mapping[str, torch.Tensor],
        averaged: Collection[str],
        momentum_of: Callable[[pb.RunConfiguration], LocalMomentum | None],
    ) -> None:
        self.traffic = Traffic()
        self._settings = settings
        self._loop = exchange_loop()
        self._session: Session | None = None
        try:
            opening = open_session(address, settings.access, link=settings.link, locate=settings.locate)
            session = self._wait_for(opening)
            self._session = session
            exchange = session.configuration.exchange
            self._uplink = codecs.codec(settings.uplink) if settings.uplink else codecs.codec_of_wire(exchange.uplink)
            self._downlink = (
                codecs.codec(settings.downlink) if settings.downlink else codecs.codec_of_wire(exchange.downlink)
            )
            self.local_momentum = momentum_of(session.configuration)
            self.worker = self._enter(session, tensors, averaged)
        except BaseException:
            self.close()
            raise

    def _enter(self, session: Session, tensors: Mapping[str, torch.Tensor], averaged: Collection[str]) -> Worker:
        """Bring model and run together, and become a member."""
        manifest = manifest_of(tensors, averaged, session.fragment_elements)
        self._wait_for(session.initialize(manifest, tensors))
        self._wait_for(session.join(new_worker(self._settings.worker_id or session.new_name())))
        first = session.connections[0]
        self.worker_index = first.membership.worker_index
        settings = WorkerSettings(
            configuration=session.configuration, overlap=self._settings.overlap, uplink=self._uplink
        )
        self.window = settings.window
        self._locks = [asyncio.Lock() for _ in manifest.fragments]
        self._encodings: set[asyncio.Task[_Sent]] = set()
        self._in_flight: list[dict[int, OutgoingPush]] = [{} for _ in manifest.fragments]
        places = places_of(manifest, tensors, self._settings.exchange_on)
        worker = Worker(
            settings,
            manifest,
            tensors,
            self._wait_for(session.fetch_all(codecs.whole_codec(self._downlink))),
            inner_steps=first.membership.inner_steps,
            num_workers=session.configuration.schedule.quota or first.membership.active_workers,
            places=places,
        )
        self._wait_for(self._begin_exchange(session, places))
        return worker

    @property
    def reconnects(self) -> int:
        """How often a connection was lost and resumed, over all shards."""
        return sum(connection.reconnects for connection in self._connected().connections)

    @property
    def connections(self) -> int:
        """TCP connections that pushes go over, over all shards."""
        return sum(connection.num_connections for connection in self._connected().connections)

    def report_speed(self, inner_step_s: float, inner_steps: int) -> None:
        """Tell the server, with the next messages, the mean seconds of recent inner steps, so many to a round."""
        self._connected().report_speed(inner_step_s, inner_steps, self._uplink)

    def begin_round(self, ended: EndedRound) -> "Future[None]":
        """Exchange a round that has ended; done when all is answered."""
        return asyncio.run_coroutine_threadsafe(self._round(ended), self._loop)

    def fetch_canonical(self) -> list[tuple[torch.Tensor, int]]:
        """The server's parameters as they are now, in every bit: each fragment's values (float32 [n]) and bin."""
        return self._wait_for(self._connected().fetch_all(codecs.codec("fp32")))

    def take_model_back(self) -> None:
        """Let the training thread use a model that is lent, whose answer it waits for no more."""
        if self.worker.is_lent:
            self._wait_for(self._encoded())
            self.worker.take_back()

    def saved(self) -> SavedWorker:
        """All that this worker must remember, at a boundary between two inner steps. Called on the training thread.

        Raises:
            PacelineError: A round could not be encoded.
        """
        session = self._connected()
        return SavedWorker(
            worker_id=session.worker.worker_id,
            incarnation=session.worker.incarnation,
            manifest=session.require_manifest().digest,
            initialization_id=session.initialization_id,
            uplink=self._uplink.name,
            round=self.worker.round,
            steps_in_round=self.worker.steps_in_round,
            tokens=self.worker.tokens,
            fragments=self._wait_for(self._saved_fragments(self.worker.positions())),
        )

    def restore(self, saved: SavedWorker) -> "list[Future[None]]":
        """Go on from a saved state, before the first inner step. Called on the training thread.

        Returns:
            The rounds in flight, each done when all is answered.

        Raises:
            InvalidInputError: It is the state of another worker, model or run.
            PacelineError: A shard refuses, or cannot be reached.
        """
        session = self._connected()
        saved.require(
            worker_id=session.worker.worker_id,
            manifest=session.require_manifest(),
            initialization_id=session.initialization_id,
        )
        progress = self._wait_for(session.take_over(saved.incarnation))
        bases = self._wait_for(session.fetch_all(codecs.whole_codec(self._downlink)))
        stale = staleness(saved, progress)
        if stale is not None:
            _log.warning(
                "the saved state is older than what this worker has pushed: %s; its unfinished round and its pushes in "
                "flight are dropped, and a new round begins at the run's parameters",
                stale,
            )
            self.worker.begin_anew(saved.round, bases, progress)
            return []
        self.worker.restore(saved, bases, progress)
        return [
            asyncio.run_coroutine_threadsafe(self._send_again(pushes), self._loop)
            for pushes in zip_longest(*(_pushes_of(index, saved) for index in range(len(saved.fragments))))
        ]

    def close(self) -> None:
        """Leave the run. Closing twice is not an error."""
        if self._session is not None:
            self._wait_for(self._session.close())

    async def _begin_exchange(self, session: Session, places: Sequence[Place]) -> None:
        session.begin_exchange(self._downlink, places)

    async def _round(self, ended: EndedRound) -> None:
        encodings = [self._begin_encoding(index, ended) for index in range(self.worker.num_fragments)]
        await asyncio.gather(*(self._answered(encoding) for encoding in encodings))
        self.traffic.rounds += 1

    def _begin_encoding(self, index: int, ended: EndedRound) -> "asyncio.Task[_Sent]":
        encoding = asyncio.create_task(self._encode(index, ended))
        self._encodings.add(encoding)
        encoding.add_done_callback(self._encodings.discard)
        return encoding

    async def _encode(self, index: int, ended: EndedRound) -> _Sent:
        async with self._locks[index]:
            return self._send(await in_codec_thread(self._prepare, index, ended))

    def _send(self, push: OutgoingPush) -> _Sent:
        """Hand a push to its connection; those of a fragment in the order of their seq."""
        self._in_flight[push.fragment][push.seq] = push
        return _Sent(push, asyncio.create_task(self._connected().connection_of(push.fragment).push(push)))

    async def _answered(self, encoding: "asyncio.Task[_Sent]") -> None:
        await self._take_in(await encoding)

    async def _take_in(self, sent: _Sent) -> None:
        push, update = sent.push, await sent.update
        async with self._locks[push.fragment]:
            await in_codec_thread(self.worker.take_in, push.fragment, push.seq, update)
            del self._in_flight[push.fragment][push.seq]
        if update.refusal is not None:
            _log.warning("the server refused a push, and this worker goes on from the run's state: %s", update.refusal)
        self._count(push, update)

    async def _encoded(self) -> "set[asyncio.Task[_Sent]]":
        """The encodings that were under way, once they are done."""
        return (await asyncio.wait(self._encodings))[0] if self._encodings else set()

    async def _saved_fragments(self, positions: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> list[SavedFragment]:
        """Every fragment's state, once the rounds that have ended are encoded: before, their work is nowhere else."""
        for encoding in await self._encoded():
            encoding.result()
        return await asyncio.gather(*(self._saved_fragment(index, *each) for index, each in enumerate(positions)))

    async def _saved_fragment(self, index: int, start: torch.Tensor, values: torch.Tensor) -> SavedFragment:
        async with self._locks[index]:
            memory = await in_codec_thread(self.worker.memory, index)
            pushes = [
                SavedPush(
                    seq=push.seq,
                    base_bin=push.base_bin,
                    tokens=push.tokens,
                    payload=push.outer_gradient.payload,
                    residual=memory.uplink.residuals_in_flight[push.seq],
                    expected=memory.expected[push.seq],
                )
                for push in self._in_flight[index].values()
            ]
        return SavedFragment(
            start=start,
            values=values,
            seq=memory.uplink.seq,
            residual=memory.uplink.residual,
            velocity=memory.velocity,
            pushes=pushes,
        )

    async def _send_again(self, pushes: Sequence[OutgoingPush | None]) -> None:
        """Send pushes of one round that a saved state had in flight, until they are answered."""
        sent = [self._send(push) for push in pushes if push is not None]
        await asyncio.gather(*(self._take_in(each) for each in sent))
        self.traffic.rounds += 1

    def _prepare(self, index: int, ended: EndedRound) -> OutgoingPush:
        """On a codec thread: make a fragment's push ready to be sent."""
        prepared = self.worker.prepare(index, ended)
        return OutgoingPush(
            fragment=index,
            seq=prepared.seq,
            base_bin=prepared.base_bin,
            outer_gradient=outgoing(self._uplink, prepared.payload),
            tokens=ended.tokens,
        )

    def _count(self, push: OutgoingPush, update: ReceivedUpdate) -> None:
        self.traffic.pushes += 1
        self.traffic.pushes_refused += update.refusal is not None
        self.traffic.bins_late += update.bins_late
        self.traffic.bytes_up += push.outer_gradient.payload.numel()
        self.traffic.bytes_down += update.num_bytes

    def _connected(self) -> Session:
        if self._session is None:
            raise InvalidInputError("the exchange is not connected")
        return self._session

    def _wait_for(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        """Run a coroutine on the exchange thread and wait for it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


def _pushes_of(index: int, saved: SavedWorker) -> list[OutgoingPush]:
    """A fragment's pushes that were in flight, as they were sent."""
    codec = codecs.codec(saved.uplink)
    return [
        OutgoingPush(
            fragment=index,
            seq=push.seq,
            base_bin=push.base_bin,
            outer_gradient=outgoing(codec, push.payload),
            tokens=push.tokens,
        )
        for push in saved.fragments[index].pushes
    ]
