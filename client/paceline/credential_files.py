"""Files of credentials, which are read again whenever they are needed, so that renewed ones are taken.

Whoever renews a file may empty it for a moment, or have it away: what it was before counts until it is there again.
"""

import logging
from pathlib import Path

from paceline_wire.errors import InvalidInputError

_log = logging.getLogger(__name__)


class CredentialFiles:
    """The files that one worker has read, and what was in each of them last."""

    def __init__(self) -> None:
        self._last: dict[Path, bytes] = {}
        self._troubled: set[Path] = set()

    def read(self, path: str | Path, what: str) -> bytes:
        """What is in a file; if that is nothing now, or cannot be read, what was in it last.

        Args:
            path: The file.
            what: What it is, for the error.

        Raises:
            InvalidInputError: It cannot be read, or is empty, and never was otherwise.
        """
        path = Path(path)
        try:
            content = path.read_bytes()
            problem = "it is empty"
        except OSError as error:
            content, problem = b"", error.strerror or str(error)
        if content.strip():
            self._last[path] = content
            self._troubled.discard(path)
            return content
        if path not in self._last:
            raise InvalidInputError(f"the {what} {path} cannot be used: {problem}")
        if path not in self._troubled:
            self._troubled.add(path)
            _log.warning("the %s %s cannot be used now (%s); what was in it before still counts", what, path, problem)
        return self._last[path]
