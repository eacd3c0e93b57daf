"""Copies of snapshots elsewhere: any place that fsspec has a URL for, such as object storage."""

import re
from pathlib import Path

import fsspec

from paceline_server.storage.snapshot import MANIFEST_FILE
from paceline_wire.errors import ConfigurationError, StorageError


class Mirror:
    """A place with copies of one shard's newest snapshots, laid out as the data directory is.

    Args:
        url: Where the copies of all shards are, such as "s3://bucket/run" or "file:///mnt/backup".
        shard: The shard's index.
        keep: Snapshots that are kept there.

    Raises:
        ConfigurationError: fsspec cannot reach such a place; the text says what is missing.
    """

    def __init__(self, url: str, shard: int, keep: int) -> None:
        self._url = url
        self._keep = keep
        try:
            self._files, root = fsspec.core.url_to_fs(url)
        except Exception as error:  # every backend of fsspec raises errors of its own
            shown = _without_password(url)
            raise ConfigurationError(f"storage.mirror = {shown!r}: {type(error).__name__}: {error}") from error
        self._folder = f"{root}/shard-{shard}/snapshots"

    def put(self, snapshot: Path) -> None:
        """Copy a snapshot, its manifest last, and remove the oldest copies.

        Raises:
            StorageError: The place cannot be reached or written.
        """
        try:
            target = f"{self._folder}/{snapshot.name}"
            self._files.makedirs(target, exist_ok=True)
            names = sorted(path.name for path in snapshot.iterdir() if path.name != MANIFEST_FILE)
            for name in (*names, MANIFEST_FILE):
                self._files.put_file(str(snapshot / name), f"{target}/{name}")
            copies = sorted(str(path).rstrip("/") for path in self._files.ls(self._folder, detail=False))
            for older in copies[: -self._keep]:
                self._files.rm(older, recursive=True)
        except Exception as error:  # every backend of fsspec raises errors of its own
            shown = _without_password(self._url)
            raise StorageError(f"{shown} cannot be written: {type(error).__name__}: {error}") from error


def _without_password(url: str) -> str:
    """A URL as logs may show it."""
    return re.sub(r"(://[^/@:]*):[^/@]*@", r"\1:***@", url)
