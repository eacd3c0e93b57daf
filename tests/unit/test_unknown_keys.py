"""A token key of an algorithm that nobody knows yet: it is refused in a sentence, and hides no other file."""

import base64
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from paceline_server.config_security import SecurityConfig
from paceline_server.security.credentials import Credentials
from paceline_server.security.tokens import read_public_keys
from paceline_wire.errors import ConfigurationError

KEY_OF_TOMORROW = b"\x30\x06\x06\x04\x2b\x65\x81\x48" + b"\x03\x21\x00" + bytes(32)
"""A public key of an algorithm that nobody knows yet, as it is inside a PEM file."""


def public_key_of_tomorrow() -> bytes:
    """A PEM file of it."""
    content = base64.encodebytes(b"\x30" + bytes([len(KEY_OF_TOMORROW)]) + KEY_OF_TOMORROW)
    return b"-----BEGIN PUBLIC KEY-----\n" + content + b"-----END PUBLIC KEY-----\n"


def test_a_key_that_no_version_knows_hides_no_revocation(tmp_path: Path) -> None:
    """One file that cannot be used, for whatever reason, does not keep the others from being read."""
    key, revoked = tmp_path / "token.pub", tmp_path / "revoked"
    form = (Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    key.write_bytes(Ed25519PrivateKey.generate().public_key().public_bytes(*form))
    revoked.write_text("")
    credentials = Credentials(SecurityConfig(token_key=key, revoked=revoked))
    key.write_bytes(public_key_of_tomorrow())
    revoked.write_text("abc\n")
    assert credentials.look()
    with pytest.raises(ConfigurationError, match=r"token_key = .* cannot be used"):
        read_public_keys(key)
