"""Certificates and keys: whom a client's stands for, and which files a server cannot use, at the start and later."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from integration.authority import make_authority, run_certs, security_of, token_of
from paceline_server.config_security import SecurityConfig
from paceline_server.security.certificates import identity_of, read_server_certificate
from paceline_server.security.credentials import Credentials
from paceline_server.security.identity import Role
from paceline_wire.errors import ConfigurationError, UnauthenticatedError
from support_certificates import made, pem_of, public_pem

PLAIN = "correct-horse-battery"
P256, ED25519 = bytes.fromhex("2a8648ce3d030107"), bytes.fromhex("2b6570")
"""Object identifiers; with another last byte they stand for nothing."""


def uri(text: str) -> list[x509.GeneralName]:
    """An alternative name."""
    return [x509.UniformResourceIdentifier(text)]


class TestClientCertificates:
    """Whom one stands for."""

    @pytest.mark.parametrize(
        ("names", "common_name", "expected"),
        [
            (uri("paceline:admin:root"), "someone", ("root", "admin")),
            ([*uri("https://example.org"), *uri("paceline:observer:eve")], "x", ("eve", "observer")),
            (uri("paceline:worker:a.gpu0"), "x", ("a.gpu0", "worker")),
            (uri("other:admin:root"), "a", ("a", "worker")),
            (uri("paceline:root:root"), "a", None),
            (uri("paceline:admin:"), "a", None),
            (uri("paceline:admin:a:b"), "a", None),
            ((), "a", ("a", "worker")),
            ((), "paceline server", None),
            (uri("paceline:admin:../x"), "a b", None),
        ],
    )
    def test_names(self, names: Sequence[x509.GeneralName], common_name: str, expected: tuple[str, str] | None) -> None:
        """The authority's own form names role and name; any other certificate is a worker's, by its common name."""
        pem = made(names, common_name).public_bytes(Encoding.PEM)
        if expected is None:
            with pytest.raises(UnauthenticatedError, match="names nobody"):
                identity_of(pem)
            return
        found = identity_of(pem)
        assert (found.name, found.role.value) == expected
        assert "4d" in found.credentials

    def test_one_that_cannot_be_read_is_refused_and_no_accident(self) -> None:
        """TLS may verify what is not read here."""
        certificate = made(uri("paceline:worker:a"), "a")
        broken = certificate.public_bytes(Encoding.DER).replace(b"paceline:worker:a", b"\xff" * 17)
        for pem in (b"", pem_of("CERTIFICATE", broken)):
            with pytest.raises(UnauthenticatedError, match="cannot be read"):
                identity_of(pem)


def private_pem(key: Any, password: bytes | None = None) -> bytes:
    """A private key in PEM."""
    encryption = NoEncryption() if password is None else BestAvailableEncryption(password)
    return bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption))


def with_a_password(whole: bytes) -> bytes:
    """The same private key behind a password."""
    return private_pem(load_pem_private_key(whole, password=None), b"secret")


def of_an_unknown_kind(kind: str) -> bytes:
    """A key, public or private, of a kind that does not exist: one byte of an Ed25519 key is another."""
    key = Ed25519PrivateKey.generate()
    der = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    if kind == "PRIVATE KEY":
        der = key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    return pem_of(kind, der.replace(ED25519, ED25519[:-1] + b"\x7f"))


def of_an_unknown_curve(whole: bytes) -> bytes:
    """A certificate with one byte changed, so that its key is on a curve that does not exist."""
    der = x509.load_pem_x509_certificate(whole).public_bytes(Encoding.DER)
    return pem_of("CERTIFICATE", der.replace(P256, P256[:-1] + b"\x7f"))


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority with a revoked worker, and plain tokens."""
    folder = tmp_path_factory.mktemp("authority") / "certs"
    make_authority(folder, "--worker", "a", "--worker", "b")
    run_certs("revoke", str(folder), "b")
    (folder / "server" / "tokens").write_text(f"{PLAIN}\n")
    return folder


