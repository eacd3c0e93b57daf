"""Train one torch model from many places: `join` a training loop to a run, or `connect` to it from asyncio."""

from paceline.channels import TLS
from paceline.client import Base, Client, connect
from paceline.run import Run, Stats, join
from paceline_wire.errors import PacelineError

__all__ = ["TLS", "Base", "Client", "PacelineError", "Run", "Stats", "connect", "join"]
