"""One shard's state, opened to be served: recovered from its directory and kept there, or in memory alone."""

import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paceline_server.arrivals import ArrivalRecorder
from paceline_server.config import ServerConfig
from paceline_server.construction import build_shard
from paceline_server.journal import Configured, Journal, NoJournal
from paceline_server.live_configuration import LiveConfiguration, shaping
from paceline_server.shard import Shard
from paceline_server.storage.directory import ShardDirectory
from paceline_server.storage.durable import DurableJournal
from paceline_server.storage.kept_settings import read_settings, write_settings
from paceline_server.storage.recovery import Recovered, recover
from paceline_server.storage.segment import Sync


class RunClock:
    """Seconds that only grow, and that go on after a restart from where the run was.

    What the journal and the snapshots say of time stays true that way; the time that a server was away does not count.

    Args:
        time_s: Where the run was.
    """

    def __init__(self, time_s: float = 0.0) -> None:
        self._offset_s = time_s - time.monotonic()

    def __call__(self) -> float:
        """Seconds since the run began."""
        return self._offset_s + time.monotonic()


@dataclass(frozen=True, kw_only=True)
class Durable:
    """What a shard has that is kept on disk.

    Attributes:
        directory: Where it is kept.
        journal: What was decided.
        recovered: What was there.
    """

    directory: ShardDirectory
    journal: DurableJournal
    recovered: Recovered


class ShardStore:
    """A shard's state, and where it is kept. Made in an event loop, which recovery blocks: make it before serving.

    Attributes:
        live: The configuration that counts.

    Args:
        config: What the server was started with.
        index: Which of its shards this is.

    Raises:
        ConfigurationError: The outer rule or the file of arrivals cannot be had.
        StorageError: The data directory is in use, damaged, or of another run.
    """

    def __init__(self, config: ServerConfig, index: int) -> None:
        self._held = ExitStack()
        self.live = LiveConfiguration(config)
        self.durable = self._opened(config, index)
        recovered = self.durable.recovered if self.durable is not None else None
        self.shard: Shard = recovered.shard if recovered is not None else build_shard(self.live.config, index)
        self.clock = RunClock(recovered.time_s if recovered is not None else time.monotonic())
        if recovered is not None:
            # Nobody could renew a lease while the server was away.
            now_s = self.clock()
            self.shard.membership.restore(self.shard.membership.state(now_s), now_s)
        kept: Journal = self.durable.journal if self.durable is not None else NoJournal()
        path = config.storage.arrivals
        self.journal = kept if path is None else ArrivalRecorder(kept, path if index == 0 else _numbered(path, index))

    async def begin(self) -> None:
        """Keep the configuration that counts from here on, if it is not the one that counted before.

        Raises:
            StorageError: It cannot be kept.
        """
        if self.durable is None:
            return
        before, now = self.durable.recovered.config, kept_config(self.live.config)
        if before is None or kept_config(before) != now:
            await self.durable.journal.append(Configured(config=now))

    def keep_settings(self) -> None:
        """Keep what operators changed of the configuration, so that it counts after a restart. Blocks.

        Raises:
            StorageError: The disk does not take it.
        """
        if self.durable is not None:
            write_settings(self.durable.directory, self.live.overrides)

    def close(self) -> None:
        """Let go of the directory; the journal is closed by the engine."""
        self._held.close()

    def _opened(self, config: ServerConfig, index: int) -> Durable | None:
        storage = config.storage
        if storage.data_dir is None:
            return None
        directory = ShardDirectory(storage.data_dir, index)
        directory.create()
        try:
            self._held.enter_context(directory.locked())
            self.live = LiveConfiguration(config, read_settings(directory))
            recovered = recover(directory, self.live.config)
            recovered.notes += self.live.notes
            next_number = recovered.newest_record + 1
            journal = DurableJournal(directory, next_number, Sync(storage.sync), storage.sync_interval_s)
        except BaseException:
            self._held.close()
            raise
        return Durable(directory=directory, journal=journal, recovered=recovered)


def _numbered(path: Path, index: int) -> Path:
    return path.with_name(f"{path.name}.{index}")


def kept_config(config: ServerConfig) -> Mapping[str, Any]:
    """What the journal and the snapshots say of a configuration: what shapes the run, and no secrets or local paths."""
    return shaping(config)
