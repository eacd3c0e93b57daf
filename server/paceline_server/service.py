"""The gRPC face of a shard: translates messages to calls of the engine, and errors to statuses; decides nothing."""

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import TypeVar

import grpc.aio
from google.protobuf.message import DecodeError

from paceline_server.buffers import STALLED_S
from paceline_server.engine import Engine
from paceline_server.exchange import ExchangeStream
from paceline_server.fetch import send_fragments
from paceline_server.live_configuration import LiveConfiguration
from paceline_server.probe import Probes, ProbeStream
from paceline_server.refusals import Context, abort, readable, unreadable, with_status
from paceline_server.security.caller import caller
from paceline_server.streams import MAX_STREAMS
from paceline_wire import OLDEST_PROTOCOL_VERSION, PROTOCOL_VERSION, codecs
from paceline_wire.bulk import Bulk
from paceline_wire.codecs import DIFFERENCE_CODECS
from paceline_wire.codecs.base import Codec
from paceline_wire.errors import InvalidInputError, PacelineError, ProtocolVersionError, UnavailableError
from paceline_wire.transfer import Receiver
from paceline_wire.v1 import parameter_server_pb2 as pb
from paceline_wire.v1 import parameter_server_pb2_grpc as pb_grpc

_log = logging.getLogger(__name__)
_Message = TypeVar("_Message")

WHOLE_CODECS = ("fp32", "bf16")
"""Names of the codecs in which values are sent as they are."""


