"""One shard as a gRPC server: built from the configuration, started, and drained."""

import asyncio
import functools
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import grpc.aio
import torch
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from paceline_server.admin import AdminService
from paceline_server.audit import AuditLog
from paceline_server.buffers import MIB, Buffers, shortage, work_bytes
from paceline_server.config import ServerConfig
from paceline_server.engine import Engine
from paceline_server.evidence import EvidenceDirectory, EvidenceKeeper, NoEvidence
from paceline_server.grpc_log import leave_out_unreadable_messages
from paceline_server.held import Holdings
from paceline_server.operations import Operations
from paceline_server.security.credentials import Credentials
from paceline_server.security.exposure import refuse_exposed
from paceline_server.security.gate import Gate
from paceline_server.security.limits import Allowances
from paceline_server.service import ParameterServerService
from paceline_server.stability_watch import StabilityWatch
from paceline_server.storage.directory import ShardDirectory
from paceline_server.storage.recovery import Recovered
from paceline_server.storage.snapshotter import Snapshotter
from paceline_server.storage.store import ShardStore
from paceline_server.time_watch import watch_time
from paceline_wire import bulk
from paceline_wire.errors import ConfigurationError
from paceline_wire.limits import MAX_MESSAGE_BYTES
from paceline_wire.memory import keep_large_buffers
from paceline_wire.v1 import admin_pb2
from paceline_wire.v1 import parameter_server_pb2 as pb

_log = logging.getLogger(__name__)

FAILED = 74
"""Exit code of a shard whose journal failed (EX_IOERR): start it again once the disk works."""

DRAIN_S = 10.0
"""Seconds that streams get to finish what they hold before the process ends."""

WATCH_AGAIN_S = 1.0
"""Seconds before a watch over the shard that ended by an error begins anew."""

_BIND_ATTEMPTS, _BIND_PAUSE_S = 50, 0.1

_CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # A second server on the port must fail loudly, not share it.
    ("grpc.so_reuseport", 0),
    # A worker whose host died says nothing more; pings find that out in under a minute.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # Workers ping to keep their connection through NATs and load balancers; by default a server takes that as abuse.
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_ping_strikes", 0),
    # Calls of one connection at once; a worker has a handful. The others wait at the caller's end.
    ("grpc.max_concurrent_streams", 128),
)


