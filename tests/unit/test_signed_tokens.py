"""Signed tokens: what is a token of a key, and what only looks like one."""

import base64
import hashlib
import hmac
import json
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from paceline_server.security.identity import Role
from paceline_server.security.tokens import LONGEST_TOKEN, verify
from paceline_wire.errors import UnauthenticatedError
from support_certificates import CLAIMS, NOW_S, public_pem, signed

KEY = Ed25519PrivateKey.generate()
WRONG = "missing or wrong"


def test_whom_it_names() -> None:
    """Name, role, id and end are the claims'; one of another host whose clock is ahead is taken, too."""
    for claims in (CLAIMS, {**CLAIMS, "iat": int(NOW_S) + 600}, {**CLAIMS, "jti": "AB12"}):
        found = verify(signed(claims, KEY), [KEY.public_key()])
        assert (found.name, found.role, found.credentials) == ("a", Role.WORKER, frozenset({"ab12"}))
        assert found.expires_s == CLAIMS["exp"]


def test_any_of_the_keys_may_have_signed() -> None:
    """While keys are being replaced there are two; where there is none, no token is one."""
    other = Ed25519PrivateKey.generate()
    keys = [KEY.public_key(), other.public_key()]
    assert {verify(signed(CLAIMS, key), keys).name for key in (KEY, other)} == {"a"}
    for none in ([], [other.public_key()]):
        with pytest.raises(UnauthenticatedError, match=WRONG):
            verify(signed(CLAIMS, KEY), none)


@pytest.mark.parametrize(
    ("algorithm", "key"), [("none", None), ("HS256", b"x" * 32), ("ES256", ec.generate_private_key(ec.SECP256R1()))]
)
def test_no_other_algorithm_counts(algorithm: str, key: Any) -> None:
    """Neither no signature, nor a shared secret, nor another kind of key."""
    with pytest.raises(UnauthenticatedError, match=WRONG):
        verify(signed(CLAIMS, key, algorithm), [KEY.public_key()])


def test_the_public_key_is_no_shared_secret() -> None:
    """Whoever knows it, as every server does, makes no tokens with it."""
    parts = [json.dumps(part).encode() for part in ({"alg": "HS256", "typ": "JWT"}, CLAIMS)]
    text = b".".join(base64.urlsafe_b64encode(part).rstrip(b"=") for part in parts)
    signature = hmac.new(public_pem(KEY.public_key()), text, hashlib.sha256).digest()
    token = text + b"." + base64.urlsafe_b64encode(signature).rstrip(b"=")
    with pytest.raises(UnauthenticatedError, match=WRONG):
        verify(token.decode(), [KEY.public_key()])


@pytest.mark.parametrize("missing", CLAIMS)
def test_every_claim_is_needed(missing: str) -> None:
    """Above all the end and the id, without which it could be neither outlived nor revoked."""
    claims = {name: value for name, value in CLAIMS.items() if name != missing}
    with pytest.raises(UnauthenticatedError, match=WRONG):
        verify(signed(claims, KEY), [KEY.public_key()])


def test_one_that_is_meant_for_somebody_else_is_refused() -> None:
    """The same key may sign for another service, which says so in `aud`."""
    with pytest.raises(UnauthenticatedError, match=WRONG):
        verify(signed({**CLAIMS, "aud": "billing"}, KEY), [KEY.public_key()])


@pytest.mark.parametrize(
    "claim", [{"role": "root"}, {"role": ["admin"]}, {"role": 1}, {"sub": "a/../b"}, {"sub": ""}, {"sub": "x" * 65}]
)
def test_names_and_roles_are_known_ones(claim: dict[str, Any]) -> None:
    """What the authority signed in a later version, or by mistake, stands for nobody."""
    with pytest.raises(UnauthenticatedError, match="names no identity or role"):
        verify(signed({**CLAIMS, **claim}, KEY), [KEY.public_key()])


def test_it_ends_and_is_not_endless() -> None:
    """After its end it is refused with what to do; one of absurd length is not looked at; no text shows a token."""
    expired, long = signed({**CLAIMS, "exp": int(NOW_S) - 1}, KEY), signed({**CLAIMS, "pad": "x" * LONGEST_TOKEN}, KEY)
    for token, sentence in ((expired, "has expired; get a new one"), (long, WRONG)):
        with pytest.raises(UnauthenticatedError, match=sentence) as refused:
            verify(token, [KEY.public_key()])
        assert token.rpartition(".")[2] not in str(refused.value)
