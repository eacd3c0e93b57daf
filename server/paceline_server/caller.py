"""Who makes a call, as far as the transport knows."""

from dataclasses import dataclass
from typing import Any

import grpc.aio


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
    """Who makes a call: the name in its verified certificate, where one was asked for."""
    names = list(context.auth_context().get("x509_common_name") or ())
    identity = names[0].decode(errors="replace") if names else ""
    return Caller(identity=identity, peer=str(context.peer()))


def host_of(caller: Caller) -> str:
    """The caller's host without its port: what its calls have in common where no credential names it."""
    return caller.peer.rpartition(":")[0] or caller.peer
