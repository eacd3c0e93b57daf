"""What the parts of the configuration are built on: their common base, and the forms of addresses and files.

The checks raise ValueError with the end of a sentence that begins with the field's name.
"""

import ipaddress
import re
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

MAX_PORT = 65535

_NAME = re.compile(r"[A-Za-z0-9._-]+")
_ADDRESS = re.compile(rf"(?:\[(?P<ipv6>[^\]]+)\]|(?P<name>{_NAME.pattern})):(?P<port>[0-9]{{1,5}})")


class Section(BaseModel):
    """What all parts of the configuration share: frozen, closed to unknown keys, and silent about values in errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    @field_validator("*", mode="before")
    @classmethod
    def _keep_booleans_apart(cls, value: object, info: ValidationInfo) -> object:
        # pydantic would read `lr = true` as 1.0.
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("should not be true or false")
        return value


def split_address(address: str) -> tuple[str, int]:
    """Split "host:port" or "[IPv6]:port" into the host, without brackets, and the port.

    Raises:
        ValueError: It has another form.
    """
    match = _ADDRESS.fullmatch(address)
    if match is None or int(match["port"]) > MAX_PORT or (match["ipv6"] and not _is_ipv6(match["ipv6"])):
        raise ValueError("should be host:port, such as 127.0.0.1:7070 or [::1]:7070, with a port from 0 to 65535")
    return match["ipv6"] or match["name"], int(match["port"])


def check_host(host: str) -> None:
    """Accept a host name, an IPv4 or an IPv6 address.

    Raises:
        ValueError: It is something else.
    """
    if not _NAME.fullmatch(host) and not _is_ipv6(host):
        raise ValueError("should be a host name or an IP address, without a port")


def check_readable(path: Path) -> None:
    """Accept a file that this process can read.

    Raises:
        ValueError: It cannot.
    """
    try:
        path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None


def _is_ipv6(host: str) -> bool:
    try:
        ipaddress.IPv6Address(host)
    except ValueError:
        return False
    return True
