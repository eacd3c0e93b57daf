"""A run's authority: the folder that `paceline certs` keeps, and what it gives out.

    DIR/authority/     stays with whoever runs it: ca.pem and ca.key, token.key, and issued.json, what was given out
    DIR/server/        goes to the server: ca.pem, server.pem, server.key, token.pub, revoked
    DIR/workers/NAME/  goes to that worker: ca.pem, and a token, or a client certificate cert.pem with key.pem
    DIR/observers/NAME/, DIR/admins/NAME/  the same

Folders have mode 0700 and secrets 0600 from the moment they exist. Nothing is overwritten but by `renew`.
"""

import fcntl
import json
import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from paceline_server.security.identity import Role
from paceline_server.security.issuing import (
    authority_certificate,
    client_certificate,
    lifetime,
    private_pem,
    refuse_names,
    server_certificate,
)
from paceline_server.security.tokens import sign
from paceline_wire.errors import InvalidInputError

TOKEN, CERTIFICATE = "token", "certificate"

_REVOKED_HEAD = (
    "# Ids of revoked credentials, one at the beginning of each line; the server reads this file when it changes.\n"
)


@dataclass(frozen=True, kw_only=True)
class Issued:
    """One thing that was given out.

    Attributes:
        name: To whom; the first of the server's names for its certificate.
        role: "worker", "observer", "admin" or "server".
        kind: "token" or "certificate".
        id: What it can be revoked by, hexadecimal.
        expires: When it ends, in ISO 8601.
        names: The server's names and addresses.
        revoked: Whether it was revoked.
    """

    name: str
    role: str
    kind: str
    id: str
    expires: str
    names: tuple[str, ...] = ()
    revoked: bool = False


