"""A client's view of a run: what it is, where its shards are, and the calls that need all of them."""

import asyncio
import logging
import os
import secrets
import socket
import time
from collections.abc import Mapping, Sequence

import grpc
import torch

from paceline.calls import CALL_S, REACH_S, called, describe, persistently
from paceline.channels import Access, error_of
from paceline.codec_threads import in_codec_thread
from paceline.connection import ShardConnection
from paceline.discovery import find_run
from paceline.initialization import Initialization
from paceline.link_settings import LinkSettings
from paceline.place import HOST, Place
from paceline.whereabouts import Locate, moves
from paceline.worker_state import Progress
from paceline_wire import bulk, codecs
from paceline_wire.codecs.base import Codec
from paceline_wire.errors import NotInitializedError, SupersededError, UnavailableError
from paceline_wire.manifest import Fragment, Manifest
from paceline_wire.memory import keep_large_buffers
from paceline_wire.transfer import Receiver
from paceline_wire.v1 import admin_pb2, admin_pb2_grpc
from paceline_wire.v1 import parameter_server_pb2 as pb
from paceline_wire.v1 import parameter_server_pb2_grpc as pb_grpc

MAX_FETCHES = 4
"""Fragments fetched at once: enough to hide a long round trip, few enough to bound memory."""

_log = logging.getLogger(__name__)


