"""The list of revoked credentials: one id a line, what follows it on the line is a remark; # begins a comment.

An id is a token's `jti`, a certificate's serial number or its SHA-256 fingerprint, in hexadecimal; colons in it, as
other tools write them, do not count.
"""

import re
from pathlib import Path

from paceline_wire.errors import ConfigurationError

_ID = re.compile(r"[0-9a-f]{1,64}")


def read_revoked(path: Path) -> frozenset[str]:
    """The ids in a list.

    Raises:
        ConfigurationError: The file cannot be read, or has a line without an id.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise ConfigurationError(f"security.revoked = '{path}' cannot be read: {error.strerror}.") from None
    ids = set()
    for number, line in enumerate(lines, start=1):
        words = line.split("#", 1)[0].split()
        if not words:
            continue
        found = words[0].lower().replace(":", "").lstrip("0")
        if not _ID.fullmatch(found):
            raise ConfigurationError(f"security.revoked = '{path}': line {number} does not begin with an id.")
        ids.add(found)
    return frozenset(ids)


def is_revoked(ids: frozenset[str], revoked: frozenset[str]) -> bool:
    """Whether one of a credential's ids is in the list, leading zeros aside."""
    return any(each.lstrip("0") in revoked for each in ids)