class ShardServer:
    """One shard, listening on one port.

    Args:
        config: The run's configuration.
        index: Which of its shards this is.

    Raises:
        ConfigurationError: The outer rule or a file of [security] cannot be used, or the run would be open to
            whoever reaches the port.
        StorageError: The data directory is in use, damaged, or of another run.
    """

    def __init__(self, config: ServerConfig, index: int) -> None:
        refuse_exposed(config)
        self._credentials = Credentials(config.security)
        keep_large_buffers()
        leave_out_unreadable_messages()
        # The engine's threads are the parallelism; more threads inside torch would only contend with them.
        torch.set_num_threads(1)
        self._index = index
        self._store = ShardStore(config, index)
        self._config = config = self._store.live.config
        self._engine = Engine(
            self._store.shard,
            self._store.journal,
            self._store.clock,
            send_momentum=config.exchange.own_weight == "predicted",
            watch=StabilityWatch(config),
            buffers=Buffers(config.exchange.buffer_mib * MIB, work_bytes=work_bytes(config)),
            holdings=Holdings(config.exchange.reference_mib * MIB),
            evidence=_evidence_keeper(config, index),
        )
        durable = self._store.durable
        self._snapshotter = Snapshotter(self._engine, durable, self._store.live) if durable is not None else None
        if (short := shortage(config)) is not None:
            _log.warning("%s", short)
        self._shards: list[pb.Shard] = []
        self._service = ParameterServerService(self._engine, self._store.live, self._shards)
        self._drained = asyncio.Event()
        self._operations = Operations(
            self._engine,
            self._store.live,
            self._snapshotter,
            AuditLog(durable.directory.audit if durable is not None else None),
            keep_settings=self._store.keep_settings if durable is not None else None,
            stop_serving=self._stop_serving,
            end=self._drained.set,
        )
        self._admin = AdminService(self._engine, self._store.live, self._snapshotter, self._operations)
        self._gate = Gate(self._credentials, Allowances(config.limits))
        self._health = health.aio.HealthServicer()
        self._watches: list[asyncio.Task[None]] = []
        self._stopping = False
        self._port = config.port_of(index)
        self._server = self._built()

    @property
    def recovered(self) -> Recovered | None:
        """What the data directory had; None without one."""
        return self._store.durable.recovered if self._store.durable is not None else None

    def bind(self) -> int:
        """Take the port and return it.

        Raises:
            ConfigurationError: The address cannot be listened on.
        """
        config = self._config
        host = f"[{config.host}]" if ":" in config.host else config.host
        address = f"{host}:{self._port}"
        credentials = self._credentials.for_port()
        try:
            if credentials is None:
                self._port = self._server.add_insecure_port(address)
            else:
                self._port = self._server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise ConfigurationError(
                f"cannot listen on {address}: the port is taken, or the address is not this machine's"
            ) from error
        return self._port

    async def start(self, shards: list[pb.Shard]) -> None:
        """Serve; shards are the addresses of all shards of the run, in order.

        Raises:
            StorageError: The data directory cannot be written.
        """
        self._shards.extend(shards)
        await self._store.begin()
        await self._server.start()
        self._serving = asyncio.create_task(self._keep_serving())
        self._watches.append(self._serving)
        self._begin(functools.partial(watch_time, self._engine))
        self._begin(self._gate.watch)
        if self._snapshotter is not None:
            self._begin(self._snapshotter.run)
        await self._health.set("", health_pb2.HealthCheckResponse.SERVING)

    def shards_moved(self, shards: list[pb.Shard]) -> None:
        """Tell clients from now on that the shards are at these addresses, in order."""
        self._shards[:] = shards

    async def drain(self) -> None:
        """Stop: take nothing new, finish and acknowledge what has begun, end the streams."""
        self._stopping = True
        await self._stop_serving()
        await self._server.stop(grace=1.0)
        for watch in self._watches:
            watch.cancel()
        await asyncio.wait(self._watches)
        if self._snapshotter is not None:
            self._snapshotter.close()
        await self._engine.finish()
        self._store.close()

    async def run_until(self, stopping: asyncio.Event) -> int:
        """Serve until the event, until an operator drains the shard, or until it can't go on; returns the exit code.

        A shard whose journal failed is not drained: what it has in memory is no longer what the journal says.
        """
        stop = asyncio.create_task(stopping.wait())
        drained = asyncio.create_task(self._drained.wait())
        reasons: set[asyncio.Future[Any]] = {stop, drained, self._engine.failed, self._serving}
        await asyncio.wait(reasons, return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        drained.cancel()
        if self._engine.failed.done():
            return FAILED
        if self._serving.done():
            _log.critical("the shard ends: it cannot listen any more", exc_info=self._serving.exception())
            return FAILED
        await self.drain()
        return 0

    async def _keep_serving(self) -> None:
        """Go on when gRPC's server ends by itself; the streams are cut, and workers open them again.

        gRPC 1.84 and 1.85 end their server for good when somebody calls a method whose name is no UTF-8, whether or not
        the call carries a token. The state is not concerned.

        Raises:
            ConfigurationError: The port cannot be listened on again.
        """
        while True:
            problem = await _end_of(self._server)
            if self._stopping:
                return
            _log.error("gRPC's server ended by itself, and is started again: %s", problem)
            self._server = self._built()
            await self._bind_again()
            await self._server.start()

    async def _bind_again(self) -> None:
        """Take the port that was this shard's; the system may need a moment to let go of it."""
        for _ in range(_BIND_ATTEMPTS - 1):
            try:
                self.bind()
            except ConfigurationError:
                await asyncio.sleep(_BIND_PAUSE_S)
            else:
                return
        self.bind()

    def _built(self) -> grpc.aio.Server:
        server = grpc.aio.server(interceptors=[self._gate], options=list(_CHANNEL_OPTIONS))
        self._register(server)
        return server

    async def _stop_serving(self) -> None:
        """Take nothing new from workers, and answer what has come whole."""
        _log.info("stopping: finishing what has begun")
        told = asyncio.create_task(self._health.enter_graceful_shutdown())
        # A worker on a dead link would never take its answers; it asks for them again when the shard is back. Nor does
        # whoever watches the health and reads nothing.
        await asyncio.wait({told, asyncio.create_task(self._service.drain())}, timeout=DRAIN_S)

    def _begin(self, watch: Callable[[], Awaitable[None]]) -> None:
        self._watches.append(asyncio.create_task(_again_and_again(watch)))

    def _register(self, server: grpc.aio.Server) -> None:
        admin_service = admin_pb2.DESCRIPTOR.services_by_name["AdminService"]
        server.add_generic_rpc_handlers((bulk.handlers(self._service), bulk.handlers(self._admin, admin_service)))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = (
            pb.DESCRIPTOR.services_by_name["ParameterServerService"].full_name,
            admin_pb2.DESCRIPTOR.services_by_name["AdminService"].full_name,
            health.SERVICE_NAME,
            reflection.SERVICE_NAME,
        )
        reflection.enable_server_reflection(names, server)


async def _end_of(server: grpc.aio.Server) -> str:
    """Wait for a server's end; why it came."""
    try:
        await server.wait_for_termination()
    except Exception as error:  # noqa: BLE001  # whatever ended it, serving goes on
        return repr(error)
    return "nobody asked it to"


def _evidence_keeper(config: ServerConfig, index: int) -> EvidenceKeeper:
    data_dir = config.storage.data_dir
    return NoEvidence() if data_dir is None else EvidenceDirectory(ShardDirectory(data_dir, index).evidence)


async def _again_and_again(watch: Callable[[], Awaitable[None]]) -> None:
    """Keep up a watch that never returns, whatever error ends it: without it nobody would be given up, or revoked."""
    while True:
        try:
            await watch()
        except Exception:  # noqa: BLE001  # whatever ended it, the shard needs it
            _log.exception("a watch over the shard ended, and begins anew")
        await asyncio.sleep(WATCH_AGAIN_S)
