"""The operator's face of a shard: its status."""

import time
from typing import Any

import grpc.aio

from paceline_server.engine import Engine
from paceline_server.service import with_status
from paceline_server.storage.snapshotter import Snapshotter
from paceline_wire.v1 import admin_pb2, admin_pb2_grpc


class AdminService(admin_pb2_grpc.AdminServiceServicer):
    """Operations that do not belong to training; see admin.proto.

    Args:
        engine: The shard in operation.
        snapshotter: What writes its snapshots; None if its state is in memory.
    """

    def __init__(self, engine: Engine, snapshotter: Snapshotter | None) -> None:
        self._engine = engine
        self._snapshotter = snapshotter
        self._started_s = engine.clock()

    @with_status
    async def Status(
        self, request: admin_pb2.StatusRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> admin_pb2.StatusResponse:
        """One look at the shard."""
        shard, now = self._engine.shard, self._engine.clock()
        membership, counters = shard.membership, shard.counters
        bins = [fragment.ledger.issuing_bin for fragment in shard.fragments.values()]
        return admin_pb2.StatusResponse(
            shard_index=shard.index,
            initialized=shard.initialized,
            num_fragments=len(shard.fragments),
            num_elements=sum(fragment.plan.num_elements for fragment in shard.fragments.values()),
            min_bin=min(bins, default=0),
            max_bin=max(bins, default=0),
            pushes_applied=counters.pushes_applied,
            pushes_duplicate=counters.pushes_duplicate,
            pushes_refused=counters.pushes_refused,
            pushes_outlying=counters.pushes_outlying,
            bytes_received=counters.bytes_received,
            bytes_sent=counters.bytes_sent,
            bins_late_total=counters.bins_late_total,
            uptime_ms=round((now - self._started_s) * 1000),
            members=[
                admin_pb2.MemberStatus(
                    worker_id=member.worker,
                    worker_index=member.index,
                    inner_step_us=None if member.inner_step_s is None else round(member.inner_step_s * 1e6),
                    inner_steps=membership.inner_steps(member.worker),
                    pushes_applied=shard.pushes_by_worker.get(member.worker, 0),
                    pushes_refused=shard.refused_by_worker.get(member.worker, 0),
                    silent_ms=round(max(now - member.seen_s, 0.0) * 1000),
                    allowed_silence_ms=round(membership.allowed_silence_s(member.worker) * 1000),
                )
                for member in membership.members
            ],
            quarantined=[
                admin_pb2.QuarantinedWorker(
                    worker_id=held.worker, reason=held.reason, remaining_ms=round(held.remaining_s * 1000)
                )
                for held in membership.quarantine.workers(now)
            ],
            warnings=self._warnings(),
            storage=None if self._snapshotter is None else _storage_status(self._snapshotter),
        )

    def _warnings(self) -> list[str]:
        warnings = [self._engine.warning]
        if self._snapshotter is not None:
            warnings += [self._snapshotter.durable.journal.problem, self._snapshotter.counters.problem]
        return [warning for warning in warnings if warning is not None]


def _storage_status(snapshotter: Snapshotter) -> admin_pb2.StorageStatus:
    durable, counters = snapshotter.durable, snapshotter.counters
    age_s = None if counters.finished_s is None else time.monotonic() - counters.finished_s
    return admin_pb2.StorageStatus(
        sync=durable.journal.sync.value,
        newest_record=durable.journal.newest_record,
        journal_bytes=snapshotter.journal_bytes,
        snapshots=counters.written,
        snapshot_age_ms=None if age_s is None else round(age_s * 1000),
        recovered_records=durable.recovered.replayed,
        recovery_ms=round(durable.recovered.took_s * 1000),
    )
