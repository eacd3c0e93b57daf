"""A run's authority made with the command `paceline certs`, and servers and clients that use what it gives out."""

import json
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from paceline import TLS
from paceline_server.security.command import certs


def run_certs(*arguments: str) -> dict[str, Any]:
    """Run the command with --json; what it printed."""
    done = CliRunner().invoke(certs, [*arguments, "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    told: dict[str, Any] = json.loads(done.output)
    return told


def make_authority(folder: Path, *identities: str, credentials: str = "token") -> None:
    """Make an authority for a server on loopback; identities are flags, such as "--worker", "a"."""
    run_certs("make", str(folder), "--server", "localhost", "--credentials", credentials, *identities)


def security_of(folder: Path, *, mutual: bool = False) -> dict[str, str]:
    """The table [security] of a server that uses an authority."""
    server = folder / "server"
    asked = {"client_ca": str(server / "ca.pem")} if mutual else {"token_key": str(server / "token.pub")}
    files = {"tls_cert": str(server / "server.pem"), "tls_key": str(server / "server.key")}
    return {**files, **asked, "revoked": str(server / "revoked")}


def token_of(folder: Path, name: str, role: str = "worker") -> str:
    """An identity's token."""
    return (folder / f"{role}s" / name / "token").read_text().strip()


def tls_of(folder: Path, name: str, role: str = "worker") -> TLS:
    """An identity's client certificate."""
    own = folder / f"{role}s" / name
    return TLS(ca=own / "ca.pem", cert=own / "cert.pem", key=own / "key.pem")
