"""A client's view of a run: what it is, where its shards are, and the calls that need all of them."""

import asyncio
import logging
import random
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import TypeVar

import grpc
import grpc.aio
import torch

from paceline.channels import Access, backoff_s, error_of, split_address
from paceline.codec_threads import in_codec_thread
from paceline.connection import CALL_S, ShardConnection
from paceline.fragments import gather
from paceline_wire import PROTOCOL_VERSION, codecs
from paceline_wire.codecs.base import Codec
from paceline_wire.errors import (
    InvalidInputError,
    ManifestMismatchError,
    NotInitializedError,
    PacelineError,
    ProtocolVersionError,
    SupersededError,
    UnavailableError,
)
from paceline_wire.manifest import Fragment, Manifest
from paceline_wire.memory import keep_large_buffers
from paceline_wire.transfer import Outgoing, Receiver, outgoing, pieces
from paceline_wire.v1 import admin_pb2, admin_pb2_grpc
from paceline_wire.v1 import parameter_server_pb2 as pb
from paceline_wire.v1 import parameter_server_pb2_grpc as pb_grpc

_log = logging.getLogger(__name__)
_Answer = TypeVar("_Answer")

MAX_FETCHES = 4
"""Fragments fetched at once: enough to hide a long round trip, few enough to bound memory."""

REACH_S = 30.0
"""Seconds that a run gets to come up: server and workers are usually started together."""


