"""All targets by name."""

from fuzz.target import Target
from fuzz.targets.calls import CallsTarget
from fuzz.targets.directories import RecordTarget, RecoveryTarget, SegmentTarget, SettingsTarget, SnapshotTarget
from fuzz.targets.files import ArrivalsTarget, AuditTarget, ConfigTarget, TokensTarget, WorkerStateTarget
from fuzz.targets.numbers import CodecTarget, DeltaTarget
from fuzz.targets.sockets import GrpcTarget, Http2Target
from fuzz.targets.wire import BulkTarget, ManifestTarget, TransferTarget

TARGETS: dict[str, type[Target]] = {
    target.name: target
    for target in (
        *(BulkTarget, ManifestTarget, TransferTarget, CodecTarget, DeltaTarget),
        *(ConfigTarget, TokensTarget, ArrivalsTarget, AuditTarget, WorkerStateTarget),
        *(RecordTarget, SegmentTarget, SettingsTarget, SnapshotTarget, RecoveryTarget),
        *(CallsTarget, GrpcTarget, Http2Target),
    )
}
