"""A shard's status, as an operator asks for it."""

import time

from paceline_server.engine import Engine
from paceline_server.storage.snapshotter import Snapshotter
from paceline_wire.v1 import admin_pb2


def status_of(engine: Engine, snapshotter: Snapshotter | None, started_s: float) -> admin_pb2.StatusResponse:
    """One look at a shard; its settings are not in it.

    Args:
        engine: The shard in operation.
        snapshotter: What writes its snapshots; None if its state is in memory.
        started_s: When the process began, in seconds of the engine's clock.
    """
    shard, now = engine.shard, engine.clock()
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
        uptime_ms=round((now - started_s) * 1000),
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
        evicted=[
            admin_pb2.EvictedWorker(
                worker_id=held.worker,
                reason=held.reason,
                remaining_ms=None if held.remaining_s is None else round(held.remaining_s * 1000),
            )
            for held in membership.evictions.workers(now)
        ],
        quarantined=[
            admin_pb2.QuarantinedWorker(
                worker_id=held.worker, reason=held.reason, remaining_ms=round(held.remaining_s * 1000)
            )
            for held in membership.quarantine.workers(now)
        ],
        warnings=_warnings(engine, snapshotter),
        storage=None if snapshotter is None else _storage_status(snapshotter),
    )


def _warnings(engine: Engine, snapshotter: Snapshotter | None) -> list[str]:
    warnings = [engine.warning]
    if snapshotter is not None:
        warnings += [snapshotter.durable.journal.problem, snapshotter.counters.problem]
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
