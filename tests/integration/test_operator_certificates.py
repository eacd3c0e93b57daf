"""`paceline status` and `paceline admin` at a server that asks for client certificates."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import paceline_server
from integration.authority import make_authority, security_of
from paceline.cli import cli

ROLES = {"a": "worker", "eve": "observer", "root": "admin"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A server of two shards, and the folder of its authority."""
    folder = tmp_path_factory.mktemp("run") / "certs"
    identities = [word for name, role in ROLES.items() for word in (f"--{role}", name)]
    make_authority(folder, *identities, credentials="certificate")
    config = {"shards": 2, "security": security_of(folder, mutual=True)}
    with paceline_server.local(config) as address:
        yield address.replace("127.0.0.1", "localhost"), folder


def called(run: tuple[str, Path], name: str, *arguments: str) -> Result:
    """Run a command with an identity's certificate; the address stands where `@` does."""
    address, folder = run
    own = folder / f"{ROLES[name]}s" / name
    flags = ["--tls-ca", str(own / "ca.pem"), "--tls-cert", str(own / "cert.pem"), "--tls-key", str(own / "key.pem")]
    return CliRunner().invoke(cli, [address if word == "@" else word for word in arguments] + flags)


@pytest.mark.parametrize("name", ROLES)
def test_every_role_may_look(run: tuple[str, Path], name: str) -> None:
    """The status of each shard, over mutual TLS."""
    done = called(run, name, "status", "@", "--json")
    assert done.exit_code == 0, done.output
    assert [shard["shard_index"] for shard in json.loads(done.stdout)["shards"]] == [0, 1]


def test_an_admin_acts_and_nobody_else_does(run: tuple[str, Path]) -> None:
    """Its certificate's role lets it act on every shard; the others are told what is missing, and change nothing."""
    for name, role in ROLES.items():
        done = called(run, name, "admin", "evict", "@", "nobody", "--for", "1h", "--json")
        if role == "admin":
            assert done.exit_code == 0, done.output
            assert len(json.loads(done.stdout)["shards"]) == 2
        else:
            assert done.exit_code != 0
            assert f"{role} '{name}' may not call Evict" in done.output
    evicted = [shard["evicted"] for shard in json.loads(called(run, "eve", "status", "@", "--json").stdout)["shards"]]
    assert [[each["worker_id"] for each in shard] for shard in evicted] == [["nobody"]] * 2


@pytest.mark.parametrize("command", [("status",), ("admin", "audit")])
def test_without_a_certificate_nothing_is_told(
    run: tuple[str, Path], command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """TLS ends the connection; half a pair is the caller's mistake, and is called that."""
    for module in ("paceline.commands", "paceline.admin_commands"):
        monkeypatch.setattr(f"{module}.REACH_S", 0.2)
    address, folder = run
    own = folder / "admins" / "root"
    flags = [*command, address, "--tls-ca", str(own / "ca.pem")]
    done = CliRunner().invoke(cli, flags)
    assert done.exit_code != 0
    assert "cannot be reached" in done.output
    half = CliRunner().invoke(cli, [*flags, "--tls-cert", str(own / "cert.pem")])
    assert half.exit_code != 0
    assert "cert and key together" in half.output
