"""One shard as a gRPC server: built from the configuration, started, and drained."""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

import grpc.aio
import torch
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from paceline_server.admin import AdminService
from paceline_server.buffers import MIB, Buffers, shortage, work_bytes
from paceline_server.config import ServerConfig
from paceline_server.construction import run_configuration
from paceline_server.engine import Engine
from paceline_server.evidence import EvidenceDirectory, EvidenceKeeper, NoEvidence
from paceline_server.held import Holdings
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
from paceline_wire.memory import keep_large_buffers
from paceline_wire.transfer import MAX_MESSAGE_BYTES
from paceline_wire.v1 import admin_pb2, admin_pb2_grpc
from paceline_wire.v1 import parameter_server_pb2 as pb

_log = logging.getLogger(__name__)

FAILED = 74
"""Exit code of a shard whose journal failed (EX_IOERR): start it again once the disk works."""

DRAIN_S = 10.0
"""Seconds that streams get to finish what they hold before the process ends."""

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
        # The engine's threads are the parallelism; more threads inside torch would only contend with them.
        torch.set_num_threads(1)
        self._config = config
        self._index = index
        self._store = ShardStore(config, index)
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
        self._snapshotter = Snapshotter(self._engine, durable, config) if durable is not None else None
        if (short := shortage(config)) is not None:
            _log.warning("%s", short)
        self._shards: list[pb.Shard] = []
        self._service = ParameterServerService(
            self._engine, run_configuration(config), config.exchange.fragment_elements, self._shards
        )
        self._gate = Gate(self._credentials, Allowances(config.limits))
        self._server = grpc.aio.server(interceptors=[self._gate], options=list(_CHANNEL_OPTIONS))
        self._health = health.aio.HealthServicer()
        self._watches: list[asyncio.Task[None]] = []
        self._register()

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
        address = f"{host}:{config.port + self._index if config.port else 0}"
        credentials = self._credentials.for_port()
        try:
            if credentials is None:
                return self._server.add_insecure_port(address)
            return self._server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise ConfigurationError(
                f"cannot listen on {address}: the port is taken, or the address is not this machine's"
            ) from error

    async def start(self, shards: list[pb.Shard]) -> None:
        """Serve; shards are the addresses of all shards of the run, in order.

        Raises:
            StorageError: The data directory cannot be written.
        """
        self._shards.extend(shards)
        await self._store.begin()
        await self._server.start()
        self._begin(watch_time(self._engine))
        self._begin(self._gate.watch())
        if self._snapshotter is not None:
            self._begin(self._snapshotter.run())
        await self._health.set("", health_pb2.HealthCheckResponse.SERVING)

    async def drain(self) -> None:
        """Stop: take nothing new, finish and acknowledge what has begun, end the streams."""
        _log.info("stopping: finishing what has begun")
        await self._health.enter_graceful_shutdown()
        # A worker on a dead link would never take its answers; it asks for them again when the shard is back.
        await asyncio.wait({asyncio.create_task(self._service.drain())}, timeout=DRAIN_S)
        await self._server.stop(grace=1.0)
        for watch in self._watches:
            watch.cancel()
        await asyncio.wait(self._watches)
        if self._snapshotter is not None:
            self._snapshotter.close()
        await self._engine.finish()
        self._store.close()

    async def run_until(self, stopping: asyncio.Event) -> int:
        """Serve until the event, or until the shard can't go on; then drain. Returns the exit code.

        A shard whose journal failed is not drained: what it has in memory is no longer what the journal says.
        """
        stop = asyncio.create_task(stopping.wait())
        reasons: set[asyncio.Future[Any]] = {stop, self._engine.failed}
        await asyncio.wait(reasons, return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        if self._engine.failed.done():
            return FAILED
        await self.drain()
        return 0

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        watch = asyncio.create_task(work)
        watch.add_done_callback(_log_failure)
        self._watches.append(watch)

    def _register(self) -> None:
        self._server.add_generic_rpc_handlers((bulk.handlers(self._service),))
        admin_pb2_grpc.add_AdminServiceServicer_to_server(AdminService(self._engine, self._snapshotter), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (
            pb.DESCRIPTOR.services_by_name["ParameterServerService"].full_name,
            admin_pb2.DESCRIPTOR.services_by_name["AdminService"].full_name,
            health.SERVICE_NAME,
            reflection.SERVICE_NAME,
        )
        reflection.enable_server_reflection(names, self._server)


def _evidence_keeper(config: ServerConfig, index: int) -> EvidenceKeeper:
    data_dir = config.storage.data_dir
    return NoEvidence() if data_dir is None else EvidenceDirectory(ShardDirectory(data_dir, index).evidence)


def _log_failure(task: "asyncio.Task[None]") -> None:
    if not task.cancelled() and task.exception() is not None:
        _log.error("a watch over the shard ended", exc_info=task.exception())
