"""Whether a server may listen where it is told to: beyond loopback only with TLS and callers who say who they are."""

import ipaddress
import socket

from paceline_server.config import ServerConfig
from paceline_wire.errors import ConfigurationError


def refuse_exposed(config: ServerConfig) -> None:
    """Accept a configuration that shows the run only to whom it is meant to be shown.

    Raises:
        ConfigurationError: The server would listen beyond loopback without TLS, or take calls from anybody.
    """
    security = config.security
    missing = [
        *(["TLS (security.tls_cert and security.tls_key)"] if not security.has_tls else []),
        *([f"callers who show who they are ({_WAYS})"] if not security.asks_who_calls else []),
    ]
    if not missing or security.insecure or is_loopback(config.host):
        return
    raise ConfigurationError(
        f"The server does not start: listen = '{config.listen}' can be reached from other machines, and there is no "
        f"{' and there are no '.join(missing)}. `paceline certs make` makes all that is needed in one command, and "
        "prints how to start the server with it. To listen on this machine only, use --listen 127.0.0.1:7070. If "
        "whoever reaches the port may read and change the run, say so with --insecure."
    )


_WAYS = "security.token_key, security.client_ca or security.token_file"


def is_loopback(host: str) -> bool:
    """Whether a host name or IP address stands for this machine's loopback alone. May ask the resolver."""
    try:
        addresses = {str(found[4][0]) for found in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    return all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in addresses)