class ParameterServerService(pb_grpc.ParameterServerServiceServicer):
    """The protocol's methods; see parameter_server.proto for what each promises.

    Args:
        engine: The shard in operation.
        live: The configuration that counts.
        shards: All shards, once their addresses are known.
    """

    def __init__(self, engine: Engine, live: LiveConfiguration, shards: list[pb.Shard]) -> None:
        self._engine = engine
        self._live = live
        self._fragment_elements = live.config.exchange.fragment_elements
        self._shards = shards
        self._probes = Probes()
        self._draining = False

    async def drain(self) -> None:
        """End the exchange streams, each after it has answered the pushes that it has received whole."""
        self._draining = True
        await self._engine.streams.drain()

    @with_status
    async def Describe(self, request: pb.DescribeRequest, context: Context) -> pb.DescribeResponse:
        """Tell what this shard hosts."""
        if request.protocol_version:
            _require_version(request.protocol_version)
        shard, calling = self._engine.shard, caller()
        return pb.DescribeResponse(
            protocol_version=PROTOCOL_VERSION,
            oldest_protocol_version=OLDEST_PROTOCOL_VERSION,
            configuration=self._live.for_workers,
            manifest=shard.manifest.wire if shard.manifest is not None and shard.initialized else None,
            shards=self._shards,
            shard_index=shard.index,
            fragment_elements=self._fragment_elements,
            active_workers=len(shard.membership.active),
            initialization_id=shard.initialization_id if shard.initialized else None,
            initializing=self._engine.initializing.locked(),
            caller=calling.identity.name,
            caller_mbit=calling.allowance.mbit if calling.allowance is not None else None,
        )

    @with_status
    async def Initialize(
        self, request: AsyncIterator[Bulk[pb.InitializeRequest]], context: Context
    ) -> pb.InitializeResponse:
        """Take the first parameters, or say that they are here already."""
        async for message, _ in request:
            if not message.HasField("start"):
                raise InvalidInputError("an upload begins with `start`")
            _require_version(message.start.protocol_version)
            manifest = await self._engine.read_manifest(message.start.manifest)
            if manifest.fragment_elements != self._fragment_elements:
                raise InvalidInputError(
                    f"the manifest cuts fragments of {manifest.fragment_elements} elements; "
                    f"this run's are {self._fragment_elements}: take them from Describe"
                )
            replaces = message.start.replaces if message.start.HasField("replaces") else None
            async with self._engine.initializing:
                taken = await self._engine.begin_initialization(manifest, message.start.initialization_id, replaces)
                if taken:
                    await self._take_fragments(_while_they_come(request))
            return pb.InitializeResponse(
                already_initialized=not taken, initialization_id=self._engine.shard.initialization_id
            )
        raise InvalidInputError("the upload was empty; it begins with `start`")

    async def _take_fragments(self, messages: AsyncIterator[Bulk[pb.InitializeRequest]]) -> None:
        receiver, announced, room = Receiver(), None, None
        try:
            async for message, data in messages:
                if message.HasField("fragment"):
                    announced = message.fragment
                    if announced.payload.codec != pb.CODEC_FP32:
                        raise InvalidInputError(f"fragment {announced.fragment}: first parameters are sent in fp32")
                    num_elements = self._engine.shard.plan_of(announced.fragment).num_elements
                    num_bytes = receiver.required_bytes(announced.payload, num_elements)
                    room = await self._engine.buffers.incoming.reserve(num_bytes)
                    receiver.begin(announced.payload, num_elements)
                elif message.HasField("start"):
                    raise InvalidInputError("an upload is started once; `start` came again")
                assembly = receiver.add(data)
                if assembly is not None and announced is not None and room is not None:
                    await self._engine.initialize_fragment(announced.fragment, assembly.codec, assembly.payload())
                    room.release()
                del assembly  # or its payload would stay while the next one is received
        finally:
            if room is not None:
                room.release()
        if not self._engine.shard.initialized:
            raise InvalidInputError("the upload ended before every fragment of this shard had come; begin it again")
        _log.info("initialized with %d fragments", len(self._engine.shard.fragments))

    @with_status
    async def Join(self, request: pb.JoinRequest, context: Context) -> pb.JoinResponse:
        """Make the caller an active worker."""
        _require_version(request.protocol_version)
        caller().identity.refuse_worker(request.worker.worker_id)
        membership = self._engine.shard.membership
        known = {member.worker: member.incarnation for member in membership.members}
        member, reason = membership.join(self._engine.clock(), request.worker.worker_id, request.worker.incarnation)
        # A new incarnation is kept too: after a restart, the one that it superseded must be refused as before.
        if known.get(member.worker) != member.incarnation:
            _log.info("%s", reason)
            await self._engine.membership_changed()
        return pb.JoinResponse(
            worker_index=member.index,
            lease_ms=round(membership.lease_s * 1000),
            heartbeat_ms=max(1, round(membership.heartbeat_s * 1000)),
            inner_steps=membership.inner_steps(member.worker),
            active_workers=len(membership.active),
            progress=await self._progress(request),
        )

    async def _progress(self, request: pb.JoinRequest) -> list[pb.FragmentProgress]:
        if not request.HasField("previous_incarnation"):
            return []
        progress = await self._engine.take_over(
            request.worker.worker_id, request.previous_incarnation, request.worker.incarnation
        )
        return [
            pb.FragmentProgress(fragment=each.fragment, seq=each.seq, refused=each.refused, superseded=each.superseded)
            for each in progress
        ]

    @with_status
    async def Heartbeat(self, request: pb.HeartbeatRequest, context: Context) -> pb.HeartbeatResponse:
        """Renew a lease."""
        membership = self._engine.shard.membership
        worker = request.worker.worker_id
        caller().identity.refuse_worker(worker)
        membership.heartbeat(self._engine.clock(), worker, request.worker.incarnation)
        if request.HasField("inner_step_us"):
            membership.report_speed(worker, request.inner_step_us / 1e6)
        return pb.HeartbeatResponse(inner_steps=membership.inner_steps(worker), active_workers=len(membership.active))

    @with_status
    async def Leave(self, request: pb.LeaveRequest, context: Context) -> pb.LeaveResponse:
        """End a membership."""
        now_s, worker = self._engine.clock(), request.worker
        caller().identity.refuse_worker(worker.worker_id)
        reason = self._engine.shard.membership.leave(now_s, worker.worker_id, worker.incarnation)
        _log.info("%s", reason)
        await self._engine.membership_changed()
        return pb.LeaveResponse()

    async def Fetch(  # type: ignore[override]  # grpc.aio also takes a coroutine that writes to the context
        self, request: pb.FetchRequest, context: Context
    ) -> None:
        """Send current values, fragment by fragment."""
        try:
            codec = self._whole(readable(request).codec)
            self._engine.shard.refuse_uninitialized()
            fragments = request.fragments or sorted(self._engine.shard.fragments)
            with self._engine.buffers.stream():
                await send_fragments(self._engine, fragments, codec, context.write)
        except PacelineError as error:
            await abort(context, error)
        except DecodeError as error:
            await abort(context, unreadable(error))
        except grpc.aio.InternalError:
            _log.debug("a caller hung up in the middle of a message")

    async def Exchange(  # type: ignore[override]  # grpc.aio also takes a coroutine that writes to the context
        self, request: AsyncIterator[Bulk[pb.ExchangeRequest]], context: Context
    ) -> None:
        """Serve one worker's pushes and updates."""
        try:
            stream = await self._open(request, context)
            # Now: an error may end the stream while its first message, which would bring them, is being written.
            await context.send_initial_metadata(())
            self._engine.streams.add(stream)
            try:
                with self._engine.buffers.stream():
                    await stream.run(request)
            finally:
                self._engine.streams.discard(stream)
        except PacelineError as error:
            await abort(context, error)
        except DecodeError as error:
            await abort(context, unreadable(error))
        except grpc.aio.InternalError:
            _log.debug("a caller hung up in the middle of a message")

    async def Probe(  # type: ignore[override]  # grpc.aio also takes a coroutine that writes to the context
        self, request: AsyncIterator[Bulk[pb.ProbeRequest]], context: Context
    ) -> None:
        """Let a caller measure the way to this shard."""
        who = caller()
        try:
            with self._probes.begin():
                # Now: see Exchange.
                await context.send_initial_metadata(())
                await ProbeStream(self._probes, who.name or who.host, context.write, who.waits).run(request)
        except PacelineError as error:
            await abort(context, error)
        except DecodeError as error:
            await abort(context, unreadable(error))
        except grpc.aio.InternalError:
            _log.debug("a caller hung up in the middle of a message")

    async def _open(self, messages: AsyncIterator[Bulk[pb.ExchangeRequest]], context: Context) -> ExchangeStream:
        async for message, _ in messages:
            if not message.HasField("open"):
                break
            if self._draining:
                raise UnavailableError("the server is stopping")
            if message.open.stream >= MAX_STREAMS:
                raise InvalidInputError(
                    f"stream {message.open.stream} was opened; a worker has at most {MAX_STREAMS}, counted from 0"
                )
            worker = message.open.worker
            caller().identity.refuse_worker(worker.worker_id)
            self._engine.shard.refuse_uninitialized()
            self._engine.refuse_when_full()
            self._engine.shard.membership.require(self._engine.clock(), worker.worker_id, worker.incarnation)
            return ExchangeStream(
                self._engine,
                worker,
                self._downlink(message.open.downlink),
                context.write,
                index=message.open.stream,
                report_received=message.open.report_received,
                allowance=caller().allowance,
            )
        raise InvalidInputError("an exchange stream begins with `open`")

    def _downlink(self, asked: pb.Codec.ValueType) -> Codec:
        codec = codecs.codec_of_wire(asked or self._live.for_workers.exchange.downlink)
        if codec.name not in (*WHOLE_CODECS, *DIFFERENCE_CODECS):
            names = ", ".join((*WHOLE_CODECS, *DIFFERENCE_CODECS))
            raise InvalidInputError(f"updates cannot be written in {codec.name}; this version sends {names}")
        return codec

    def _whole(self, asked: pb.Codec.ValueType) -> Codec:
        if not asked:
            return codecs.whole_codec(self._downlink(asked))
        codec = codecs.codec_of_wire(asked)
        if codec.name not in WHOLE_CODECS:
            raise InvalidInputError(
                f"values cannot be fetched in {codec.name}, which is for differences; fetch {' or '.join(WHOLE_CODECS)}"
            )
        return codec


async def _while_they_come(messages: AsyncIterator[_Message]) -> AsyncIterator[_Message]:
    """The messages of an upload, which keeps others from beginning one: it ends if it does not move.

    Raises:
        UnavailableError: No message came for STALLED_S.
    """
    while True:
        try:
            async with asyncio.timeout(STALLED_S):
                message = await anext(messages)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise UnavailableError(
                f"the upload was ended: no message of it came for {STALLED_S:g} s, and nobody else could begin one; "
                "begin it again"
            ) from None
        yield message


def _require_version(version: int) -> None:
    if OLDEST_PROTOCOL_VERSION <= version <= PROTOCOL_VERSION:
        return
    several = f"versions {OLDEST_PROTOCOL_VERSION} to" if OLDEST_PROTOCOL_VERSION < PROTOCOL_VERSION else "version"
    raise ProtocolVersionError(
        f"the peer speaks protocol version {version} and this server {several} {PROTOCOL_VERSION}: "
        f"upgrade the {'server' if version > PROTOCOL_VERSION else 'worker'}"
    )
