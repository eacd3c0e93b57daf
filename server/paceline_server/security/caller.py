"""The caller of the call at hand, as the gate found it: for the methods that have to know."""

from contextvars import ContextVar
from dataclasses import dataclass, field

from paceline_server.security.identity import ANYBODY, Identity
from paceline_server.security.limits import Allowance, Waits


@dataclass(frozen=True, kw_only=True)
class Caller:
    """Who calls, and what is left to it.

    Attributes:
        identity: Who it is.
        peer: From where it calls, as gRPC says it, such as "ipv4:192.0.2.7:51234"; empty: not known.
        allowance: Its limits; None: it has none.
        waits: How long this call has waited for them.
    """

    identity: Identity
    peer: str = ""
    allowance: Allowance | None = None
    waits: Waits = field(default_factory=Waits, compare=False)

    @property
    def name(self) -> str:
        """Whom its credential names; empty: it showed none that names anybody."""
        return self.identity.name or ""

    @property
    def host(self) -> str:
        """Its host without the port: what its calls have in common where no credential names it."""
        return self.peer.rpartition(":")[0] or self.peer


_CALLER: ContextVar[Caller] = ContextVar("paceline_caller", default=Caller(identity=ANYBODY))  # noqa: B039  # frozen


def caller() -> Caller:
    """The caller of the call that the running task serves."""
    return _CALLER.get()


def serve_for(found: Caller) -> None:
    """Let `caller` be this one for the rest of the task."""
    _CALLER.set(found)
