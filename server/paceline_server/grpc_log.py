"""Keeps strangers from filling the log: what a peer sends that is no message is the peer's error, not the server's."""

import logging

from google.protobuf.message import DecodeError

_LOGGER = "grpc._cython.cygrpc"


class _Readable(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        """Let everything pass but the tracebacks of messages and headers that could not be read."""
        kind = record.exc_info[0] if record.exc_info else None
        return kind is None or not issubclass(kind, (DecodeError, UnicodeDecodeError))


_FILTER = _Readable()


def leave_out_unreadable_messages() -> None:
    """Let gRPC write no traceback for each unreadable request, in this process.

    Our own services refuse them by name (`paceline_wire.bulk.handlers`); those of other packages, such as the health
    checks that need no token, end the call as an accident, which gRPC logs at length.
    """
    logging.getLogger(_LOGGER).addFilter(_FILTER)
