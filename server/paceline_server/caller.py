"""Who makes a call, as far as the transport knows."""

from dataclasses import dataclass
from typing import Any

import grpc.aio

from paceline_server.security.caller import caller


@dataclass(frozen=True, kw_only=True)
class Caller:
    """One caller.

    Attributes:
        identity: Whom its credential names; empty: it showed none that names anybody.
        peer: From where it calls, as gRPC says it, such as "ipv4:192.0.2.7:51234".
    """

    identity: str
    peer: str


def caller_of(context: grpc.aio.ServicerContext[Any, Any]) -> Caller:
    """Who makes a call: the name that its credential stands for, as the gate found it."""
    return Caller(identity=caller().identity.name or "", peer=str(context.peer()))


def host_of(caller: Caller) -> str:
    """The caller's host without its port: what its calls have in common where no credential names it."""
    return caller.peer.rpartition(":")[0] or caller.peer
