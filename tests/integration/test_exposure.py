"""A server beyond loopback starts only with TLS and callers who say who they are, unless told so in plain words."""

import subprocess
import sys
from pathlib import Path

import pytest
import trustme

import paceline_server
from integration.patience import PATIENCE_S
from paceline_server.config_fields import config_fields
from paceline_server.security.exposure import is_loopback, refuse_exposed
from paceline_server.settings import config_from_mapping, load_config
from paceline_wire.errors import ConfigurationError

EVERYWHERE = ("0.0.0.0:0", "[::]:0", "192.0.2.1:0", "no-such-host.invalid:0")


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A certificate and its key, as fields of [security]."""
    folder = tmp_path_factory.mktemp("tls")
    issued = trustme.CA().issue_cert("localhost")
    issued.cert_chain_pems[0].write_to_path(folder / "server.pem")
    issued.private_key_pem.write_to_path(folder / "server.key")
    (folder / "tokens").write_text("correct-horse\n")
    return {"tls_cert": str(folder / "server.pem"), "tls_key": str(folder / "server.key")}


@pytest.mark.parametrize("listen", EVERYWHERE)
def test_it_refuses_without_tls_and_without_credentials(listen: str, tls: dict[str, str]) -> None:
    """Each of the two alone is not enough; the sentence says which is missing and what to do."""
    token = {"token_file": str(Path(tls["tls_cert"]).with_name("tokens"))}
    for security, missing in (
        ({}, ("TLS", "callers who show who they are")),
        (tls, ("callers who show who they are",)),
        (token, ("TLS",)),
    ):
        with pytest.raises(ConfigurationError, match=r"paceline certs .*--insecure") as refused:
            refuse_exposed(config_from_mapping({"listen": listen, "security": security}))
        assert all(part in str(refused.value) for part in (*missing, listen))
    refuse_exposed(config_from_mapping({"listen": listen, "security": {**tls, **token}}))
    refuse_exposed(config_from_mapping({"listen": listen, "security": {"insecure": True}}))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_needs_nothing(host: str) -> None:
    """What only this machine reaches is open to whoever is on it, as before."""
    assert is_loopback(host)


def test_serve_ends_with_a_sentence() -> None:
    """Exit code 2, nothing on stdout; an embedded server tells its starter the same."""
    command = [sys.executable, "-m", "paceline", "serve", "--json", "--listen", "0.0.0.0:0"]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "listen = '0.0.0.0:0'" in refused.stderr
    with pytest.raises(ConfigurationError, match="--insecure"), paceline_server.local({"listen": "0.0.0.0:0"}):
        pass


@pytest.mark.parametrize(
    ("flags", "variables"),
    [({"security.insecure": True}, {}), ({}, {"PACELINE_SECURITY__INSECURE": "true"})],
)
def test_insecure_can_be_said_in_every_way(flags: dict[str, object], variables: dict[str, str]) -> None:
    """As the flag, which is --insecure for short, or as the variable."""
    refuse_exposed(load_config(None, variables, {"listen": "0.0.0.0:0", **flags}))
    assert "--insecure" in config_fields()["security.insecure"].flags