class TestBrokenFiles:
    """What is in a server's files that cannot be used: it does not start with them, nor takes them while it serves."""

    @pytest.fixture
    def folder(self, authority: Path, tmp_path: Path) -> Path:
        """A copy of it."""
        return shutil.copytree(authority, tmp_path / "certs")

    @pytest.mark.parametrize(
        ("name", "content", "sentence"),
        [
            ("server.pem", lambda whole: b"", "holds no certificates"),
            ("server.pem", lambda whole: whole[: len(whole) // 2], "holds no certificates"),
            ("server.pem", lambda whole: whole + whole[: len(whole) // 2], "ends within a certificate"),
            ("server.pem", of_an_unknown_curve, "of a key that cannot be used"),
            ("server.pem", lambda whole: made((), "x").public_bytes(Encoding.PEM), "is not the key of"),
            ("server.key", lambda whole: b"", "holds no private key"),
            ("server.key", lambda whole: whole[: len(whole) // 2], "holds no private key"),
            ("server.key", with_a_password, "holds no private key"),
            ("server.key", lambda whole: of_an_unknown_kind("PRIVATE KEY"), "holds no private key"),
            ("server.key", lambda whole: private_pem(ec.generate_private_key(ec.SECP256R1())), "is not the key of"),
            ("token.pub", lambda whole: b"", "holds no Ed25519 public key"),
            ("token.pub", lambda whole: whole[: len(whole) // 2], "holds no Ed25519 public key"),
            ("token.pub", lambda whole: whole + whole[: len(whole) // 2], "ends within a key"),
            ("token.pub", lambda whole: pem_of("PUBLIC KEY", b"junk"), "cannot be used"),
            ("token.pub", lambda whole: of_an_unknown_kind("PUBLIC KEY"), "cannot be used"),
            ("token.pub", lambda whole: private_pem(Ed25519PrivateKey.generate()), "holds no Ed25519 public key"),
            ("token.pub", lambda whole: public_pem(made((), "x").public_key()), "no Ed25519 public"),
            ("revoked", lambda whole: whole + b"no id\n", "does not begin with an id"),
            ("tokens", lambda whole: b"", "holds no token"),
            ("tokens", lambda whole: b"two words\n", "line 1 should be printable"),
        ],
    )
    def test_they_are_refused(
        self,
        folder: Path,
        caplog: pytest.LogCaptureFixture,
        name: str,
        content: Callable[[bytes], bytes],
        sentence: str,
    ) -> None:
        """With a sentence that names the file and shows nothing of it; what was there before counts."""
        path = folder / "server" / name
        whole = path.read_bytes()
        asked = self.asked(folder)
        path.write_bytes(content(whole))
        assert not asked.look()
        (told,) = [record.getMessage() for record in caplog.records]
        assert sentence in told
        assert str(path) in told
        lines = [line for line in content(whole).decode(errors="replace").splitlines() if not line.startswith("---")]
        assert not [line for line in lines if len(line) > 8 and line in told]
        self.goes_on(asked, folder)
        with pytest.raises(ConfigurationError, match=sentence):
            self.asked(folder)
        path.write_bytes(whole)
        assert asked.look()
        self.goes_on(asked, folder)

    @pytest.mark.parametrize("name", ["server.pem", "server.key", "token.pub", "revoked", "tokens"])
    @pytest.mark.parametrize("gone", ["removed", "a folder"])
    def test_files_that_are_gone(self, folder: Path, caplog: pytest.LogCaptureFixture, name: str, gone: str) -> None:
        """The same for one that is not there, and for a folder in its place."""
        path = folder / "server" / name
        asked = self.asked(folder)
        path.rename(path.with_suffix(".away"))
        if gone == "a folder":
            path.mkdir()
        assert [asked.look() for _ in range(3)] == [False] * 3
        (told,) = [record.getMessage() for record in caplog.records]
        assert f"'{path}'" in told
        assert "cannot be read" in told
        self.goes_on(asked, folder)
        if gone == "a folder":
            path.rmdir()
        path.with_suffix(".away").rename(path)
        assert asked.look()
        self.goes_on(asked, folder)

    def test_a_list_that_has_become_empty_lets_nobody_in(self, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
        """Empty as a copy that has just begun leaves it: a remark is needed to take everybody back."""
        path = folder / "server" / "revoked"
        asked = self.asked(folder)
        path.write_bytes(b"")
        assert not asked.look()
        assert "has become empty" in caplog.text
        self.goes_on(asked, folder)
        path.write_text("# nobody\n")
        assert asked.look()
        assert asked.identify(f"Bearer {token_of(folder, 'b')}", None).name == "b"
        path.write_bytes(b"")
        assert asked.look()
        assert self.asked(folder).identify(f"Bearer {token_of(folder, 'b')}", None).name == "b"

    @staticmethod
    def asked(folder: Path) -> Credentials:
        """A shard's credentials with all of the files."""
        security: dict[str, Any] = {name: Path(path) for name, path in security_of(folder).items()}
        security["token_file"] = folder / "server" / "tokens"
        # Without the checks of the configuration, which come before and say the same of some of the files.
        return Credentials(SecurityConfig.model_construct(**security))

    @staticmethod
    def goes_on(asked: Credentials, folder: Path) -> None:
        """All that was asked for and revoked at the start still is."""
        assert asked.for_port() is not None
        assert asked.identify(f"Bearer {token_of(folder, 'a')}", None).name == "a"
        assert asked.identify(f"Bearer {PLAIN}", None).role is Role.WORKER
        with pytest.raises(UnauthenticatedError, match="was revoked"):
            asked.identify(f"Bearer {token_of(folder, 'b')}", None)

    @pytest.mark.parametrize("keep", [0.0, 0.5, 1.5])
    def test_authorities_of_clients(self, folder: Path, keep: float) -> None:
        """An empty file, half a certificate, and one and a half, which would shut out those of the second one."""
        path = folder / "server" / "ca.pem"
        security = SecurityConfig.model_validate(security_of(folder, mutual=True))
        read_server_certificate(security)
        whole = path.read_bytes() * 2
        path.write_bytes(whole[: int(keep * len(whole) / 2)])
        with pytest.raises(ConfigurationError, match=r"client_ca = .*(holds no certificates|ends within)"):
            read_server_certificate(security)
