"""Who a caller is, going by its credential alone, and what its role may call. Pure.

An identity has a name and a role. Both come from a signed token or a client certificate, never from the socket or from
what a message says; what a message says of the worker is checked against them. A credential may stand for several
processes of one site: the credential of `paris` acts as the worker `paris` and as `paris.ANYTHING`, and the authority
gives nobody else a name of that form.
"""

import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from paceline_wire.errors import InvalidInputError, PermissionDeniedError

NAME = re.compile(r"[A-Za-z0-9_-]([A-Za-z0-9._-]{0,62}[A-Za-z0-9_-])?")
"""Names of identities: they travel in certificates, are part of workers' names, and name folders of the authority."""


class Role(enum.Enum):
    """What a credential is for."""

    WORKER = "worker"
    OBSERVER = "observer"
    ADMIN = "admin"


@dataclass(frozen=True, kw_only=True)
class Identity:
    """One caller.

    Attributes:
        name: Its name; None: the credential names nobody, or none is asked for.
        role: What it may do.
        credentials: The ids under which what it showed can be revoked, in lower-case hexadecimal.
        expires_s: When its credential ends, in seconds since 1970; None: never.
    """

    name: str | None
    role: Role
    credentials: frozenset[str] = field(default=frozenset())
    expires_s: float | None = None

    def refuse_method(self, method: str) -> None:
        """Accept a call of a method ("/package.Service/Method") that the role may make.

        Raises:
            PermissionDeniedError: It may not.
        """
        if self.role not in (needed := roles_for(method)):
            names = " or ".join(role.value for role in Role if role in needed)
            raise PermissionDeniedError(
                f"{self} may not call {method.rpartition('/')[2]}: that takes a credential with the role {names}"
            )

    def refuse_worker(self, worker_id: str) -> None:
        """Accept a worker's name that the caller may act under.

        Raises:
            PermissionDeniedError: It is another's.
        """
        own = self.name
        if own is None or self.role is Role.ADMIN or worker_id == own or worker_id.startswith(f"{own}."):
            return
        raise PermissionDeniedError(
            f"{self} may not act as worker {worker_id!r}: leave worker_id out, or use {own!r} or a name that begins "
            f"with '{own}.'"
        )

    def __str__(self) -> str:
        return (
            f"{self.role.value} {self.name!r}" if self.name is not None else f"a caller with the role {self.role.value}"
        )


ANYBODY = Identity(name=None, role=Role.ADMIN)
"""Whoever calls a server that asks for no credentials."""


def check_name(name: str) -> str:
    """Accept the name of an identity, and return it.

    Raises:
        InvalidInputError: It has another form.
    """
    if not NAME.fullmatch(name):
        raise InvalidInputError(
            f"{name!r} cannot be a name: 1 to 64 letters, digits, '_', '-' and, not at the ends, '.' can"
        )
    return name


def roles_for(method: str) -> frozenset[Role]:
    """The roles that may call a method. What is not listed here, methods of the future included, takes an admin."""
    return _ROLES.get(method, frozenset({Role.ADMIN}))


_EVERY_ROLE = frozenset(Role)
_WORKING = frozenset({Role.WORKER, Role.ADMIN})
_TRAINING = "/paceline_wire.v1.ParameterServerService/"
_ROLES: Mapping[str, frozenset[Role]] = {
    **{f"{_TRAINING}{name}": _EVERY_ROLE for name in ("Describe", "Fetch", "Probe")},
    **{f"{_TRAINING}{name}": _WORKING for name in ("Initialize", "Join", "Heartbeat", "Leave", "Exchange")},
    "/paceline_wire.v1.AdminService/Status": _EVERY_ROLE,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": _EVERY_ROLE,
    "/grpc.health.v1.Health/Watch": _EVERY_ROLE,
}
