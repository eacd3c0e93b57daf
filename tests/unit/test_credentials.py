"""Whom a call's credentials stand for, in each combination that can be configured, and what each role may call."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from integration.authority import make_authority, security_of, token_of
from paceline_server.config_security import SecurityConfig
from paceline_server.security.certificates import certificate_id
from paceline_server.security.credentials import Credentials
from paceline_server.security.identity import Identity, Role, roles_for
from paceline_server.security.revocations import is_revoked, read_revoked
from paceline_wire.errors import ConfigurationError, PermissionDeniedError, UnauthenticatedError
from paceline_wire.v1 import admin_pb2
from paceline_wire.v1 import parameter_server_pb2 as pb
from support_certificates import CLAIMS, NOW_S, signed

PLAIN = "correct-horse-battery"
IDENTITIES = ("--worker", "a", "--worker", "b", "--observer", "eve")


@pytest.fixture(scope="module")
def by_token(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority that gives out tokens."""
    folder = tmp_path_factory.mktemp("by-token") / "certs"
    make_authority(folder, *IDENTITIES)
    return folder


@pytest.fixture(scope="module")
def by_certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority that gives out certificates."""
    folder = tmp_path_factory.mktemp("by-certificate") / "certs"
    make_authority(folder, *IDENTITIES, credentials="certificate")
    return folder


def certificate_of(folder: Path, name: str, role: str = "worker") -> bytes:
    """An identity's certificate in PEM."""
    return (folder / f"{role}s" / name / "cert.pem").read_bytes()


def credentials(clock: Callable[[], float] = lambda: NOW_S, /, **security: Any) -> Credentials:
    """What a shard with such a table [security] asks for."""
    return Credentials(SecurityConfig.model_validate(security), clock)


def bearer(token: str) -> str:
    """The metadata of a token."""
    return f"Bearer {token}"


class TestPlainTokens:
    """Tokens that name nobody, alone and beside what does."""

    def test_beside_a_key_either_is_taken(self, by_token: Path) -> None:
        """A plain token is any worker and nothing more; a signed one is whom it names, and no more than that."""
        asked = credentials(tokens=[PLAIN], token_key=by_token / "server" / "token.pub")
        anyone = asked.identify(bearer(PLAIN), None)
        assert (anyone.name, anyone.role, anyone.expires_s) == (None, Role.WORKER, None)
        anyone.refuse_worker("a")
        anyone.refuse_worker("whoever")
        with pytest.raises(PermissionDeniedError, match="a caller with the role worker may not call Evict"):
            anyone.refuse_method("/paceline_wire.v1.AdminService/Evict")
        eve = asked.identify(bearer(token_of(by_token, "eve", "observer")), None)
        assert (eve.name, eve.role) == ("eve", Role.OBSERVER)
        near = (PLAIN[:-1], f"{PLAIN} ", f"{PLAIN}.a.b", PLAIN.upper(), "")
        for wrong in ("", PLAIN, f"Basic {PLAIN}", *map(bearer, near)):
            with pytest.raises(UnauthenticatedError, match="missing or wrong"):
                asked.identify(wrong, None)

    def test_each_is_refused_where_only_the_other_is_asked_for(self, by_token: Path) -> None:
        """A key alone takes no plain token, and plain tokens alone take no signed one."""
        with pytest.raises(UnauthenticatedError, match="missing or wrong"):
            credentials(token_key=by_token / "server" / "token.pub").identify(bearer(PLAIN), None)
        with pytest.raises(UnauthenticatedError, match="missing or wrong"):
            credentials(tokens=[PLAIN]).identify(bearer(token_of(by_token, "a")), None)

    def test_beside_a_certificate_both_are_needed_and_the_certificate_names(self, by_certificate: Path) -> None:
        """Name, role, end and revocation are the certificate's."""
        asked = credentials(tokens=[PLAIN], **security_of(by_certificate, mutual=True))
        for name, role in (("a", "worker"), ("eve", "observer")):
            found = asked.identify(bearer(PLAIN), certificate_of(by_certificate, name, role))
            assert (found.name, found.role.value) == (name, role)
            assert found.expires_s is not None
            assert found.credentials
        with pytest.raises(UnauthenticatedError, match="missing or wrong"):
            asked.identify("", certificate_of(by_certificate, "a"))
        with pytest.raises(UnauthenticatedError, match="without a client certificate"):
            asked.identify(bearer(PLAIN), None)


@dataclass
class Asking:
    """A shard that asks for a token and a certificate.

    Attributes:
        credentials: What it asks for.
        revoked: Its list of revocations, empty at first.
        now_s: Its clock.
    """

    credentials: Credentials
    revoked: Path
    now_s: float = NOW_S


@pytest.fixture
def asking(by_token: Path, by_certificate: Path, tmp_path: Path) -> Asking:
    """A shard that asks for both."""
    revoked = tmp_path / "revoked"
    revoked.write_text("")
    security = {**security_of(by_certificate, mutual=True), "token_key": by_token / "server" / "token.pub"}
    made = Asking(credentials(lambda: made.now_s, **{**security, "revoked": revoked}), revoked)
    return made