class Session:
    """An open run. Belongs to one event loop; made by `open_session`.

    Attributes:
        configuration: What the run is configured to do.
        fragment_elements: The largest fragment, for whoever initializes the run.
        targets: "host:port" of every shard, in order.
        manifest: What the run exchanges; None until it is initialized.
        initialization_id: The upload that its parameters come from; 0 until it is known.
        caller: The name that the server knows this client's credential by; "" if it names nobody.
        worker: As whom it has joined; without a name before.
        connections: The member's connections, one to each shard.

    Args:
        access: TLS and token.
        description: What the run's shard of index 0 said.
        targets: "host:port" of every shard, in order.
        link: How this worker wants to use its link.
        locate: Says where the shards are now; None: they stay where they are.
    """

    def __init__(
        self,
        access: Access,
        description: pb.DescribeResponse,
        targets: list[str],
        link: LinkSettings,
        locate: Locate | None = None,
    ) -> None:
        self.configuration = description.configuration
        self.fragment_elements = int(description.fragment_elements)
        self.targets = targets
        self.manifest = Manifest.from_wire(description.manifest) if description.HasField("manifest") else None
        self.initialization_id = int(description.initialization_id)
        self.caller = description.caller
        self.worker = pb.Worker()
        self.connections: list[ShardConnection] = []
        self._access = access
        self._link = link
        self._pace = link.pace(self.configuration.exchange)
        self._channels = [access.channel(target) for target in targets]
        self._stubs = [pb_grpc.ParameterServerServiceStub(channel) for channel in self._channels]
        self._left: list[grpc.aio.Channel] = []
        self._following = asyncio.create_task(self._follow(locate)) if locate is not None else None

    def new_name(self) -> str:
        """A name that no other worker has, from host and process, under which the credential lets this one act."""
        name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(2)}"
        return f"{self.caller}.{name}" if self.caller else name

    async def join(self, worker: pb.Worker) -> None:
        """Become a member on every shard.

        This start is later than whatever a shard knows of this worker, even if the clock was set back meanwhile: where
        a shard knows a higher incarnation, the next one is taken.

        Raises:
            PacelineError: A shard refuses, or cannot be reached.
        """
        try:
            await self._join_as(worker)
        except SupersededError as error:
            if error.newest_incarnation is None:
                raise
            later = pb.Worker(worker_id=worker.worker_id, incarnation=error.newest_incarnation + 1)
            _log.info("joining as incarnation %d: the clock is behind this worker's last start", later.incarnation)
            await self._join_as(later)

    async def _join_as(self, worker: pb.Worker) -> None:
        self.worker = worker
        self.connections = [ShardConnection(target, self._access, worker, self._pace) for target in self.targets]
        joins = (persistently(connection.join, REACH_S) for connection in self.connections)
        ends = await asyncio.gather(*joins, return_exceptions=True)
        failures = [end for end in ends if isinstance(end, BaseException)]
        superseded = [error for error in failures if isinstance(error, SupersededError)]
        if superseded:
            await asyncio.gather(*(connection.close() for connection in self.connections))
            raise max(superseded, key=lambda error: error.newest_incarnation or 0)
        if failures:
            raise failures[0]

    async def take_over(self, previous: int) -> list[Progress]:
        """Go on with the pushes of an earlier incarnation: how far the run got with them, fragment by fragment.

        Raises:
            PacelineError: A shard refuses, or cannot be reached.
        """
        answers = await asyncio.gather(
            *(persistently(lambda each=each: each.take_over(previous), REACH_S) for each in self.connections)  # type: ignore[misc]  # mypy cannot infer it
        )
        progress = {fragment: found for answer in answers for fragment, found in answer.items()}
        return [progress[fragment.index] for fragment in self.require_manifest().fragments]

    def begin_exchange(self, downlink: Codec, places: Sequence[Place] | None = None) -> None:
        """Open the exchange streams that are not open yet.

        Args:
            downlink: How updates are to be written.
            places: Where each fragment's updates are decoded, in the order of the plan; None: on the host.
        """
        exchange, manifest = self.configuration.exchange, self.require_manifest()
        for shard, connection in enumerate(self.connections):
            if not connection.exchanging:
                num_fragments = len(manifest.fragments[shard :: len(self.connections)])
                connection.begin_exchange(
                    manifest,
                    downlink,
                    places or [HOST] * len(manifest.fragments),
                    momentum_follows=exchange.own_weight == "predicted",
                    num_fragments=num_fragments,
                    connection_count=self._link.connection_count(exchange, num_fragments),
                )

    def report_speed(self, inner_step_s: float, inner_steps: int, uplink: Codec) -> None:
        """Tell the shards, with the next messages, the mean seconds of recent inner steps, and spread pushes over them.

        Args:
            inner_step_s: The seconds.
            inner_steps: How many of them make a round.
            uplink: How pushes are written.
        """
        for connection in self.connections:
            connection.membership.inner_step_s = inner_step_s
        if self.configuration.exchange.spread:
            sizes = (uplink.encoded_bytes(fragment.num_elements) for fragment in self.require_manifest().fragments)
            self._pace.spread(sum(sizes), inner_steps * inner_step_s)

    def connection_of(self, fragment: int) -> ShardConnection:
        """The member's connection to the shard on which a fragment lives."""
        return self.connections[fragment % len(self.connections)]

    def require_manifest(self) -> Manifest:
        """The run's manifest.

        Raises:
            NotInitializedError: The run has none yet.
        """
        if self.manifest is None:
            raise NotInitializedError("the run has no parameters yet: call initialize first, or let a worker do it")
        return self.manifest

    async def initialize(self, manifest: Manifest, tensors: Mapping[str, torch.Tensor]) -> None:
        """Upload first parameters; if the run has some, only make sure that its manifest is this one.

        All fragments come from one caller: the shard of index 0 decides whose.

        Raises:
            ManifestMismatchError: The run has another model; the text names the first tensor that differs.
            UnavailableError: The shards have parameters of several uploads.
        """
        if self.manifest is None:
            await self.refresh()
        initialization = Initialization(self.targets, self._channels, self._access, manifest, tensors)
        self.initialization_id = await initialization.run(begun=self.manifest is not None)
        self.manifest = manifest

    async def refresh(self) -> None:
        """Ask again for the manifest.

        Raises:
            PacelineError: The shard refuses, or cannot be reached.
        """
        description = await persistently(lambda: describe(self._stubs[0], self._access, self.targets[0]), REACH_S)
        if description.HasField("manifest"):
            self.manifest = Manifest.from_wire(description.manifest)

    async def fetch(self, fragment: Fragment, codec: Codec) -> tuple[torch.Tensor, int]:
        """A fragment's current values (float32 [n]) and the bin that gradients from them belong to.

        Raises:
            PacelineError: The shard refuses, or cannot be reached.
        """
        return await persistently(lambda: self._fetch_once(fragment, codec), REACH_S)

    async def _fetch_once(self, fragment: Fragment, codec: Codec) -> tuple[torch.Tensor, int]:
        shard = fragment.index % len(self.targets)
        request = pb.FetchRequest(fragments=[fragment.index], codec=codecs.wire_value(codec))
        receiver, announced = Receiver(), None
        try:
            fetch = bulk.method(self._channels[shard], "Fetch")
            async for message, data in fetch(request, metadata=self._access.metadata):
                if message.HasField("fragment"):
                    announced = message.fragment
                    receiver.begin(announced.payload, fragment.num_elements)
                assembly = receiver.add(data)
                if assembly is not None and announced is not None:
                    payload = assembly.payload()
                    values = await in_codec_thread(codecs.decode, assembly.codec, payload, fragment.num_elements)
                    return values, int(announced.bin)
        except grpc.RpcError as error:
            raise error_of(error, self.targets[shard]) from error
        raise UnavailableError(f"{self.targets[shard]} ended the fetch of fragment {fragment.index} early")

    async def fetch_all(self, codec: Codec) -> list[tuple[torch.Tensor, int]]:
        """Every fragment's current values and bin, in the order of the plan; see `fetch`."""
        streams = asyncio.Semaphore(MAX_FETCHES)

        async def fetch(fragment: Fragment) -> tuple[torch.Tensor, int]:
            async with streams:
                return await self.fetch(fragment, codec)

        return list(await asyncio.gather(*(fetch(fragment) for fragment in self.require_manifest().fragments)))

    async def statuses(self) -> list[admin_pb2.StatusResponse]:
        """Every shard's status.

        Raises:
            PacelineError: A shard refuses, or cannot be reached.
        """
        return list(await asyncio.gather(*(self._status(shard) for shard in range(len(self.targets)))))

    async def close(self) -> None:
        """Leave the run, if joined, and end the connections. Closing twice is not an error."""
        if self._following is not None:
            self._following.cancel()
            await asyncio.gather(self._following, return_exceptions=True)
        await asyncio.gather(*(connection.close() for connection in self.connections))
        await asyncio.gather(*(channel.close() for channel in (*self._channels, *self._left)))

    async def _follow(self, locate: Locate) -> None:
        """Go after shards that move."""
        async for shard, target in moves(locate, self.targets):
            _log.info("shard %d is at %s now, no longer at %s", shard, target, self.targets[shard])
            self.targets[shard] = target
            # Calls on the channel that is left fail by themselves; closed under them, it would cancel their callers.
            self._left.append(self._channels[shard])
            self._channels[shard] = self._access.channel(target)
            self._stubs[shard] = pb_grpc.ParameterServerServiceStub(self._channels[shard])
            if self.connections:
                self.connections[shard].move(target)

    async def _status(self, shard: int) -> admin_pb2.StatusResponse:
        stub = admin_pb2_grpc.AdminServiceStub(self._channels[shard])
        return await called(
            stub.Status(admin_pb2.StatusRequest(), timeout=CALL_S, metadata=self._access.metadata), self.targets[shard]
        )


async def open_session(
    address: str,
    access: Access,
    reach_s: float = REACH_S,
    link: LinkSettings | None = None,
    locate: Locate | None = None,
) -> Session:
    """Find a run from any one of its shards.

    Args:
        address: "host:port" of a shard.
        access: TLS and token.
        reach_s: Seconds to go on trying while the shard cannot be reached.
        link: How this worker wants to use its link; None: as the server says.
        locate: Says where the shards are now, see `Locate`; None: where the shard at the address says, for good.

    Raises:
        UnavailableError: The shard could not be reached in that time.
        PacelineError: The shard refuses this client; the text says why.
    """
    keep_large_buffers()
    description, targets = await find_run(address, access, reach_s)
    return Session(access, description, targets, link or LinkSettings(), locate)


def new_worker(worker_id: str) -> pb.Worker:
    """A worker's identity for this start: the incarnation is the wall clock's, so that a later start is higher.

    Where the clock was set back, `Session.join` mends it.
    """
    return pb.Worker(worker_id=worker_id, incarnation=time.time_ns())
