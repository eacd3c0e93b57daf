"""The asyncio client: a run's parameters as named tensors, for loops of any shape."""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from paceline.calls import REACH_S
from paceline.channels import TLS, Access
from paceline.codec_threads import in_codec_thread
from paceline.fragments import (
    Destination,
    empty_tensors,
    exchanged,
    manifest_of,
    parts_of,
    require_values,
    scatter,
)
from paceline.link_settings import LinkSettings
from paceline.pushes import OutgoingPush
from paceline.session import Session, new_worker, open_session
from paceline.uplink import Uplink
from paceline.whereabouts import Locate
from paceline.worker import ReceivedUpdate
from paceline_wire import codecs
from paceline_wire.codecs.base import Codec
from paceline_wire.errors import InvalidInputError, PushRefusedError
from paceline_wire.manifest import Fragment, Manifest
from paceline_wire.transfer import Outgoing, outgoing
from paceline_wire.v1 import admin_pb2
from paceline_wire.v1 import parameter_server_pb2 as pb

MAX_ENCODING = 4
"""Fragments that are encoded ahead of the link: enough to overlap, few enough to bound memory."""


@dataclass(frozen=True, eq=False)
class Base:
    """The newest server state that a client holds.

    Attributes:
        tensors: Every exchanged tensor by name, float32 on the host.
        bins: For each fragment, the bin that outer gradients computed from these tensors belong to.
    """

    tensors: dict[str, torch.Tensor]
    bins: dict[int, int]


