"""What the witnesses wrote down: which pushes they were about to send, and which were acknowledged.

A line is written before a push leaves the client and another one when its answer is there, so whatever the server was
told is told here too, and whatever is told here as acknowledged was acknowledged. One file for each start of a worker.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple


class PushKey(NamedTuple):
    """What identifies a push."""

    worker: str
    incarnation: int
    fragment: int
    seq: int

    def __str__(self) -> str:
        """Name it for a person."""
        return f"push {self.seq} of worker {self.worker} (incarnation {self.incarnation}) to fragment {self.fragment}"


@dataclass(frozen=True, kw_only=True)
class Sent:
    """A push that was about to leave.

    Attributes:
        base_bin: The bin of the values that it was computed from.
        codec: Name of the codec of its payload.
        crc32: CRC-32 of its payload.
        payload: The file that holds its payload, and where in it; None if it was not kept.
    """

    base_bin: int
    codec: str
    crc32: int
    payload: tuple[Path, int, int] | None


@dataclass(frozen=True, kw_only=True)
class Acknowledged:
    """An answer to a push.

    Attributes:
        bins_late: Bins that it was late.
        refusal: Why it was not applied; None if it was.
    """

    bins_late: int
    refusal: str | None


class WitnessLogs:
    """All that the witnesses have said so far.

    Args:
        folder: Where their logs are, "*.jsonl".
    """

    def __init__(self, folder: Path) -> None:
        self.sent: dict[PushKey, Sent] = {}
        self.acknowledged: dict[PushKey, Acknowledged] = {}
        self.newest_incarnation: dict[str, int] = {}
        self.pushes_of: dict[str, int] = {}
        self._folder = folder
        self._read_to: dict[Path, int] = {}

    def refresh(self) -> None:
        """Read what was written since the last time; a line without its end is left for the next time."""
        for path in sorted(self._folder.glob("*.jsonl")):
            for line in self._new_lines(path):
                self._take(json.loads(line))

    @property
    def refused(self) -> dict[PushKey, str]:
        """The pushes that were refused, and why."""
        return {key: answer.refusal for key, answer in self.acknowledged.items() if answer.refusal is not None}

    def _new_lines(self, path: Path) -> Iterator[bytes]:
        with path.open("rb") as log:
            log.seek(self._read_to.get(path, 0))
            found = log.read()
        whole = found[: found.rfind(b"\n") + 1]
        self._read_to[path] = self._read_to.get(path, 0) + len(whole)
        return iter(whole.splitlines())

    def _take(self, line: dict[str, Any]) -> None:
        if line["event"] == "sent":
            payload = (self._folder / line["file"], line["offset"], line["bytes"]) if "file" in line else None
            sent = Sent(base_bin=line["base_bin"], codec=line["codec"], crc32=line["crc32"], payload=payload)
            self.sent[_key(line)] = sent
        elif line["event"] == "acknowledged":
            answer = Acknowledged(bins_late=line["bins_late"], refusal=line["refusal"])
            self.acknowledged[_key(line)] = answer
            worker, incarnation = line["worker"], line["incarnation"]
            self.newest_incarnation[worker] = max(incarnation, self.newest_incarnation.get(worker, 0))
            self.pushes_of[worker] = self.pushes_of.get(worker, 0) + 1


def sent_line(key: PushKey, sent: Sent) -> dict[str, Any]:
    """What is written before a push leaves."""
    kept = {} if sent.payload is None else _kept(*sent.payload)
    rest = {"base_bin": sent.base_bin, "codec": sent.codec, "crc32": sent.crc32}
    return {"event": "sent", **key._asdict(), **rest, **kept}


def acknowledged_line(key: PushKey, answer: Acknowledged) -> dict[str, Any]:
    """What is written when the answer is there."""
    return {
        "event": "acknowledged",
        **key._asdict(),
        "bins_late": answer.bins_late,
        "refusal": answer.refusal,
    }


def _kept(path: Path, offset: int, num_bytes: int) -> dict[str, Any]:
    return {"file": path.name, "offset": offset, "bytes": num_bytes}


def _key(line: dict[str, Any]) -> PushKey:
    return PushKey(line["worker"], line["incarnation"], line["fragment"], line["seq"])
