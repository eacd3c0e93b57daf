"""Whether a server can be reached: names, TCP, TLS and HTTP/2, each by itself, so that what fails can be named."""

import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from paceline.channels import TLS, split_address
from paceline_wire.errors import InvalidInputError

TIMEOUT_S = 10.0
"""Seconds that each step gets."""

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
"""What an HTTP/2 client begins with: the preface and an empty frame of settings."""

_SETTINGS_FRAME = 4


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """The server's certificate, verified.

    Attributes:
        subject: Its common name, or its first name.
        issuer: The common name of whoever signed it.
        names: The names and addresses that it is for.
        not_after_s: Until when it is valid, in seconds since 1970.
        version: The version of TLS.
        cipher: The cipher.
    """

    subject: str
    issuer: str
    names: tuple[str, ...]
    not_after_s: float
    version: str
    cipher: str


@dataclass(kw_only=True)
class Reach:
    """How far one came. What comes after a step that failed is None.

    Attributes:
        target: "host:port".
        addresses: What the name stands for.
        resolve_s: Seconds that it took to find out.
        connect_s: Seconds until TCP was connected.
        handshake_s: Seconds that TLS took; None without TLS, too.
        certificate: The server's certificate; None without TLS, too.
        http2: Whether the server speaks HTTP/2.
        failed: The step that failed: "dns", "tcp", "tls" or "http2"; None: none.
        problem: Why, in a sentence; None: nothing failed.
    """

    target: str
    addresses: tuple[str, ...] = ()
    resolve_s: float | None = None
    connect_s: float | None = None
    handshake_s: float | None = None
    certificate: Certificate | None = None
    http2: bool | None = None
    failed: str | None = None
    problem: str | None = None


class _StepFailedError(Exception):
    def __init__(self, step: str, problem: str) -> None:
        super().__init__(problem)
        self.step = step


def reach(target: str, tls: TLS | None) -> Reach:
    """Try every step on the way to a server. Blocks.

    Args:
        target: "host:port".
        tls: How to verify the server, and what to show it; None: no TLS.

    Raises:
        InvalidInputError: The address is none, or a TLS file cannot be read.
    """
    host, port = split_address(target)
    context = None if tls is None else _context(tls)
    found = Reach(target=target)
    try:
        with _connected(host.strip("[]"), port, found) as connected:
            if context is None or tls is None:
                found.http2 = _speaks_http2(connected, "TLS may be needed: give --tls-ca")
            else:
                name = tls.server_name or host.strip("[]")
                with _secured(context, connected, name, found) as secured:
                    found.http2 = _speaks_http2(secured, "it may ask for a certificate of the client: --tls-cert")
    except _StepFailedError as error:
        found.failed, found.problem = error.step, str(error)
    return found


@contextmanager
def _connected(host: str, port: int, found: Reach) -> Iterator[socket.socket]:
    began_s = time.perf_counter()
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:  # UnicodeError: it is no name that the DNS could have
        cause = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise _StepFailedError("dns", f"the name {host!r} cannot be resolved: {cause}; is it written right?") from error
    found.resolve_s = time.perf_counter() - began_s
    found.addresses = tuple(dict.fromkeys(str(info[4][0]) for info in infos))
    problems = []
    for family, kind, protocol, _, address in infos:
        connection = socket.socket(family, kind, protocol)
        connection.settimeout(TIMEOUT_S)
        began_s = time.perf_counter()
        try:
            connection.connect(address)
        except OSError as error:
            connection.close()
            reason = f"nothing answered in {TIMEOUT_S:g} s" if isinstance(error, TimeoutError) else error.strerror
            problems.append(f"{address[0]} port {port}: {reason}")
            continue
        found.connect_s = time.perf_counter() - began_s
        with connection:
            yield connection
        return
    advice = "is the server started, does it listen on that address, and does a firewall let TCP through?"
    raise _StepFailedError("tcp", f"no TCP connection: {'; '.join(problems)}; {advice}")


@contextmanager
def _secured(context: ssl.SSLContext, plain: socket.socket, name: str, found: Reach) -> Iterator[ssl.SSLSocket]:
    began_s = time.perf_counter()
    try:
        secured = context.wrap_socket(plain, server_hostname=name)
    except ssl.SSLCertVerificationError as error:
        advice = "is the CA file the run's own, and is the address one that the certificate is for?"
        raise _StepFailedError(
            "tls", f"the server's certificate does not verify: {error.verify_message}; {advice}"
        ) from error
    except ssl.SSLError as error:
        advice = "does the server speak TLS?" if "VERSION" in str(error.reason) else "is the certificate right?"
        raise _StepFailedError("tls", f"no TLS: {error.reason or error}; {advice}") from error
    except OSError as error:
        raise _StepFailedError("tls", f"the connection broke in the TLS handshake: {error}") from error
    with secured:
        found.handshake_s = time.perf_counter() - began_s
        found.certificate = _certificate(secured)
        yield secured


def _certificate(secured: ssl.SSLSocket) -> Certificate:
    told = secured.getpeercert() or {}
    names = tuple(str(pair[1]) for pair in told.get("subjectAltName", ()))
    cipher = secured.cipher()
    return Certificate(
        subject=_common_name(told.get("subject")) or (names[0] if names else ""),
        issuer=_common_name(told.get("issuer")),
        names=names,
        not_after_s=float(ssl.cert_time_to_seconds(str(told["notAfter"]))) if "notAfter" in told else 0.0,
        version=secured.version() or "",
        cipher=cipher[0] if cipher else "",
    )


def _common_name(name: object) -> str:
    """The common name in what Python makes of a distinguished name: tuples of tuples of pairs."""
    if not isinstance(name, tuple):
        return ""
    pairs = [pair for part in name for pair in part]
    return next((str(value) for key, value in pairs if key == "commonName"), "")


def _speaks_http2(connection: socket.socket, advice: str) -> bool:
    """Send the beginning of HTTP/2, and see whether the answer is one."""
    try:
        connection.sendall(_PREFACE)
        head = connection.recv(9)
    except OSError as error:
        raise _StepFailedError("http2", f"the connection broke when HTTP/2 began: {error}; {advice}") from error
    if len(head) < 4 or head[3] != _SETTINGS_FRAME:
        raise _StepFailedError("http2", f"the server does not speak HTTP/2 here; {advice}")
    return True


def _context(tls: TLS) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=None if tls.ca is None else str(tls.ca))
        context.set_alpn_protocols(["h2"])
        if tls.cert is not None:
            context.load_cert_chain(str(tls.cert), None if tls.key is None else str(tls.key))
    except OSError as error:
        raise InvalidInputError(f"a TLS file cannot be used: {error}") from error
    return context
