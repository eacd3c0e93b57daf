"""What an actor of a run says of itself, and what all of them need to know of the run."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paceline.channels import TLS

NAMESPACE = "paceline"
"""The Ray namespace of all actors, so that any job of the cluster finds them."""


@dataclass(frozen=True, kw_only=True)
class ActorStatus:
    """What one actor says of itself.

    Attributes:
        index: Which shard or worker it is.
        state: Of a shard "starting", "serving", "refused" (it cannot serve now, and tries again) or "failed"; of a
            worker "training", "waiting" (the run could not be reached; training begins again), "done" or "failed";
            of both "unreachable", while the cluster starts it again or has no room for it.
        node: The Ray node's id; empty if it is unreachable.
        pid: The process that serves or trains; 0 if there is none.
        address: "host:port" of a shard; empty if it has none.
        error: What went wrong last, if something did.
    """

    index: int
    state: str
    node: str = ""
    pid: int = 0
    address: str = ""
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """What the actors of a run know of it.

    Attributes:
        name: Its name on the cluster.
        num_shards: Its shards.
        num_workers: Its workers.
        data_dir: What all nodes see at the same path: the shards' data, and a folder for each worker.
        config: The server's configuration, a mapping of the same form as the file, without what the launcher decides.
        token: The run's token for the workers, if it has one.
        tls: How workers verify the shards.
        log_level: Of the shards.
    """

    name: str
    num_shards: int
    num_workers: int
    data_dir: Path
    config: dict[str, Any] = field(repr=False)
    token: str | None = field(repr=False)
    tls: TLS | str | Path | bool | None
    log_level: str = "WARNING"

    @property
    def mark(self) -> Path:
        """The file by which a node knows that it sees the run's data directory."""
        return self.data_dir / "ray-run.json"

    def actor_name(self, kind: str, index: int | None = None) -> str:
        """The name of one of its actors in the namespace."""
        return f"{self.name}/{kind}" if index is None else f"{self.name}/{kind}-{index}"
