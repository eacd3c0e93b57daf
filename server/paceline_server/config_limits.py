"""The part of the configuration about what one identity may take of a shard."""

from pydantic import Field

from paceline_server.config_base import Section


class LimitsConfig(Section):
    """What one identity (the name in a signed token or a client certificate) may take of a shard.

    Callers with a plain token, or on a server that asks for none, cannot be told from each other and have no limits.
    """

    streams: int = Field(
        default=128,
        ge=1,
        le=100_000,
        description="Streams that one identity may have open: exchanges, fetches and uploads. A worker has up to "
        "eight.",
    )
    mbit: float = Field(
        default=1000.0,
        ge=0,
        allow_inf_nan=False,
        description="Mbit/s that one identity may send, and as much that it may receive. More waits: its streams are "
        "read and written no faster. 0: no limit.",
    )
    calls_per_s: float = Field(
        default=50.0,
        gt=0,
        allow_inf_nan=False,
        description="Calls that one identity may make a second; more wait for their turn, and beyond 64 waiting ones "
        "they are refused. A worker's heartbeats are one in two seconds.",
    )
    pushes_per_bin: int = Field(
        default=64,
        ge=1,
        le=1_000_000,
        description="Pushes of one identity that a bin of a fragment takes, or the bin's quota if that is more; the "
        "next ones are refused until it has closed.",
    )
