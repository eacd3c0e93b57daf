"""For the container's HEALTHCHECK: asks a shard whether it serves; exits with 0 if so, with a sentence if not.

It speaks the standard gRPC health protocol, which needs no token, and imports nothing heavy: a few tenths of a second.
With --alive an answer is enough: for liveness probes, which must not kill a shard that writes its last snapshot.

Variables: HEALTHCHECK_ADDRESS (default 127.0.0.1:7070) and, where the shard has TLS, HEALTHCHECK_CA: a PEM file with
the authority of its certificate, which must then be valid for the host in the address (so give it localhost as a second
name). If the shard also asks for client certificates: HEALTHCHECK_CERT and HEALTHCHECK_KEY.
"""

import os
import sys
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

TIMEOUT_S = 4.0
"""Below the five seconds that the image's HEALTHCHECK allows, so that the reason is told."""


def serving(address: str, ca: str | None, cert: str | None, key: str | None) -> bool:
    """Whether the shard at "host:port" says that it serves; the files are for TLS.

    Raises:
        grpc.RpcError: It does not answer.
        OSError: A file cannot be read.
    """
    options = [("grpc.enable_http_proxy", 0)]
    if ca is None:
        channel = grpc.insecure_channel(address, options=options)
    else:
        root, own_key, own_cert = (Path(path).read_bytes() if path else None for path in (ca, key, cert))
        channel = grpc.secure_channel(address, grpc.ssl_channel_credentials(root, own_key, own_cert), options=options)
    with channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def main() -> None:
    """Entry point."""
    address = os.environ.get("HEALTHCHECK_ADDRESS") or "127.0.0.1:7070"
    files = (os.environ.get(f"HEALTHCHECK_{name}") or None for name in ("CA", "CERT", "KEY"))
    try:
        if not serving(address, *files) and "--alive" not in sys.argv[1:]:
            sys.exit(f"{address} answers, but does not serve: it is starting or stopping")
    except grpc.RpcError as error:
        sys.exit(f"{address} does not answer: {error.details() if isinstance(error, grpc.Call) else error}")
    except OSError as error:
        sys.exit(f"a TLS file cannot be read: {error}")


if __name__ == "__main__":
    main()
