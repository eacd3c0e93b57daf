"""The authority's folder: all that is given out can be revoked, and what cannot be is refused before it is made."""

import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from integration.authority import make_authority, run_certs
from paceline_server.security import authority as authorities
from paceline_server.security.authority import Authority
from paceline_server.security.certificates import identity_of
from paceline_server.security.command import certs
from paceline_server.security.identity import Role
from paceline_server.security.revocations import read_revoked
from paceline_server.security.tokens import sign, verify
from paceline_wire.errors import InvalidInputError, UnauthenticatedError


def test_a_list_without_an_end_of_line_keeps_its_last_id(tmp_path: Path) -> None:
    """An id that somebody added by hand is not run together with the next one, which would revoke neither."""
    make_authority(tmp_path / "certs", "--worker", "a")
    revoked = tmp_path / "certs" / "server" / "revoked"
    revoked.write_text("abcdef12")
    (gone,) = run_certs("revoke", str(tmp_path / "certs"), "a")["revoked"]
    assert read_revoked(revoked) == {"abcdef12", gone["id"]}


def test_commands_at_once_lose_no_note(tmp_path: Path) -> None:
    """What is given out but not noted could not be revoked."""
    make_authority(tmp_path / "certs")
    names = [f"w{number}" for number in range(8)]
    adding = [
        threading.Thread(target=Authority(tmp_path / "certs").issue, args=(name, Role.WORKER, 1.0)) for name in names
    ]
    for thread in adding:
        thread.start()
    for thread in adding:
        thread.join()
    assert sorted(each.name for each in Authority(tmp_path / "certs").issued if each.role == "worker") == names


def test_what_is_written_was_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that is killed in between leaves a note without a credential, not the other way round."""
    make_authority(tmp_path / "certs")
    written = authorities._write

    def killed(path: Path, content: bytes, **options: Any) -> None:
        if path.name == "token":
            raise KeyboardInterrupt
        written(path, content, **options)

    monkeypatch.setattr(authorities, "_write", killed)
    with pytest.raises(KeyboardInterrupt):
        Authority(tmp_path / "certs").issue("a", Role.WORKER, 1.0)
    monkeypatch.undo()
    run_certs("renew", str(tmp_path / "certs"), "a")
    assert len(run_certs("revoke", str(tmp_path / "certs"), "a")["revoked"]) == 2


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--server", "ps.example.org:7070"), "without a port"),
        (("--server", "bücher.example"), "xn--"),
        (("--server", ""), "cannot be a name of the server"),
        (("--server", "x", "--worker", "bad name"), "cannot be a name"),
        (("--server", "x", "--worker", "a", "--observer", "a.b"), "too near to 'a'"),
        (("--server", "x", "--worker", "a", "--worker", "a"), "has a credential already"),
    ],
)
def test_nothing_is_made_of_what_cannot_be(tmp_path: Path, arguments: tuple[str, ...], sentence: str) -> None:
    """A refused `make` leaves no half of an authority, which the next one would refuse to overwrite."""
    done = CliRunner().invoke(certs, ["make", str(tmp_path / "certs"), *arguments])
    assert isinstance(done.exception, InvalidInputError)
    assert sentence in str(done.exception)
    assert not (tmp_path / "certs").exists()
    make_authority(tmp_path / "certs", "--worker", "a")


def test_a_server_may_have_addresses_and_wildcards(tmp_path: Path) -> None:
    """What the certificate names is what was given, and loopback."""
    names = ("*.example.org", "192.0.2.7", "2001:db8::1")
    flags = [flag for name in names for flag in ("--server", name)]
    run_certs("make", str(tmp_path / "certs"), *flags)
    certificate = x509.load_pem_x509_certificate((tmp_path / "certs" / "server" / "server.pem").read_bytes())
    named = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert named.get_values_for_type(x509.DNSName) == ["*.example.org", "localhost"]
    assert [str(each) for each in named.get_values_for_type(x509.IPAddress)] == [*names[1:], "127.0.0.1", "::1"]


@pytest.mark.parametrize("days", ["1e9", "nan", "3651"])
def test_nothing_lasts_longer_than_the_authority(tmp_path: Path, days: str) -> None:
    """A time that no certificate can have is refused with a sentence."""
    make_authority(tmp_path / "certs")
    done = CliRunner().invoke(certs, ["add", str(tmp_path / "certs"), "--worker", "a", "--days", days])
    assert done.exit_code != 0
    assert isinstance(done.exception, InvalidInputError | SystemExit)


def test_a_token_counts_on_a_host_whose_clock_is_behind() -> None:
    """When it was made is no condition; when it ends is."""
    key = Ed25519PrivateKey.generate()
    token = sign(key, name="a", role=Role.WORKER, token_id="1", issued_s=4e9, expires_s=5e9)
    assert verify(token, [key.public_key()]).name == "a"
    with pytest.raises(UnauthenticatedError, match="has expired"):
        verify(sign(key, name="a", role=Role.WORKER, token_id="1", issued_s=0, expires_s=1), [key.public_key()])


@pytest.mark.parametrize(
    ("uri", "identity"),
    [
        (None, ("a", Role.WORKER)),
        ("https://example.org/a", ("a", Role.WORKER)),
        ("paceline:admin:b", ("b", Role.ADMIN)),
        ("paceline:auditor:b", None),
        ("paceline:", None),
    ],
)
def test_a_certificate_of_an_unknown_role_is_nobodys(uri: str | None, identity: tuple[str, Role] | None) -> None:
    """A role of a later version does not become that of a worker; other authorities' certificates go by common name."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a")])
    begun, ended = datetime(2020, 1, 1, tzinfo=UTC), datetime(2040, 1, 1, tzinfo=UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), 7, begun, ended)
    if uri is not None:
        names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)])
        builder = builder.add_extension(names, critical=False)
    pem = builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)
    if identity is None:
        with pytest.raises(UnauthenticatedError, match="names nobody"):
            identity_of(pem)
    else:
        assert (identity_of(pem).name, identity_of(pem).role) == identity
