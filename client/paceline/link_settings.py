"""How a worker uses its link: what it asked for itself, and otherwise what the server says. Pure."""

from dataclasses import dataclass

from paceline.connection_count import MAX_CONNECTIONS, ConnectionCount
from paceline.pacing import Pace
from paceline_wire.errors import InvalidInputError
from paceline_wire.v1 import parameter_server_pb2 as pb


@dataclass(frozen=True, kw_only=True)
class LinkSettings:
    """What one worker asked for; None leaves it to the server.

    Attributes:
        connections: TCP connections to each shard, 1 to 8, or "auto": as many as pay.
        max_uplink_mbit: Mbit/s that its pushes may take, to all shards together.
    """

    connections: int | str | None = None
    max_uplink_mbit: float | None = None

    def __post_init__(self) -> None:
        if self.connections not in (None, "auto", *range(1, MAX_CONNECTIONS + 1)):
            raise InvalidInputError(f'connections is {self.connections!r}; it must be "auto" or 1 to {MAX_CONNECTIONS}')
        if self.max_uplink_mbit is not None and not self.max_uplink_mbit > 0:
            raise InvalidInputError(f"max_uplink_mbit is {self.max_uplink_mbit}; it must be positive")

    def connection_count(self, exchange: pb.ExchangeConfiguration, num_fragments: int) -> ConnectionCount:
        """Decides how many connections there are to a shard with so many fragments."""
        if not exchange.HasField("connections"):
            return ConnectionCount(1, 1)  # a shard that knows of one stream would end the first for the second
        asked = exchange.connections if self.connections is None else self.connections
        return ConnectionCount(asked if isinstance(asked, int) and asked else None, num_fragments)

    def pace(self, exchange: pb.ExchangeConfiguration) -> Pace:
        """How fast pushes may leave."""
        told = exchange.max_uplink_mbit if exchange.HasField("max_uplink_mbit") else None
        return Pace(told if self.max_uplink_mbit is None else self.max_uplink_mbit)
