"""Train one torch model from many places: `join` a training loop to a run, or `connect` to it from asyncio."""

import importlib
import os
from typing import TYPE_CHECKING, Any

# DataLoader workers are forked from a process that has joined. gRPC's own fork handlers crash them; without these they
# are safe, since they leave gRPC alone. gRPC reads this when it is first imported.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

if TYPE_CHECKING:
    from paceline.channels import TLS
    from paceline.client import Base, Client, connect
    from paceline.run import Run, Stats, join
    from paceline_wire.errors import PacelineError

__all__ = ["TLS", "Base", "Client", "PacelineError", "Run", "Stats", "connect", "join"]

_HOMES = {
    "TLS": "paceline.channels",
    "Base": "paceline.client",
    "Client": "paceline.client",
    "connect": "paceline.client",
    "Run": "paceline.run",
    "Stats": "paceline.run",
    "join": "paceline.run",
    "PacelineError": "paceline_wire.errors",
}


def __getattr__(name: str) -> Any:
    """Import a public name at its first use: torch takes seconds, which `paceline --help` need not wait for."""
    if name not in _HOMES:
        raise AttributeError(f"module 'paceline' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
