"""All targets by name."""

from fuzz.target import Target
from fuzz.targets.numbers import CodecTarget, DeltaTarget
from fuzz.targets.wire import BulkTarget, ManifestTarget, TransferTarget

TARGETS: dict[str, type[Target]] = {
    target.name: target for target in (BulkTarget, ManifestTarget, TransferTarget, CodecTarget, DeltaTarget)
}
