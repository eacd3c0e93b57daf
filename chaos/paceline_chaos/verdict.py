"""Compares what the witnesses say with what the journal has and what recovery makes of it, and says what was lost."""

from dataclasses import dataclass, field
from pathlib import Path

from paceline_chaos.replica import Kept, Replica, describe_distance
from paceline_chaos.testimony import PushKey, WitnessLogs
from paceline_server.storage.directory import shard_directories
from paceline_server.storage.recovery import read_records, recover
from paceline_wire.errors import StorageError

MOST_SENTENCES = 20
"""Sentences of one kind that are kept: the first ones tell what is wrong."""


@dataclass(kw_only=True)
class Verdict:
    """What a look at a stopped server's directory found.

    Attributes:
        sent: Pushes that witnesses were about to send.
        acknowledged: Those of them that were acknowledged and not refused.
        refused: Those that were refused.
        found: Acknowledged pushes that are in the journal, with the same payload.
        in_flight: Pushes in the journal that were not acknowledged.
        records: Records in the journals.
        distance: How far the state is from the closed form, relative; None if the run has none.
        lost: What is wrong, in sentences; empty if everything held.
    """

    sent: int = 0
    acknowledged: int = 0
    refused: int = 0
    found: int = 0
    in_flight: int = 0
    records: int = 0
    distance: float | None = None
    lost: list[str] = field(default_factory=list)


class Verifier:
    """Looks at a data directory whenever its server is down; each time only at what is new.

    Args:
        data_dir: The data directory.
        testimony: What the witnesses say.
    """

    def __init__(self, data_dir: Path, testimony: WitnessLogs) -> None:
        self.looks = 0
        self._data_dir = data_dir
        self._testimony = testimony
        self._replicas: dict[int, Replica] = {}

    def look(self) -> Verdict:
        """Compare everything. The server must be down, and its directories free."""
        self.looks += 1
        recovered = []
        try:
            for directory in shard_directories(self._data_dir):
                with directory.locked():
                    replica = self._replicas.setdefault(directory.index, Replica(directory.index))
                    for number, record in read_records(directory, replica.newest_record + 1):
                        replica.take(number, record)
                    found = recover(directory)
                    recovered += replica.differences(found.shard, found.newest_record)
        except StorageError as error:
            return Verdict(lost=[f"the data directory cannot be read: {error}"])
        # The journal is still while the server is down, so what the witnesses say now includes all that it answered.
        self._testimony.refresh()
        verdict = self._compare()
        verdict.lost += recovered
        return verdict

    def _compare(self) -> Verdict:
        kept = {key: push for replica in self._replicas.values() for key, push in replica.kept.items()}
        acknowledged = self._testimony.acknowledged.keys() - self._testimony.refused.keys()
        verdict = Verdict(
            sent=len(self._testimony.sent),
            acknowledged=len(acknowledged),
            refused=len(self._testimony.refused),
            found=sum(self._agrees(key, kept.get(key)) for key in acknowledged),
            in_flight=len(kept.keys() - self._testimony.acknowledged.keys()),
            records=sum(replica.newest_record for replica in self._replicas.values()),
        )
        for replica in self._replicas.values():
            verdict.lost += replica.problems[:MOST_SENTENCES]
            distance = replica.distance_from_closed_form()
            if distance is not None:
                verdict.distance = max(distance, verdict.distance or 0.0)
        if verdict.distance is not None and (far := describe_distance(verdict.distance)) is not None:
            verdict.lost.append(far)
        verdict.lost += self._lost_pushes(acknowledged, kept)[:MOST_SENTENCES]
        verdict.lost += self._unsent_pushes(kept)[:MOST_SENTENCES]
        verdict.lost += self._unacknowledged_pushes(kept)[:MOST_SENTENCES]
        return verdict

    def _agrees(self, key: PushKey, kept: Kept | None) -> bool:
        sent = self._testimony.sent.get(key)
        return kept is not None and sent is not None and (kept.crc32, kept.base_bin) == (sent.crc32, sent.base_bin)

    def _lost_pushes(self, acknowledged: set[PushKey], kept: dict[PushKey, Kept]) -> list[str]:
        missing = sorted(acknowledged - kept.keys())
        found = [f"{key} was acknowledged and is not in the journal" for key in missing]
        unapplied = sorted(key for key in acknowledged & kept.keys() if kept[key].crc32 is None)
        found += [f"{key} was acknowledged as applied, and the journal applies nothing of it" for key in unapplied]
        refused = sorted(key for key in self._testimony.refused if key in kept and kept[key].crc32 is not None)
        return found + [f"{key} was refused, and the journal applies it" for key in refused]

    def _unsent_pushes(self, kept: dict[PushKey, Kept]) -> list[str]:
        found = []
        for key, push in kept.items():
            sent = self._testimony.sent.get(key)
            if sent is None:
                found.append(f"{key} is in the journal, and no worker sent it")
            elif push.crc32 is not None and push.crc32 != sent.crc32:
                found.append(f"{key} is in the journal with another payload than was sent (record {push.record})")
            elif push.base_bin != sent.base_bin:
                found.append(f"{key} is in the journal with bin {push.base_bin}; {sent.base_bin} was sent")
        return found

    def _unacknowledged_pushes(self, kept: dict[PushKey, Kept]) -> list[str]:
        """Where the next push was sent, the one before had been answered: only the newest can be in flight."""
        newest: dict[tuple[str, int, int], int] = {}
        for key in self._testimony.sent:
            newest[key[:3]] = max(key.seq, newest.get(key[:3], 0))
        strays = kept.keys() - self._testimony.acknowledged.keys()
        return [
            f"{key} is in the journal and was never acknowledged, though a later push was sent"
            for key in sorted(strays)
            if key in self._testimony.sent and key.seq < newest[key[:3]]
        ]