class Client:
    """A connected client; made by `connect`. Belongs to one event loop.

    Args:
        session: The open run.
        is_worker: Whether it has joined, and may push.
    """

    def __init__(self, session: Session, *, is_worker: bool) -> None:
        self._session = session
        self._is_worker = is_worker
        exchange = session.configuration.exchange
        uplink_codec = self._uplink_codec = codecs.codec_of_wire(exchange.uplink)
        self._downlink = codecs.codec_of_wire(exchange.downlink)
        # Not through self: in a cycle, the residuals, as large as the model, would stay until a full collection.
        self._uplinks: defaultdict[int, Uplink] = defaultdict(lambda: Uplink(uplink_codec))
        # Exchanges may overlap; each fragment's pushes must be encoded and sent in one order.
        self._orders: defaultdict[int, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._encoding = asyncio.Semaphore(MAX_ENCODING)
        self._exchanges: set[asyncio.Task[Base]] = set()

    @property
    def manifest(self) -> Manifest | None:
        """What the run exchanges; None until it is initialized."""
        return self._session.manifest

    @property
    def configuration(self) -> pb.RunConfiguration:
        """What the server tells of the run's configuration."""
        return self._session.configuration

    async def initialize(self, tensors: Mapping[str, torch.Tensor], *, averaged: Collection[str] = ()) -> None:
        """Give the run its first parameters. The first caller counts; later ones only have their manifest checked.

        Args:
            tensors: By name, of any shapes, float32, bfloat16 or float16. Integer tensors stay local, tied ones count
                once, under the name that comes first.
            averaged: Names of the tensors that are averaged over the workers without momentum (float buffers).

        Raises:
            ManifestMismatchError: The run has another model; the text names the first tensor that differs.
            InvalidInputError: A tensor cannot be exchanged; the text says which and why.
        """
        kept = exchanged(tensors)
        await self._session.initialize(manifest_of(kept, averaged, self._session.fragment_elements), kept)

    async def fetch(self, codec: str | None = None) -> Base:
        """The current parameters.

        Args:
            codec: How they are sent, "fp32" for every bit; None: as the server says for updates, "bf16" where these are
                differences.

        Raises:
            NotInitializedError: The run has none yet.
            UnavailableError: A shard cannot be reached.
        """
        manifest = await self._known_manifest()
        base = _empty_base(manifest)
        fetched = await self._session.fetch_all(codecs.codec(codec) if codec else codecs.whole_codec(self._downlink))
        for fragment, (values, newest_bin) in zip(manifest.fragments, fetched, strict=True):
            base.bins[fragment.index] = newest_bin
            await in_codec_thread(scatter, fragment, values, base.tensors)
        return base

    async def exchange(
        self,
        outer_gradient: Mapping[str, torch.Tensor],
        base: Base,
        *,
        local_momentum: Mapping[str, torch.Tensor] | None = None,
        tokens: int | None = None,
    ) -> Base:
        """Push an outer gradient and return the state that answers it, once every fragment is acknowledged.

        What the uplink's codec loses is added to this client's next push. Cancelled, it goes on without its caller:
        what was handed over counts, and the next exchange follows it.

        Args:
            outer_gradient: Start minus end of the round, by name: the manifest's names and shapes.
            base: The state from which it was computed.
            local_momentum: The momentum of the inner steps, with their learning rate inside, by the names of the
                trained parameters; given exactly if the run orders it (`configuration.outer.local_momentum`).
            tokens: Tokens or samples that the outer gradient stands for; None: not counted.

        Raises:
            PushRefusedError: The server refused a fragment for what it contains (others were applied).
            ManifestMismatchError: The names or shapes are not the run's.
            InvalidInputError: This client is an observer, or local_momentum is missing or superfluous.
        """
        if not self._is_worker:
            raise InvalidInputError("this client only observes: give connect a worker_id to push")
        manifest = await self._known_manifest()
        require_values(manifest, outer_gradient)
        self._require_momentum(manifest, local_momentum)
        self._session.begin_exchange(self._downlink)
        exchange = asyncio.create_task(
            self._exchange(manifest, _Contribution(outer_gradient, local_momentum, tokens), base)
        )
        self._exchanges.add(exchange)
        exchange.add_done_callback(self._exchanged)
        return await asyncio.shield(exchange)

    @property
    def connections(self) -> int:
        """TCP connections that pushes go over, over all shards."""
        return sum(connection.num_connections for connection in self._session.connections)

    async def statuses(self) -> list[admin_pb2.StatusResponse]:
        """Every shard's status, see admin.proto.

        Raises:
            UnavailableError: A shard cannot be reached.
        """
        return await self._session.statuses()

    def _require_momentum(self, manifest: Manifest, local_momentum: Mapping[str, torch.Tensor] | None) -> None:
        wanted = self.configuration.outer.local_momentum
        if wanted != (local_momentum is not None):
            need = "orders the workers' momentum: give local_momentum" if wanted else "does not take local_momentum"
            raise InvalidInputError(f"this run's outer rule {self.configuration.outer.rule!r} {need}")
        if local_momentum is not None:
            parameters = tuple(spec for spec in manifest.tensors if spec.role == "parameter")
            require_values(Manifest(parameters, manifest.fragment_elements), local_momentum)

    async def _exchange(self, manifest: Manifest, contribution: "_Contribution", base: Base) -> Base:
        newest = _empty_base(manifest)

        async def exchange(fragment: Fragment) -> str | None:
            into = Destination(fragment=fragment, tensors=newest.tensors)
            update = await self._push(fragment, contribution, base.bins[fragment.index], into)
            newest.bins[fragment.index] = update.bin
            return update.refusal

        refusals = await asyncio.gather(*(exchange(fragment) for fragment in manifest.fragments))
        reasons = [refusal for refusal in refusals if refusal is not None]
        if reasons:
            raise PushRefusedError(reasons[0] if len(reasons) == 1 else f"{reasons[0]} (and {len(reasons) - 1} more)")
        return newest

    def _exchanged(self, exchange: "asyncio.Task[Base]") -> None:
        self._exchanges.discard(exchange)
        if not exchange.cancelled():
            exchange.exception()  # seen, should the caller be gone

    async def _push(
        self, fragment: Fragment, contribution: "_Contribution", base_bin: int, into: Destination
    ) -> ReceivedUpdate:
        uplink, order = self._uplinks[fragment.index], self._orders[fragment.index]
        async with order, self._encoding:
            seq, ready = await in_codec_thread(_encode, uplink, fragment, contribution, self._uplink_codec)
        push = OutgoingPush(
            fragment=fragment.index,
            seq=seq,
            base_bin=base_bin,
            outer_gradient=ready,
            tokens=contribution.tokens,
            into=into,
        )
        update = await self._session.connection_of(fragment.index).push(push)
        uplink.settle(seq, applied=update.refusal is None)
        return update

    async def _known_manifest(self) -> Manifest:
        """The run's manifest, asked for again if another client may have initialized the run meanwhile."""
        if self._session.manifest is None:
            await self._session.refresh()
        return self._session.require_manifest()


@dataclass(frozen=True, eq=False)
class _Contribution:
    """What one exchange pushes, see `Client.exchange`."""

    outer_gradient: Mapping[str, torch.Tensor]
    local_momentum: Mapping[str, torch.Tensor] | None
    tokens: int | None


def _encode(uplink: Uplink, fragment: Fragment, contribution: _Contribution, codec: Codec) -> tuple[int, Outgoing]:
    numbers = parts_of(fragment, contribution.outer_gradient)
    if contribution.local_momentum is not None and fragment.role == "parameter":
        numbers += parts_of(fragment, contribution.local_momentum)
    push = uplink.encode(numbers)
    return push.seq, outgoing(codec, push.encoded.payload)


def _empty_base(manifest: Manifest) -> Base:
    return Base(tensors=empty_tensors(manifest), bins=dict.fromkeys(range(len(manifest.fragments)), 0))


@asynccontextmanager
async def connect(
    address: str,
    *,
    worker_id: str | None = None,
    token: str | None = None,
    tls: TLS | str | Path | bool | None = None,
    reach_s: float = REACH_S,
    connections: int | str | None = None,
    max_uplink_mbit: float | None = None,
    locate: Locate | None = None,
) -> AsyncIterator[Client]:
    """Connect to a run for as long as the context lasts.

    Args:
        address: "host:port" of any of its shards.
        worker_id: Join as this worker, until the context ends; None: observe only.
        token: The run's token; None: that in the variable PACELINE_TOKEN, or in the file PACELINE_TOKEN_FILE names.
        tls: None: no TLS; True: verify with the system's authorities; a path: with that CA file; or a `TLS`.
        reach_s: Seconds to go on trying while the server cannot be reached.
        connections: TCP connections to each shard, 1 to 8, or "auto": as many as pay; None: as the server says.
        max_uplink_mbit: Mbit/s that pushes may take, to all shards together; None: as the server says.
        locate: Says where the run's shards are now, as "host:port" of each in order, for shards that move (see
            `paceline.whereabouts.Locate`); None: they stay at the addresses at which they were found.

    Yields:
        The client.

    Raises:
        UnavailableError: The server could not be reached, or one of the certificates does not verify.
        UnauthenticatedError: The token is missing or wrong.
        ProtocolVersionError: The server speaks another version.

    Example:
        async with paceline.connect("ps.example.org:7070", worker_id="a") as client:
            await client.initialize(dict(model.named_parameters()))
            base = await client.fetch()
            base = await client.exchange(outer_gradient, base)
    """
    link = LinkSettings(connections=connections, max_uplink_mbit=max_uplink_mbit)
    session = await open_session(address, Access.of(tls, token), reach_s, link, locate)
    try:
        if worker_id is not None:
            await session.join(new_worker(worker_id))
        yield Client(session, is_worker=worker_id is not None)
    finally:
        await session.close()
