"""Certificates, keys and tokens made by hand: for what no authority would give out."""

import base64
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import jwt
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID

NOW_S = datetime.now(UTC).timestamp()
CLAIMS: dict[str, Any] = {"sub": "a", "role": "worker", "jti": "ab12", "iat": int(NOW_S), "exp": int(NOW_S) + 3600}
"""What a token of the worker `a` says."""


def signed(claims: dict[str, Any], key: Any, algorithm: str = "EdDSA") -> str:
    """A token with such claims."""
    return jwt.encode(claims, key, algorithm=algorithm)


def made(names: Sequence[x509.GeneralName], common_name: str) -> x509.Certificate:
    """A certificate that names somebody, with the serial number 77, signed by itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(subject, subject, key.public_key(), 77, now, now + timedelta(days=1))
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(key, hashes.SHA256())


def pem_of(kind: str, der: bytes) -> bytes:
    """DER as PEM."""
    return f"-----BEGIN {kind}-----\n{base64.encodebytes(der).decode()}-----END {kind}-----\n".encode()


def public_pem(key: Any) -> bytes:
    """A public key in PEM."""
    return bytes(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
