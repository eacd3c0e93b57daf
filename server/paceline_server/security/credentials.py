"""The credentials that a shard has and asks for: its TLS files, tokens, and revocations, as they are now.

What is configured is asked for: with client_ca a certificate, with tokens or a token key a token, with both of them
both. A call's identity is the signed token's, else the certificate's; the two must name the same one.
"""

import hmac
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from paceline_server.config_security import SecurityConfig
from paceline_server.security.certificates import identity_of, read_server_certificate
from paceline_server.security.identity import ANYBODY, Identity, Role
from paceline_server.security.revocations import is_revoked, read_revoked
from paceline_server.security.tokens import read_public_keys, verify
from paceline_server.security.watched import WatchedFiles
from paceline_wire.errors import ConfigurationError, UnauthenticatedError

_BEARER = "Bearer "


class Credentials:
    """What a shard shows and asks for.

    Args:
        security: The configuration.
        clock: Seconds since 1970.

    Raises:
        ConfigurationError: A file cannot be read, or holds something else than it should.
    """

    def __init__(self, security: SecurityConfig, clock: Callable[[], float] = time.time) -> None:
        self._security = security
        self._clock = clock
        self._certificate = _watched([security.tls_cert, security.tls_key, security.client_ca], self._read_certificate)
        self._tokens = _watched([security.token_file], security.accepted_tokens)
        self._keys: WatchedFiles[tuple[Ed25519PublicKey, ...]] = _watched([security.token_key], self._read_keys)
        self._has_revoked = False
        self._revoked: WatchedFiles[frozenset[str]] = _watched([security.revoked], self._read_revoked)
        self._shown = self._certificate.content

    def for_port(self) -> grpc.ServerCredentials | None:
        """TLS for a port, with the newest certificate for every new connection; None where TLS is off."""
        if self._shown is None:
            return None
        needs_certificate = self._security.client_ca is not None
        make: Any = grpc.dynamic_ssl_server_credentials
        credentials: grpc.ServerCredentials = make(self._shown, self._newer_certificate, needs_certificate)
        return credentials

    def look(self) -> bool:
        """Read again what has changed on the disk; returns whether anything did. Blocks on the disk."""
        changed = [each.look() for each in (self._certificate, self._tokens, self._keys, self._revoked)]
        return any(changed)

    def identify(self, authorization: str, certificate: bytes | None) -> Identity:
        """Who a caller is.

        Args:
            authorization: The metadata `authorization` of its call; "": none.
            certificate: Its certificate in PEM, which TLS has verified; None: none.

        Raises:
            UnauthenticatedError: It does not show what it should, or that is wrong, has expired or was revoked.
        """
        found = [
            *([self._identity_of_token(authorization)] if self._security.asks_for_tokens else []),
            *([self._identity_of_certificate(certificate)] if self._security.client_ca is not None else []),
        ]
        named = [identity for identity in found if identity.name is not None]
        if len({(identity.name, identity.role) for identity in named}) > 1:
            raise UnauthenticatedError(f"the token is of {named[0]}, and the certificate of {named[1]}")
        identity = (named or found or [ANYBODY])[0]
        ids = frozenset().union(*(each.credentials for each in found))
        if is_revoked(ids, self._revoked.content):
            raise UnauthenticatedError(f"the credential of {identity} was revoked; ask whoever runs this server")
        ends = [each.expires_s for each in found if each.expires_s is not None]
        if ends and min(ends) <= self._clock():
            raise UnauthenticatedError(
                f"the credential of {identity} has expired; get a new one (paceline certs renew)"
            )
        return Identity(name=identity.name, role=identity.role, credentials=ids, expires_s=min(ends, default=None))

    def has_expired(self, identity: Identity) -> bool:
        """Whether a caller's credential has ended since it was looked at."""
        return identity.expires_s is not None and identity.expires_s <= self._clock()

    def _identity_of_token(self, authorization: str) -> Identity:
        # Every plain token is compared, so that the time taken tells nothing about them.
        given = authorization.encode(errors="replace")
        matches = [hmac.compare_digest(given, f"{_BEARER}{token}".encode()) for token in self._tokens.content]
        if any(matches):
            return Identity(name=None, role=Role.WORKER)
        return verify(authorization.removeprefix(_BEARER), self._keys.content)

    @staticmethod
    def _identity_of_certificate(certificate: bytes | None) -> Identity:
        if certificate is None:
            raise UnauthenticatedError("the call came without a client certificate")
        return identity_of(certificate)

    def _newer_certificate(self) -> grpc.ServerCertificateConfiguration | None:
        """Called by gRPC, in a thread of its own, before each handshake; None: nothing has changed."""
        newest: grpc.ServerCertificateConfiguration | None = self._certificate.content
        if newest is self._shown:
            return None
        self._shown = newest
        return newest

    def _read_certificate(self) -> grpc.ServerCertificateConfiguration | None:
        return read_server_certificate(self._security) if self._security.has_tls else None

    def _read_keys(self) -> tuple[Ed25519PublicKey, ...]:
        return read_public_keys(self._security.token_key) if self._security.token_key is not None else ()

    def _read_revoked(self) -> frozenset[str]:
        path = self._security.revoked
        if path is None:
            return frozenset()
        revoked = read_revoked(path)
        if self._has_revoked and not revoked and not path.stat().st_size:
            # As a copy that has just begun, or met a full disk, leaves it.
            raise ConfigurationError(
                f"security.revoked = '{path}' has become empty, which would let in all that were revoked; if it is "
                "meant so, write a line that begins with #."
            )
        self._has_revoked = bool(revoked)
        return revoked


def _watched(paths: list[Path | None], read: Callable[[], Any]) -> WatchedFiles[Any]:
    return WatchedFiles([path for path in paths if path is not None], read)
