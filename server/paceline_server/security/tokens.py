"""Signed tokens: JSON Web Tokens with an Ed25519 signature (EdDSA), made by the authority and checked by shards.

The claims: `sub`, the identity's name; `role`; `jti`, the id under which the token can be revoked; `iat` and `exp`,
when it was made and when it ends. A shard has the public key only, and cannot make any.
"""

from collections.abc import Sequence
from pathlib import Path

import jwt
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from paceline_server.security.identity import NAME, Identity, Role
from paceline_wire.errors import ConfigurationError, UnauthenticatedError

ALGORITHM = "EdDSA"

LONGEST_TOKEN = 4096
"""Characters of a token that are looked at; honest ones have about 250."""

_CLAIMS = ("sub", "role", "jti", "iat", "exp")
_PEM_BEGIN, _PEM_END = b"-----BEGIN", b"-----END PUBLIC KEY-----"


def sign(key: Ed25519PrivateKey, *, name: str, role: Role, token_id: str, issued_s: float, expires_s: float) -> str:
    """Make a token.

    Args:
        key: The authority's signing key.
        name: Whom it stands for.
        role: What it is for.
        token_id: What it can be revoked by, in lower-case hexadecimal.
        issued_s: Now, in seconds since 1970.
        expires_s: When it ends.
    """
    claims = {"sub": name, "role": role.value, "jti": token_id, "iat": int(issued_s), "exp": int(expires_s)}
    return jwt.encode(claims, key, algorithm=ALGORITHM)


def verify(token: str, keys: Sequence[Ed25519PublicKey]) -> Identity:
    """Whom a token stands for.

    Args:
        token: The token.
        keys: The public keys, one of which must have signed it.

    Raises:
        UnauthenticatedError: It is no valid token of these keys, or has expired. The text does not have the token.
    """
    for key in keys if len(token) <= LONGEST_TOKEN else ():
        try:
            # When it was made is no condition: the authority's clock may be ahead of the shard's.
            claims = jwt.decode(
                token, key, algorithms=[ALGORITHM], options={"require": list(_CLAIMS), "verify_iat": False}
            )
        except jwt.ExpiredSignatureError:
            raise UnauthenticatedError("the token has expired; get a new one (paceline certs renew)") from None
        except jwt.InvalidTokenError:
            continue
        return _identity(claims)
    raise UnauthenticatedError(
        "the token is missing or wrong; give the one that whoever runs this server gave you (token=, PACELINE_TOKEN or "
        "PACELINE_TOKEN_FILE)"
    )


def _identity(claims: dict[str, object]) -> Identity:
    name, token_id, expires = claims["sub"], claims["jti"], claims["exp"]
    roles = {role.value: role for role in Role}
    role = claims["role"]
    if not isinstance(name, str) or not NAME.fullmatch(name) or not isinstance(role, str) or role not in roles:
        raise UnauthenticatedError("the token is signed, but names no identity or role that this version knows")
    return Identity(
        name=name,
        role=roles[role],
        credentials=frozenset({str(token_id).lower()}),
        expires_s=float(str(expires)),
    )


def read_public_keys(path: Path) -> tuple[Ed25519PublicKey, ...]:
    """The public keys in a PEM file, at least one: several while the signing key is being replaced.

    Raises:
        ConfigurationError: The file cannot be read, or holds something else.
    """
    try:
        *blocks, rest = path.read_bytes().split(_PEM_END)
        keys = tuple(load_pem_public_key(block.lstrip() + _PEM_END) for block in blocks)
    except OSError as error:
        raise ConfigurationError(f"security.token_key = '{path}' cannot be read: {error.strerror}.") from None
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigurationError(f"security.token_key = '{path}' cannot be used: {error}.") from None
    if keys and _PEM_BEGIN in rest:
        raise ConfigurationError(f"security.token_key = '{path}' ends within a key.")
    if not keys or not all(isinstance(key, Ed25519PublicKey) for key in keys):
        raise ConfigurationError(f"security.token_key = '{path}' holds no Ed25519 public key in PEM (token.pub).")
    return tuple(key for key in keys if isinstance(key, Ed25519PublicKey))
