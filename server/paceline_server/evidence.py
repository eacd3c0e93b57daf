"""Keeps pushes that were refused for what they contained, so that somebody can find out what went wrong."""

import asyncio
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import safetensors.torch
import torch

_log = logging.getLogger(__name__)

MOST_KEPT = 16
"""Refused pushes that are kept. Evidence is for people; a worker that never stops must not fill the disk."""

_NAME = re.compile(r"push-([0-9]{8,})\.safetensors")


@dataclass(frozen=True, kw_only=True, eq=False)
class Evidence:
    """A push that was refused for what it contained.

    Attributes:
        worker: Who pushed.
        incarnation: The worker's incarnation.
        fragment: The fragment's index.
        seq: The push.
        problem: Why it was refused, in a sentence.
        codec: Name of the codec in which it is written.
        payload: Its bytes (uint8 [m]).
        norm: Its L2 norm; None if it is not finite.
        median: The median of the fragment's recent norms; None if there are none.
    """

    worker: str
    incarnation: int
    fragment: int
    seq: int
    problem: str
    codec: str
    payload: torch.Tensor
    norm: float | None
    median: float | None


class EvidenceKeeper(Protocol):
    """Something that keeps evidence."""

    async def keep(self, evidence: Evidence) -> None:
        """Keep it if possible. Never raises: the run does not depend on it."""


class NoEvidence:
    """Keeps nothing."""

    async def keep(self, evidence: Evidence) -> None:
        """Forget it."""


class EvidenceDirectory:
    """Keeps the latest pushes as safetensors files, numbered: the payload as "payload", all else as metadata.

    Names come from the count alone, since a worker chooses its own name.

    Args:
        path: The directory; made when there is something to keep.
        most: Files that are kept; older ones are removed.
    """

    def __init__(self, path: Path, most: int = MOST_KEPT) -> None:
        self._path = path
        self._most = most
        self._one_at_a_time = asyncio.Lock()
        self._failed = False

    async def keep(self, evidence: Evidence) -> None:
        """Write a file beside the event loop; a disk that fails is logged once."""
        async with self._one_at_a_time:
            try:
                await asyncio.to_thread(self._write, evidence)
            except OSError as error:
                if not self._failed:
                    _log.error("refused pushes cannot be kept in %s: %s", self._path, error.strerror or error)
                self._failed = True
            else:
                self._failed = False

    def _write(self, evidence: Evidence) -> None:
        self._path.mkdir(parents=True, exist_ok=True)
        numbers = self._numbers()
        name = f"push-{max(numbers, default=0) + 1:08d}.safetensors"
        unfinished = self._path / "unfinished"
        try:
            unfinished.write_bytes(_as_safetensors(evidence))
            unfinished.replace(self._path / name)
        except OSError:
            unfinished.unlink(missing_ok=True)
            raise
        for number in sorted(numbers)[: max(0, len(numbers) + 1 - self._most)]:
            (self._path / f"push-{number:08d}.safetensors").unlink(missing_ok=True)

    def _numbers(self) -> list[int]:
        matches = (_NAME.fullmatch(entry.name) for entry in self._path.iterdir())
        return [int(match[1]) for match in matches if match is not None]


def _as_safetensors(evidence: Evidence) -> bytes:
    metadata = {
        "worker": evidence.worker,
        "incarnation": str(evidence.incarnation),
        "fragment": str(evidence.fragment),
        "seq": str(evidence.seq),
        "problem": evidence.problem,
        "codec": evidence.codec,
    }
    if evidence.norm is not None:
        metadata["norm"] = repr(evidence.norm)
    if evidence.median is not None:
        metadata["median"] = repr(evidence.median)
    written: bytes = safetensors.torch.save({"payload": evidence.payload}, metadata)
    return written
