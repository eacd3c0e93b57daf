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
        allowance: Its limits; None: it has none.
        waits: How long this call has waited for them.
    """

    identity: Identity
    allowance: Allowance | None = None
    waits: Waits = field(default_factory=Waits, compare=False)


_CALLER: ContextVar[Caller] = ContextVar("paceline_caller", default=Caller(identity=ANYBODY))  # noqa: B039  # frozen


def caller() -> Caller:
    """The caller of the call that the running task serves."""
    return _CALLER.get()


def serve_for(found: Caller) -> None:
    """Let `caller` be this one for the rest of the task."""
    _CALLER.set(found)
