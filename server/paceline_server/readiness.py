"""Tells systemd that the server serves, where systemd started it and asks for that (Type=notify)."""

import logging
import os
import socket

_log = logging.getLogger(__name__)


def tell_ready() -> None:
    """Send READY=1 to the socket that NOTIFY_SOCKET names, if it names one; see sd_notify(3)."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path:
        return
    # The name of an abstract socket begins with a null byte, which no variable can hold.
    address = "\0" + path.removeprefix("@") if path.startswith("@") else path
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"READY=1", address)
    except OSError as error:
        _log.warning("NOTIFY_SOCKET = %r cannot be told that the server serves: %s", path, error)
