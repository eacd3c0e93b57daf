"""A joined worker's exchange: moves the rounds on the exchange thread, beside the training thread.

The way of a round: the training thread hands over where each fragment started and ended; a codec thread subtracts,
encodes, and proposes a new start that includes the own push; the connection sends until the server answers; a codec
thread takes the answer in and proposes the start that follows from it. Fragments go through this one after the other,
overlapping.
"""

import asyncio
import logging
from collections.abc import Callable, Collection, Coroutine, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from paceline.channels import Access
from paceline.codec_threads import in_codec_thread
from paceline.connection import OutgoingPush
from paceline.fragments import manifest_of
from paceline.local_momentum import LocalMomentum
from paceline.loop import exchange_loop
from paceline.session import Session, new_worker, open_session
from paceline.worker import EndedRound, Overlap, ReceivedUpdate, Worker, WorkerSettings
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
            session = self._wait_for(open_session(address, settings.access))
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
        self._wait_for(session.join(new_worker(self._settings.worker_id)))
        first = session.connections[0]
        self.worker_index = first.worker_index
        settings = WorkerSettings(
            configuration=session.configuration, overlap=self._settings.overlap, uplink=self._uplink
        )
        self.window = settings.window
        self._locks = [asyncio.Lock() for _ in manifest.fragments]
        worker = Worker(
            settings,
            manifest,
            tensors,
            self._wait_for(session.fetch_all(self._downlink)),
            inner_steps=first.inner_steps,
            num_workers=session.configuration.schedule.quota or first.active_workers,
        )
        self._wait_for(self._begin_exchange(session))
        return worker

    @property
    def reconnects(self) -> int:
        """How often a connection was lost and resumed, over all shards."""
        return sum(connection.reconnects for connection in self._connected().connections)

    def report_speed(self, inner_step_s: float) -> None:
        """Tell the server, with the next messages, the mean seconds of recent inner steps."""
        for connection in self._connected().connections:
            connection.inner_step_s = inner_step_s

    def begin_round(self, ended: EndedRound) -> "Future[None]":
        """Exchange a round that has ended; done when all is answered."""
        return asyncio.run_coroutine_threadsafe(self._round(ended), self._loop)

    def fetch_canonical(self) -> list[tuple[torch.Tensor, int]]:
        """The server's parameters as they are now, in every bit: each fragment's values (float32 [n]) and bin."""
        return self._wait_for(self._connected().fetch_all(codecs.codec("fp32")))

    def close(self) -> None:
        """Leave the run. Closing twice is not an error."""
        if self._session is not None:
            self._wait_for(self._session.close())

    async def _begin_exchange(self, session: Session) -> None:
        session.begin_exchange(self._downlink)

    async def _round(self, ended: EndedRound) -> None:
        await asyncio.gather(*(self._fragment_round(index, ended) for index in range(self.worker.num_fragments)))
        self.traffic.rounds += 1

    async def _fragment_round(self, index: int, ended: EndedRound) -> None:
        async with self._locks[index]:
            push = await in_codec_thread(self._prepare, index, ended)
        update = await self._connected().connection_of(index).push(push)
        async with self._locks[index]:
            await in_codec_thread(self.worker.take_in, index, push.seq, update)
        if update.refusal is not None:
            _log.warning("the server refused a push, and this worker goes on from the run's state: %s", update.refusal)
        self._count(push, update)

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
