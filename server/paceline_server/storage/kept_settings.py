"""What operators changed of a run's configuration, kept in the shard's directory so that it holds after a restart."""

import os
from collections.abc import Mapping
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from paceline_server.live_configuration import CHANGEABLE, Override
from paceline_server.storage.directory import ShardDirectory, sync_directory
from paceline_wire.errors import StorageError

_OVERRIDES = TypeAdapter(dict[str, Override])


def read_settings(directory: ShardDirectory) -> dict[str, Override]:
    """What was kept; empty if nothing was.

    Raises:
        StorageError: The file is damaged or cannot be read.
    """
    path = directory.settings
    try:
        overrides = _OVERRIDES.validate_json(path.read_bytes())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        raise StorageError(
            f"{path} is damaged: remove it to go on with the configured values, and set again what was set"
        ) from error
    return {key: override for key, override in overrides.items() if key in CHANGEABLE}


def write_settings(directory: ShardDirectory, overrides: Mapping[str, Override]) -> None:
    """Keep what counts now in place of what was kept; on the disk when this returns.

    Raises:
        StorageError: The disk does not take it, and what was kept before still is.
    """
    path = directory.settings
    newer = path.with_suffix(".json.new")
    try:
        _write(newer, _OVERRIDES.dump_json(dict(overrides), indent=2))
        newer.replace(path)
        sync_directory(path.parent)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror}") from error


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
