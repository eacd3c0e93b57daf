"""Certificates as a shard sees them: whom a client's stands for, and whether the server's files fit together.

A client certificate that `paceline certs` made names identity and role in a URI among its alternative names,
`paceline:ROLE:NAME`. One of another authority stands for a worker of the name that its common name gives.
"""

import functools
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
from cryptography.x509.oid import NameOID

from paceline_server.config_security import SecurityConfig
from paceline_server.security.identity import NAME, Identity, Role
from paceline_wire.errors import ConfigurationError, UnauthenticatedError

_SCHEME = "paceline"
_PEM_BEGIN = b"-----BEGIN CERTIFICATE-----"
_UNREADABLE = (ValueError, TypeError, UnsupportedAlgorithm)
"""What cryptography raises for keys and certificates that are none, or of a kind that it does not know."""


def identity_uri(name: str, role: Role) -> str:
    """What names an identity in a certificate."""
    return f"{_SCHEME}:{role.value}:{name}"


@functools.lru_cache(maxsize=1024)
def identity_of(pem: bytes) -> Identity:
    """Whom a client's certificate stands for; TLS has verified it.

    Raises:
        UnauthenticatedError: It names nobody, or cannot be read.
    """
    try:
        certificate = x509.load_pem_x509_certificate(pem)
        uris = _uris(certificate)
        # One that says who it is in a way that this version does not know is nobody, not a worker of its common name.
        found = _named_by_uri(uris) if uris else _named_by_common_name(certificate)
    except (*_UNREADABLE, x509.DuplicateExtension, x509.UnsupportedGeneralNameType):
        raise UnauthenticatedError("the client certificate cannot be read; get another one (paceline certs)") from None
    if found is None:
        raise UnauthenticatedError(
            "the client certificate names nobody: it needs an alternative name paceline:ROLE:NAME (paceline certs), or "
            "the worker's name as its common name"
        )
    name, role = found
    ids = {certificate_id(certificate), certificate.fingerprint(hashes.SHA256()).hex()}
    expires_s = certificate.not_valid_after_utc.timestamp()
    return Identity(name=name, role=role, credentials=frozenset(ids), expires_s=expires_s)


def certificate_id(certificate: x509.Certificate) -> str:
    """What a certificate can be revoked by: its serial number in hexadecimal. Its SHA-256 fingerprint counts, too."""
    return f"{certificate.serial_number:x}"


def _uris(certificate: x509.Certificate) -> list[str]:
    """The alternative names of a certificate that are of our scheme."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    return [uri for uri in uris if uri.startswith(f"{_SCHEME}:")]


def _named_by_uri(uris: list[str]) -> tuple[str, Role] | None:
    roles = {role.value: role for role in Role}
    for uri in uris:
        _, role, name = (*uri.split(":", 2), "")[:3]
        if role in roles and NAME.fullmatch(name):
            return name, roles[role]
    return None


def _named_by_common_name(certificate: x509.Certificate) -> tuple[str, Role] | None:
    names = [str(name.value) for name in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    return (names[0], Role.WORKER) if len(names) == 1 and NAME.fullmatch(names[0]) else None


def read_server_certificate(security: SecurityConfig) -> grpc.ServerCertificateConfiguration:
    """What the server shows and whom it trusts, from the configured files, which must fit together.

    Raises:
        ConfigurationError: They do not, or cannot be read; the text never has their content.
    """
    if security.tls_cert is None or security.tls_key is None:
        raise ConfigurationError("security.tls_cert and security.tls_key are needed.")
    chain, key = _read("tls_cert", security.tls_cert), _read("tls_key", security.tls_key)
    authorities = None if security.client_ca is None else _read("client_ca", security.client_ca)
    certificate = _certificates("tls_cert", security.tls_cert, chain)[0]
    if authorities is not None and security.client_ca is not None:
        _certificates("client_ca", security.client_ca, authorities)
    try:
        own = load_pem_private_key(key, password=None).public_key()
    except _UNREADABLE:
        raise ConfigurationError(
            f"security.tls_key = '{security.tls_key}' holds no private key in PEM without a password."
        ) from None
    form = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    try:
        certified = certificate.public_key().public_bytes(*form)
    except _UNREADABLE:
        raise ConfigurationError(
            f"security.tls_cert = '{security.tls_cert}' holds a certificate of a key that cannot be used."
        ) from None
    if own.public_bytes(*form) != certified:
        raise ConfigurationError(
            f"security.tls_key = '{security.tls_key}' is not the key of the certificate in "
            f"security.tls_cert = '{security.tls_cert}'."
        )
    return grpc.ssl_server_certificate_configuration([(key, chain)], root_certificates=authorities)


def _read(name: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"security.{name} = '{path}' cannot be read: {error.strerror}.") from None


def _certificates(name: str, path: Path, content: bytes) -> list[x509.Certificate]:
    try:
        found = x509.load_pem_x509_certificates(content)
    except ValueError:
        raise ConfigurationError(f"security.{name} = '{path}' holds no certificates in PEM.") from None
    if content.count(_PEM_BEGIN) > len(found):
        raise ConfigurationError(f"security.{name} = '{path}' ends within a certificate.")
    return found