class TestBothTogether:
    """A signed token and a client certificate."""

    def test_they_name_the_same(self, asking: Asking, by_token: Path, by_certificate: Path) -> None:
        """Another name is refused, and another role of the same name; and each of them is needed."""
        token, certificate = bearer(token_of(by_token, "a")), certificate_of(by_certificate, "a")
        found = asking.credentials.identify(token, certificate)
        assert (found.name, found.role) == ("a", Role.WORKER)
        with pytest.raises(UnauthenticatedError, match="of worker 'a', and the certificate of worker 'b'"):
            asking.credentials.identify(token, certificate_of(by_certificate, "b"))
        key = load_pem_private_key((by_token / "authority" / "token.key").read_bytes(), password=None)
        with pytest.raises(UnauthenticatedError, match="of admin 'a', and the certificate of worker 'a'"):
            asking.credentials.identify(bearer(signed({**CLAIMS, "role": "admin"}, key)), certificate)
        for half in (("", certificate), (token, None)):
            with pytest.raises(UnauthenticatedError):
                asking.credentials.identify(*half)

    @pytest.mark.parametrize("which", ["token", "serial", "fingerprint"])
    def test_either_can_be_revoked(self, asking: Asking, by_token: Path, by_certificate: Path, which: str) -> None:
        """By the token's id, the certificate's serial number, or its fingerprint as other tools write it."""
        token, pem = token_of(by_token, "a"), certificate_of(by_certificate, "a")
        certificate = x509.load_pem_x509_certificate(pem)
        ids = {
            "token": str(jwt.decode(token, options={"verify_signature": False})["jti"]),
            "serial": f"00{certificate_id(certificate)}",
            "fingerprint": certificate.fingerprint(hashes.SHA256()).hex(":").upper(),
        }
        asking.revoked.write_text(f"# gone\n\n{ids[which]}  {which} of worker a\n")
        assert asking.credentials.look()
        with pytest.raises(UnauthenticatedError, match="the credential of worker 'a' was revoked"):
            asking.credentials.identify(bearer(token), pem)
        asking.revoked.write_text("# nobody\n")
        assert asking.credentials.look()
        assert asking.credentials.identify(bearer(token), pem).name == "a"

    def test_the_first_end_counts(self, asking: Asking, by_token: Path, by_certificate: Path) -> None:
        """The token lasts an hour and the certificate 90 days: after the hour calls are refused, and what runs ends."""
        key = load_pem_private_key((by_token / "authority" / "token.key").read_bytes(), password=None)
        token, certificate = bearer(signed(CLAIMS, key)), certificate_of(by_certificate, "a")
        found = asking.credentials.identify(token, certificate)
        assert found.expires_s == CLAIMS["exp"]
        assert not asking.credentials.has_expired(found)
        assert not asking.credentials.has_expired(replace(found, expires_s=None))
        asking.now_s = CLAIMS["exp"]
        assert asking.credentials.has_expired(found)
        with pytest.raises(UnauthenticatedError, match="the credential of worker 'a' has expired"):
            asking.credentials.identify(token, certificate)
        asking.now_s = NOW_S + 91 * 86400
        with pytest.raises(UnauthenticatedError, match="has expired"):
            asking.credentials.identify(token, certificate)


def test_names_that_a_caller_may_act_under() -> None:
    """Its own, and those that begin with it and a dot; an admin's and a nameless one's are any."""
    worker = Identity(name="paris", role=Role.WORKER)
    for own in ("paris", "paris.0", "paris.gpu.1"):
        worker.refuse_worker(own)
    for other in ("", "pari", "paris2", "paris-0", "Paris", "berlin", ".paris", "x.paris"):
        with pytest.raises(PermissionDeniedError, match="worker 'paris' may not act as worker"):
            worker.refuse_worker(other)
    with pytest.raises(PermissionDeniedError, match="observer 'eve'"):
        Identity(name="eve", role=Role.OBSERVER).refuse_worker("paris")
    Identity(name="root", role=Role.ADMIN).refuse_worker("paris")
    Identity(name=None, role=Role.WORKER).refuse_worker("paris")


def test_the_list_of_revocations(tmp_path: Path) -> None:
    """Ids in any case, with colons and leading zeros; remarks; anything else is refused with its line."""
    path = tmp_path / "revoked"
    path.write_text("# head\n\nAB12  token of worker a\n00:0c:d3 # remark\n")
    revoked = read_revoked(path)
    assert revoked == {"ab12", "cd3"}
    assert is_revoked(frozenset({"x", "0cd3"}), revoked)
    assert not is_revoked(frozenset({"ab1", "b12"}), revoked)
    assert not is_revoked(frozenset(), revoked)
    for line in ("worker a", "0", "g1", "ab-12", f"{'a' * 65}", "\x00"):
        path.write_text(f"ab12\n{line}\n")
        with pytest.raises(ConfigurationError, match="line 2 does not begin with an id"):
            read_revoked(path)


ROLES = {
    "worker observer admin": ("Describe", "Fetch", "Probe", "Status"),
    "worker admin": ("Initialize", "Join", "Heartbeat", "Leave", "Exchange"),
}


@pytest.mark.parametrize(
    "method",
    [
        f"/{service.full_name}/{name}"
        for service in (
            pb.DESCRIPTOR.services_by_name["ParameterServerService"],
            admin_pb2.DESCRIPTOR.services_by_name["AdminService"],
        )
        for name in service.methods_by_name
    ]
    + ["/paceline_wire.v1.AdminService/Nothing", "/no.Such/Fetch", ""],
)
def test_who_may_call_what(method: str) -> None:
    """Every method of the protocol, and what is none of it: that takes an admin."""
    name = method.rpartition("/")[2]
    expected = next((roles for roles, names in ROLES.items() if name in names), "admin")
    known = method.startswith("/paceline_wire.v1.")
    assert {role.value for role in roles_for(method)} == set((expected if known else "admin").split())
