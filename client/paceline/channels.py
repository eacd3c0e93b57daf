"""gRPC channels to shards: options, credentials, the metadata of every call, and what failed calls mean."""

import os
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import grpc.aio

from paceline_wire.errors import (
    ERROR_METADATA_KEY,
    ERRORS_BY_NAME,
    NEWEST_INCARNATION_KEY,
    InvalidInputError,
    PacelineError,
    ProtocolVersionError,
    SupersededError,
    UnauthenticatedError,
    UnavailableError,
)
from paceline_wire.limits import MAX_MESSAGE_BYTES

_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # Pings keep NATs and load balancers from dropping a quiet connection, and find a dead peer.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # Below the client's own back-off, which has the jitter: gRPC's would keep a worker from a server that is back.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # Pushes are resent by sequence number; gRPC must not replay streams by itself.
    ("grpc.enable_retries", 0),
    # Channels with equal options would otherwise share one TCP connection.
    ("grpc.use_local_subchannel_pool", 1),
    # An http_proxy variable meant for browsers breaks connections to servers on loopback and private networks.
    ("grpc.enable_http_proxy", 0),
)

_TRANSIENT = {
    grpc.StatusCode.OK,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}
"""What a broken connection or a dying peer looks like, unless the peer named an error of its own.

OK is among them for streams that should not have ended.
"""

_INCARNATION = re.compile(r"[0-9]{1,20}")

PING_S = 20
"""Seconds that a peer gets to answer a ping."""

EXCHANGE_PING_S = 60
"""Seconds that it gets on a connection with heartbeats, which know better what is dead: the ping may wait behind a long
upload, and must not end it."""

FIRST_BACKOFF_S = 0.1
LONGEST_BACKOFF_S = 2.0


@dataclass(frozen=True, kw_only=True)
class TLS:
    """How to verify the server, and what to show it.

    Attributes:
        ca: PEM file of the authority that signed the server's certificate; None: the system's authorities.
        cert: PEM file of this worker's certificate, for servers that ask for one.
        key: PEM file of that certificate's private key.
        server_name: The name that the server's certificate must have, if it is not the host of the address.
    """

    ca: str | Path | None = None
    cert: str | Path | None = None
    key: str | Path | None = None
    server_name: str | None = None

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            raise InvalidInputError("TLS needs cert and key together, or neither")


@dataclass(frozen=True, kw_only=True)
class Access:
    """What every call of one worker needs besides the address.

    Attributes:
        tls: None: no TLS.
        token: The run's token, if it has one.
        token_file: The file that has it, which is read for every call, so that a renewed one is taken.
    """

    tls: TLS | None = None
    token: str | None = field(default=None, repr=False)
    token_file: Path | None = None

    @classmethod
    def of(cls, tls: "TLS | str | Path | bool | None", token: str | None) -> "Access":
        """Access from the forms that users may give.

        Args:
            tls: None or False: no TLS; True: verify with the system's authorities; a path: with that CA file.
            token: The run's token; None: the variable PACELINE_TOKEN, or what is in the file that PACELINE_TOKEN_FILE
                names, if one of them is set.

        Raises:
            InvalidInputError: That file cannot be read.
        """
        token = token or os.environ.get("PACELINE_TOKEN")
        path = os.environ.get("PACELINE_TOKEN_FILE")
        token_file = Path(path) if path and not token else None
        if token_file is not None:
            _token_in(token_file)
        if tls is True:
            tls = TLS()
        elif isinstance(tls, str | Path):
            tls = TLS(ca=tls)
        return cls(tls=tls or None, token=token, token_file=token_file)

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The metadata of every call."""
        token = self.token if self.token_file is None else _token_in(self.token_file)
        return (("authorization", f"Bearer {token}"),) if token else ()

    def channel(self, target: str, ping_s: int = PING_S) -> grpc.aio.Channel:
        """A channel to "host:port".

        Args:
            target: Where to.
            ping_s: Seconds without any byte received after which a ping that is not answered ends the connection.

        Raises:
            InvalidInputError: A TLS file cannot be read.
        """
        options: list[tuple[str, int | str]] = [*_OPTIONS, ("grpc.keepalive_timeout_ms", ping_s * 1000)]
        if self.tls is None:
            return grpc.aio.insecure_channel(target, options=options)
        credentials = grpc.ssl_channel_credentials(_read(self.tls.ca), _read(self.tls.key), _read(self.tls.cert))
        if self.tls.server_name is not None:
            options.append(("grpc.ssl_target_name_override", self.tls.server_name))
        return grpc.aio.secure_channel(target, credentials, options=options)


def split_address(address: str) -> tuple[str, int]:
    """Host and port of "host:port" or "[IPv6]:port"; the host keeps its brackets.

    Raises:
        InvalidInputError: The address has another form.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise InvalidInputError(f"address {address!r} is not of the form host:port, such as ps.example.org:7070")
    return host, int(port)


def error_of(error: grpc.RpcError, target: str) -> PacelineError:
    """The error that a failed call to a target stands for."""
    if not isinstance(error, grpc.aio.AioRpcError):
        return UnavailableError(f"the call to {target} failed: {error}")
    return error_of_status(error.code(), error.details(), error.trailing_metadata(), target)


def error_of_status(
    code: grpc.StatusCode, details: str | None, metadata: grpc.aio.Metadata | None, target: str
) -> PacelineError:
    """The error that a call's status stands for: of the class that the peer named, or the one that the code implies."""
    told = dict(metadata or ())
    named = told.get(ERROR_METADATA_KEY)
    details = details or code.name
    if named == SupersededError.__name__:
        newest = str(told.get(NEWEST_INCARNATION_KEY, ""))
        return SupersededError(details, int(newest) if _INCARNATION.fullmatch(newest) else None)
    if named in ERRORS_BY_NAME:
        return ERRORS_BY_NAME[str(named)](details)
    if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
        return UnauthenticatedError(f"{target} refused this worker: {details}")
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return ProtocolVersionError(f"{target} is not a Paceline server of this protocol version: {details}")
    if code in _TRANSIENT:
        return UnavailableError(f"{target} cannot be reached: {details}")
    return PacelineError(f"{target} failed with {code.name}: {details}")


def backoff_s(jitter: random.Random) -> Iterator[float]:
    """Seconds to wait before each attempt: doubling, with jitter so that workers do not come all at once."""
    longest = FIRST_BACKOFF_S
    while True:
        yield jitter.uniform(longest / 2, longest)
        longest = min(2 * longest, LONGEST_BACKOFF_S)


def _token_in(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise InvalidInputError(f"the token file {path} (PACELINE_TOKEN_FILE) cannot be read: {reason}") from None


def _read(path: str | Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InvalidInputError(f"the TLS file {path} cannot be read: {error.strerror}") from error
