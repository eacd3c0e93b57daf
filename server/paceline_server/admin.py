"""The operator's face of a shard: translates messages to acts, and their outcomes to messages; decides nothing."""

from paceline_server.audit import MOST_ENTRIES
from paceline_server.config import ServerConfig
from paceline_server.engine import Engine
from paceline_server.live_configuration import LiveConfiguration, Value
from paceline_server.operations import Operations
from paceline_server.refusals import Context, with_status
from paceline_server.security.caller import caller
from paceline_server.status import status_of
from paceline_server.storage.snapshotter import Snapshotter, WrittenSnapshot
from paceline_wire.v1 import admin_pb2, admin_pb2_grpc

USUAL_ENTRIES = 100
"""Entries of the audit log that are sent unless the caller says how many."""


class AdminService(admin_pb2_grpc.AdminServiceServicer):
    """Operations that do not belong to training; see admin.proto for what each promises.

    Args:
        engine: The shard in operation.
        live: Its configuration.
        snapshotter: What writes its snapshots; None if its state is in memory.
        operations: What carries out the acts.
    """

    def __init__(
        self, engine: Engine, live: LiveConfiguration, snapshotter: Snapshotter | None, operations: Operations
    ) -> None:
        self._engine = engine
        self._live = live
        self._snapshotter = snapshotter
        self._operations = operations
        self._started_s = engine.clock()

    @with_status
    async def Status(self, request: admin_pb2.StatusRequest, context: Context) -> admin_pb2.StatusResponse:
        """One look at the shard."""
        response = status_of(self._engine, self._snapshotter, self._started_s)
        response.settings.CopyFrom(_settings(self._live.config))
        response.draining = self._operations.draining
        return response

    @with_status
    async def Drain(self, request: admin_pb2.DrainRequest, context: Context) -> admin_pb2.DrainResponse:
        """Finish, and end the process."""
        drained = await self._operations.drain(caller(), discard_state=request.discard_state)
        return admin_pb2.DrainResponse(
            snapshot=None if drained.snapshot is None else _snapshot(drained.snapshot), problem=drained.problem or ""
        )

    @with_status
    async def Evict(self, request: admin_pb2.EvictRequest, context: Context) -> admin_pb2.EvictResponse:
        """Keep a worker out."""
        duration_s = request.duration_ms / 1000 if request.HasField("duration_ms") else None
        was_member, was_evicted = await self._operations.evict(caller(), request.worker_id, request.reason, duration_s)
        return admin_pb2.EvictResponse(was_member=was_member, was_evicted=was_evicted)

    @with_status
    async def Admit(self, request: admin_pb2.AdmitRequest, context: Context) -> admin_pb2.AdmitResponse:
        """Let a worker in again."""
        was_kept_out = await self._operations.admit(caller(), request.worker_id)
        return admin_pb2.AdmitResponse(was_kept_out=was_kept_out)

    @with_status
    async def Snapshot(self, request: admin_pb2.SnapshotRequest, context: Context) -> admin_pb2.SnapshotResponse:
        """Write a snapshot now."""
        return _snapshot(await self._operations.snapshot(caller()))

    @with_status
    async def Configure(self, request: admin_pb2.ConfigureRequest, context: Context) -> admin_pb2.ConfigureResponse:
        """Change what can change."""
        values: dict[str, Value] = {}
        if request.HasField("lr"):
            values["outer.lr"] = request.lr
        if request.HasField("inner_steps"):
            values["exchange.inner_steps"] = request.inner_steps
        if request.HasField("quota"):
            values["schedule.quota"] = request.quota or None
        before, after, is_kept = await self._operations.configure(caller(), values)
        return admin_pb2.ConfigureResponse(before=_settings(before), after=_settings(after), is_kept=is_kept)

    @with_status
    async def Audit(self, request: admin_pb2.AuditRequest, context: Context) -> admin_pb2.AuditResponse:
        """What operators did."""
        count = min(request.num_entries or USUAL_ENTRIES, MOST_ENTRIES)
        return admin_pb2.AuditResponse(
            entries=[
                admin_pb2.AuditEntry(
                    time_us=entry.time_us,
                    who=entry.who,
                    peer=entry.peer,
                    act=entry.act,
                    subject=entry.subject,
                    old=entry.old,
                    new=entry.new,
                    result=entry.result,
                )
                for entry in await self._operations.audit.newest(count)
            ]
        )


def _settings(config: ServerConfig) -> admin_pb2.LiveSettings:
    return admin_pb2.LiveSettings(
        lr=config.outer.lr, inner_steps=config.exchange.inner_steps, quota=config.schedule.quota
    )


def _snapshot(written: WrittenSnapshot) -> admin_pb2.SnapshotResponse:
    return admin_pb2.SnapshotResponse(
        path=str(written.path), num_bytes=written.num_bytes, record=written.number, existed=written.existed
    )