class Authority:
    """The authority in a folder.

    Args:
        folder: DIR above.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._own = folder / "authority"

    @property
    def server_folder(self) -> Path:
        """What goes to the server."""
        return self._folder / "server"

    def folder_of(self, name: str, role: Role) -> Path:
        """What goes to one identity."""
        return self._folder / f"{role.value}s" / name

    def begin(self, kind: str) -> None:
        """Make the authority's keys.

        Args:
            kind: What it gives out: "token" or "certificate".

        Raises:
            InvalidInputError: There is one already.
        """
        if self._own.exists():
            raise InvalidInputError(
                f"{self._own} is there already; use `paceline certs add {self._folder}` to add to it"
            )
        for folder in (self._own, self.server_folder):
            _make_folder(folder)
        ca_key, token_key = ec.generate_private_key(ec.SECP256R1()), Ed25519PrivateKey.generate()
        ca = authority_certificate(ca_key)
        _write(self._own / "ca.key", private_pem(ca_key))
        _write(self._own / "token.key", private_pem(token_key))
        _write(self._own / "ca.pem", ca.public_bytes(Encoding.PEM), mode=0o644)
        _write(self._own / "issued.json", json.dumps({"kind": kind, "issued": []}).encode())
        public = token_key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        _write(self.server_folder / "token.pub", public, mode=0o644)
        _write(self.server_folder / "ca.pem", ca.public_bytes(Encoding.PEM), mode=0o644)
        _write(self.server_folder / "revoked", _REVOKED_HEAD.encode(), mode=0o644)

    @property
    def kind(self) -> str:
        """What it gives out: "token" or "certificate".

        Raises:
            InvalidInputError: There is no authority in the folder.
        """
        return str(self._read()[0])

    @property
    def issued(self) -> list[Issued]:
        """Everything that was given out.

        Raises:
            InvalidInputError: There is no authority in the folder.
        """
        return self._read()[1]

    def issue_server(self, names: Sequence[str], days: float, *, renew: bool = False) -> Issued:
        """Make the server's certificate; loopback's names are added, for health checks.

        Raises:
            InvalidInputError: There is one, and it is not to be renewed, or a name or the time is not allowed.
        """
        with self._held():
            return self._issue_server(names, days, renew=renew)

    def _issue_server(self, names: Sequence[str], days: float, *, renew: bool) -> Issued:
        all_names = tuple(dict.fromkeys([*names, "localhost", "127.0.0.1", "::1"]))
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = server_certificate(*self._signer(), key, all_names, days)
        # The key first: a server that reads between the two keeps the old pair, since these do not fit together.
        _write(self.server_folder / "server.key", private_pem(key), replace=renew)
        _write(self.server_folder / "server.pem", certificate.public_bytes(Encoding.PEM), mode=0o644, replace=renew)
        return self._note(_issued(certificate, names[0] if names else "localhost", "server", names=tuple(names)))

    def issue(self, name: str, role: Role, days: float, *, renew: bool = False) -> Issued:
        """Make an identity's credential.

        Raises:
            InvalidInputError: The name is taken, too near to another, or no name, or the time is not allowed.
        """
        with self._held():
            return self._issue(name, role, days, renew=renew)

    def _issue(self, name: str, role: Role, days: float, *, renew: bool) -> Issued:
        if not renew:
            refuse_names([name], {each.name for each in self.issued if each.role != "server"})
        lifetime(days)
        folder = self.folder_of(name, role)
        _make_folder(folder)
        _write(folder / "ca.pem", (self._own / "ca.pem").read_bytes(), mode=0o644, replace=True)
        if self.kind == TOKEN:
            return self._issue_token(name, role, days, renew=renew)
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = client_certificate(*self._signer(), key, name, role, days)
        # Noted first: what is not noted could not be revoked.
        issued = self._note(_issued(certificate, name, role.value))
        _write(folder / "key.pem", private_pem(key), replace=renew)
        _write(folder / "cert.pem", certificate.public_bytes(Encoding.PEM), mode=0o644, replace=renew)
        return issued

    def revoke(self, names: Iterable[str]) -> list[Issued]:
        """Revoke all that identities have; returns what was revoked now.

        Raises:
            InvalidInputError: A name was never given out.
        """
        with self._held():
            return self._revoke(names)

    def _revoke(self, names: Iterable[str]) -> list[Issued]:
        wanted, (kind, issued) = set(names), self._read()
        known = {each.name for each in issued if each.role != "server"}
        if unknown := sorted(wanted - known):
            raise InvalidInputError(f"nothing was given out to {', '.join(map(repr, unknown))}")
        now = [each for each in issued if each.name in wanted and each.role != "server" and not each.revoked]
        today = datetime.now(UTC).date()
        _append(
            self.server_folder / "revoked",
            [f"{each.id}  {each.kind} of {each.role} {each.name}, {today}" for each in now],
        )
        gone = {each.id for each in now}
        kept = [Issued(**{**asdict(each), "revoked": each.revoked or each.id in gone}) for each in issued]
        self._keep(kind, kept)
        return now

    def _issue_token(self, name: str, role: Role, days: float, *, renew: bool) -> Issued:
        key = load_pem_private_key((self._own / "token.key").read_bytes(), password=None)
        if not isinstance(key, Ed25519PrivateKey):
            raise InvalidInputError(f"{self._own / 'token.key'} is not the key that made these tokens")
        now = datetime.now(UTC)
        expires, token_id = now + lifetime(days), f"{secrets.randbits(126) | 1 << 126:x}"
        token = sign(
            key,
            name=name,
            role=role,
            token_id=token_id,
            issued_s=now.timestamp(),
            expires_s=expires.timestamp(),
        )
        issued = self._note(
            Issued(name=name, role=role.value, kind=TOKEN, id=token_id, expires=expires.isoformat(timespec="seconds"))
        )
        _write(self.folder_of(name, role) / "token", f"{token}\n".encode(), replace=renew)
        return issued

    def _signer(self) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
        """The authority's certificate and key."""
        key = load_pem_private_key((self._own / "ca.key").read_bytes(), password=None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise InvalidInputError(f"{self._own / 'ca.key'} is not the key of ca.pem")
        return x509.load_pem_x509_certificate((self._own / "ca.pem").read_bytes()), key

    @contextmanager
    def _held(self) -> Iterator[None]:
        """Keep other commands out of the authority: what one of them notes would be lost, and could not be revoked."""
        try:
            descriptor = os.open(self._own, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            raise self._missing() from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _missing(self) -> InvalidInputError:
        return InvalidInputError(
            f"there is no authority in {self._folder}; make one with `paceline certs make {self._folder}`"
        )

    def _note(self, issued: Issued) -> Issued:
        kind, before = self._read()
        self._keep(kind, [*before, issued])
        return issued

    def _keep(self, kind: str, issued: list[Issued]) -> None:
        content = {"kind": kind, "issued": [asdict(each) for each in issued]}
        _write(self._own / "issued.json", json.dumps(content, indent=1).encode(), replace=True)

    def _read(self) -> tuple[str, list[Issued]]:
        try:
            content = json.loads((self._own / "issued.json").read_text(encoding="utf-8"))
        except OSError:
            raise self._missing() from None
        issued = [Issued(**{**each, "names": tuple(each["names"])}) for each in content["issued"]]
        return str(content["kind"]), issued


def _issued(certificate: x509.Certificate, name: str, role: str, names: tuple[str, ...] = ()) -> Issued:
    return Issued(
        name=name,
        role=role,
        kind=CERTIFICATE,
        id=f"{certificate.serial_number:x}",
        expires=certificate.not_valid_after_utc.isoformat(timespec="seconds"),
        names=names,
    )


def _make_folder(folder: Path) -> None:
    for each in (*reversed(folder.parents), folder):
        if not each.exists():
            each.mkdir(mode=0o700)


def _append(path: Path, lines: Sequence[str]) -> None:
    """Append lines to a file, each a line of its own even where somebody left the last one without its end."""
    broken = path.exists() and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write(("\n" if broken else "") + "".join(f"{line}\n" for line in lines))


def _write(path: Path, content: bytes, *, mode: int = 0o600, replace: bool = False) -> None:
    """Write a file that appears whole, with its mode from the start; unless replace, there must be none.

    Raises:
        InvalidInputError: There is one.
    """
    if path.exists() and not replace:
        raise InvalidInputError(f"{path} is there already, and is not overwritten")
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
