"""What the authority gives out: the names that it may have, how long it lasts, and certificates, made and signed."""

import ipaddress
import secrets
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from paceline_server.config_base import check_host
from paceline_server.security.certificates import identity_uri
from paceline_server.security.identity import Role, check_name
from paceline_wire.errors import InvalidInputError

CA_DAYS = 3650
"""How long the authority lasts, and so the longest that anything that it gives out may."""


def authority_certificate(key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    """The certificate of an authority with a new key."""
    name = _common_name("paceline run")
    return (
        _builder(name, name, key.public_key(), secrets.randbits(126), CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(sign_certificates=True), critical=True)
        .sign(key, hashes.SHA256())
    )


def server_certificate(
    ca: x509.Certificate,
    ca_key: ec.EllipticCurvePrivateKey,
    key: ec.EllipticCurvePrivateKey,
    names: Iterable[str],
    days: float,
) -> x509.Certificate:
    """A certificate for a server's key, with the names and addresses at which it is reached."""
    general = [_general_name(name) for name in names]
    return _signed(ca, ca_key, key, "paceline server", general, days, ExtendedKeyUsageOID.SERVER_AUTH)


def client_certificate(
    ca: x509.Certificate,
    ca_key: ec.EllipticCurvePrivateKey,
    key: ec.EllipticCurvePrivateKey,
    name: str,
    role: Role,
    days: float,
) -> x509.Certificate:
    """A certificate for a client's key, which names an identity."""
    uri = x509.UniformResourceIdentifier(identity_uri(name, role))
    return _signed(ca, ca_key, key, name, [uri], days, ExtendedKeyUsageOID.CLIENT_AUTH)


def _signed(
    ca: x509.Certificate,
    ca_key: ec.EllipticCurvePrivateKey,
    key: ec.EllipticCurvePrivateKey,
    common_name: str,
    names: Sequence[x509.GeneralName],
    days: float,
    purpose: x509.ObjectIdentifier,
) -> x509.Certificate:
    subject, serial = _common_name(common_name), secrets.randbits(126) | 1 << 126
    return (
        _builder(subject, ca.subject, key.public_key(), serial, days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(sign_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(ca_key, hashes.SHA256())
    )


def _common_name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, serial: int, days: float
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(serial | 1)
        # Clocks of other hosts may be a little behind.
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + lifetime(days))
    )


def _key_usage(*, sign_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def refuse_names(names: Sequence[str], taken: Iterable[str] = ()) -> None:
    """Accept names of identities that are to be given out beside those that are.

    Raises:
        InvalidInputError: One is taken, too near to another, or no name.
    """
    others = set(taken)
    for name in names:
        for other in sorted(others):
            _refuse_beside(check_name(name), other)
        others.add(check_name(name))


def _refuse_beside(name: str, other: str) -> None:
    if other == name:
        raise InvalidInputError(f"{name!r} has a credential already; use `paceline certs renew` to replace it")
    shorter, longer = sorted((other, name), key=len)
    if longer.startswith(f"{shorter}."):
        raise InvalidInputError(
            f"{name!r} is too near to {other!r}: {shorter!r} may act under all names that begin with '{shorter}.'"
        )


def refuse_server_names(names: Iterable[str]) -> None:
    """Accept what a server's certificate can name.

    Raises:
        InvalidInputError: One is neither a host's name, nor one with a leading "*.", nor an IP address.
    """
    for name in names:
        try:
            check_host(name.removeprefix("*."))
        except ValueError:
            raise InvalidInputError(
                f"{name!r} cannot be a name of the server: give a host name or an IP address, without a port (names "
                "with other letters in their ASCII form, xn--...)"
            ) from None


def lifetime(days: float) -> timedelta:
    """How long something lasts.

    Raises:
        InvalidInputError: Not at all, or longer than the authority.
    """
    if not 0 < days <= CA_DAYS:
        raise InvalidInputError(
            f"{days:g} days cannot be: above 0, and at most {CA_DAYS}, as long as the authority lasts"
        )
    return timedelta(days=days)


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def private_pem(key: ec.EllipticCurvePrivateKey | Ed25519PrivateKey) -> bytes:
    """A private key in PEM, not encrypted."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