class Session:
    """An open run. Belongs to one event loop; made by `open_session`.

    Args:
        access: TLS and token.
        description: What the run's shard of index 0 said.
        targets: "host:port" of every shard, in order.
    """

    def __init__(self, access: Access, description: pb.DescribeResponse, targets: list[str]) -> None:
        self.configuration = description.configuration
        self.fragment_elements = int(description.fragment_elements)
        self.targets = targets
        self.manifest = Manifest.from_wire(description.manifest) if description.HasField("manifest") else None
        self.connections: list[ShardConnection] = []
        self._access = access
        self._channels = [access.channel(target) for target in targets]
        self._stubs = [pb_grpc.ParameterServerServiceStub(channel) for channel in self._channels]

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
        self.connections = [ShardConnection(target, self._access, worker) for target in self.targets]
        joins = (_persistently(connection.join, REACH_S) for connection in self.connections)
        ends = await asyncio.gather(*joins, return_exceptions=True)
        failures = [end for end in ends if isinstance(end, BaseException)]
        superseded = [error for error in failures if isinstance(error, SupersededError)]
        if superseded:
            await asyncio.gather(*(connection.close() for connection in self.connections))
            raise max(superseded, key=lambda error: error.newest_incarnation or 0)
        if failures:
            raise failures[0]

    def begin_exchange(self, downlink: Codec) -> None:
        """Open the exchange streams that are not open yet; updates are written as downlink says."""
        predicted = self.configuration.exchange.own_weight == "predicted"
        for connection in self.connections:
            if not connection.exchanging:
                connection.begin_exchange(self.require_manifest(), downlink, momentum_follows=predicted)

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
            UnavailableError: Another caller began to initialize the run and did not finish.
        """
        if self.manifest is None:
            await self.refresh()
        own = secrets.randbits(63) + 1
        if self.manifest is None and (await self._upload(0, manifest, tensors, own)).initialization_id == own:
            rest = (self._upload(shard, manifest, tensors, own) for shard in range(1, len(self.targets)))
            await asyncio.gather(*rest)
        else:
            await self._others_finished(manifest)
        self.manifest = manifest

    async def refresh(self) -> None:
        """Ask again for the manifest.

        Raises:
            PacelineError: The shard refuses, or cannot be reached.
        """
        description = await _persistently(lambda: _describe(self._stubs[0], self._access, self.targets[0]), REACH_S)
        if description.HasField("manifest"):
            self.manifest = Manifest.from_wire(description.manifest)

    async def fetch(self, fragment: Fragment, codec: Codec) -> tuple[torch.Tensor, int]:
        """A fragment's current values (float32 [n]) and the bin that gradients from them belong to.

        Raises:
            PacelineError: The shard refuses, or cannot be reached.
        """
        return await _persistently(lambda: self._fetch_once(fragment, codec), REACH_S)

    async def _fetch_once(self, fragment: Fragment, codec: Codec) -> tuple[torch.Tensor, int]:
        shard = fragment.index % len(self.targets)
        request = pb.FetchRequest(fragments=[fragment.index], codec=codecs.wire_value(codec))
        receiver, announced = Receiver(), None
        try:
            async for message in self._stubs[shard].Fetch(request, metadata=self._access.metadata):
                if message.HasField("fragment"):
                    announced = message.fragment
                    receiver.begin(announced.payload, fragment.num_elements)
                assembly = receiver.add(message.data)
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
        await asyncio.gather(*(connection.close() for connection in self.connections))
        await asyncio.gather(*(channel.close() for channel in self._channels))

    async def _status(self, shard: int) -> admin_pb2.StatusResponse:
        stub = admin_pb2_grpc.AdminServiceStub(self._channels[shard])
        return await _called(
            stub.Status(admin_pb2.StatusRequest(), timeout=CALL_S, metadata=self._access.metadata), self.targets[shard]
        )

    async def _upload(
        self, shard: int, manifest: Manifest, tensors: Mapping[str, torch.Tensor], own: int
    ) -> pb.InitializeResponse:
        """Send a shard its fragments, unless it answers before: then it has some, or refuses these.

        A refusal in the middle of an upload may reach gRPC as a broken stream, so that only the next attempt tells.
        """
        return await _persistently(lambda: self._upload_once(shard, manifest, tensors, own), REACH_S)

    async def _upload_once(
        self, shard: int, manifest: Manifest, tensors: Mapping[str, torch.Tensor], own: int
    ) -> pb.InitializeResponse:
        call = self._stubs[shard].Initialize(metadata=self._access.metadata)
        messages = _upload_messages(manifest, manifest.fragments_of_shard(shard, len(self.targets)), tensors, own)
        try:
            async for message in messages:
                await call.write(message)
            await call.done_writing()
        except (asyncio.InvalidStateError, grpc.RpcError):
            _log.debug("%s answered before the upload was complete", self.targets[shard])
        return await _called(call, self.targets[shard])

    async def _others_finished(self, manifest: Manifest) -> None:
        """Wait until whoever came first has initialized every shard, and compare models."""
        for shard, target in enumerate(self.targets):

            async def initialized(shard: int = shard, target: str = target) -> Manifest:
                description = await _describe(self._stubs[shard], self._access, target)
                if not description.HasField("manifest"):
                    raise UnavailableError(
                        f"another worker began to initialize the run and did not finish: {target} has no parameters; "
                        "start the servers anew"
                    )
                return Manifest.from_wire(description.manifest)

            theirs = await _persistently(initialized, REACH_S)
            difference = theirs.difference(manifest)
            if difference is not None:
                raise ManifestMismatchError(f"this run has another model: {difference} (here: the run; there: yours)")


async def open_session(address: str, access: Access, reach_s: float = REACH_S) -> Session:
    """Find a run from any one of its shards.

    Args:
        address: "host:port" of a shard.
        access: TLS and token.
        reach_s: Seconds to go on trying while the shard cannot be reached.

    Raises:
        UnavailableError: The shard could not be reached in that time.
        PacelineError: The shard refuses this client; the text says why.
    """
    keep_large_buffers()
    host, _ = split_address(address)
    channel = access.channel(address)
    try:
        stub = pb_grpc.ParameterServerServiceStub(channel)
        description = await _persistently(lambda: _describe(stub, access, address, min(CALL_S, reach_s)), reach_s)
    finally:
        await channel.close()
    targets = [f"{shard.host or host}:{shard.port}" for shard in description.shards]
    if description.shard_index < len(targets):
        targets[description.shard_index] = address  # the way that works, through forwarded ports and relays, too
    return Session(access, description, targets)


def new_worker(worker_id: str) -> pb.Worker:
    """A worker's identity for this start: the incarnation is the wall clock's, so that a later start is higher.

    Where the clock was set back, `Session.join` mends it.
    """
    return pb.Worker(worker_id=worker_id, incarnation=time.time_ns())


async def _describe(
    stub: "pb_grpc.ParameterServerServiceAsyncStub", access: Access, target: str, timeout_s: float = CALL_S
) -> pb.DescribeResponse:
    request = pb.DescribeRequest(protocol_version=PROTOCOL_VERSION)
    description = await _called(stub.Describe(request, timeout=timeout_s, metadata=access.metadata), target)
    if description.protocol_version != PROTOCOL_VERSION:
        older = "client" if description.protocol_version > PROTOCOL_VERSION else "server"
        raise ProtocolVersionError(
            f"{target} speaks protocol version {description.protocol_version} and this client version "
            f"{PROTOCOL_VERSION}: upgrade the {older}"
        )
    if not description.shards:
        raise InvalidInputError(f"{target} does not say where the run's shards are; is it still starting?")
    return description


async def _upload_messages(
    manifest: Manifest, fragments: Sequence[Fragment], tensors: Mapping[str, torch.Tensor], own: int
) -> AsyncIterator[pb.InitializeRequest]:
    start = pb.InitializeStart(protocol_version=PROTOCOL_VERSION, manifest=manifest.to_wire(), initialization_id=own)
    yield pb.InitializeRequest(start=start)
    for fragment in fragments:
        values = await in_codec_thread(_first_values, fragment, tensors)
        announced: pb.InitializeFragment | None = pb.InitializeFragment(
            fragment=fragment.index, payload=values.announced
        )
        for piece in pieces(values.payload):
            yield pb.InitializeRequest(fragment=announced, data=piece)
            announced = None


def _first_values(fragment: Fragment, tensors: Mapping[str, torch.Tensor]) -> Outgoing:
    codec = codecs.codec("fp32")
    return outgoing(codec, codecs.encode(codec, gather(fragment, tensors)))


async def _called(call: Awaitable[_Answer], target: str) -> _Answer:
    try:
        return await call
    except grpc.RpcError as error:
        raise error_of(error, target) from error


async def _persistently(attempt: Callable[[], Awaitable[_Answer]], patience_s: float) -> _Answer:
    """Try again, with back-off, while the failure is one that may pass."""
    deadline_s = time.monotonic() + patience_s
    for delay_s in backoff_s(random.Random()):  # noqa: S311  # not for secrets
        try:
            return await attempt()
        except PacelineError as error:
            if not error.retryable or time.monotonic() + delay_s > deadline_s:
                raise
        await asyncio.sleep(delay_s)
    raise AssertionError("back-off never ends")
