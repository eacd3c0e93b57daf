"""A shard of a run as a Ray actor: keeps a shard's process going on its node, and says where it listens.

The shard has a process of its own, which is spoken to in lines of JSON (paceline_server.shard_process): an actor's
process has threads and a loop of Ray's, and the shard's has one event loop and nothing else. It ends with the actor,
whose end closes its stdin.
"""

import json
import logging
import subprocess
import sys
import threading
from contextlib import suppress
from typing import Any

import ray

from paceline.ray.follower import BookFollower
from paceline.ray.status import ActorStatus, RunSpec
from paceline_wire.errors import ERRORS_BY_NAME, ConfigurationError, PacelineError, StorageError, UnavailableError

_log = logging.getLogger(__name__)

RETRY_S = 1.0
"""Seconds before a shard that ended or could not start is started again."""

STOP_S = 15.0
"""Seconds that a shard gets to finish before it is killed: longer than it takes to drain its streams."""

_WILDCARDS = ("0.0.0.0", "::")  # noqa: S104  # recognized, not listened on


class ShardActor:
    """One shard; a Ray actor.

    Args:
        spec: The run.
        index: Which of its shards this is.
    """

    def __init__(self, spec: RunSpec, index: int) -> None:
        self._spec = spec
        self._index = index
        self._process: subprocess.Popen[str] | None = None
        self._address = ""
        self._state = "starting"
        self._error = ""
        self._stopping = threading.Event()
        self._speaking = threading.Lock()
        self._book = BookFollower(spec, self._book_changed)
        self._keeping = threading.Thread(target=self._keep, name="paceline-shard", daemon=True)
        self._keeping.start()

    def status(self) -> ActorStatus:
        """What this actor is doing."""
        process = self._process
        return ActorStatus(
            index=self._index,
            state=self._state,
            node=ray.get_runtime_context().get_node_id(),
            pid=process.pid if process is not None else 0,
            address=self._address,
            error=self._error,
        )

    def stop(self) -> None:
        """Let the shard finish what it has begun, and end it."""
        self._stopping.set()
        self._book.close()
        process = self._process
        if process is not None:
            process.terminate()
        self._keeping.join(STOP_S)
        if process is not None:
            process.kill()

    def _keep(self) -> None:
        """Serve until told to stop; a shard that ends or cannot start is started again."""
        while not self._stopping.is_set():
            self._state = "starting"
            try:
                self._serve()
            except ConfigurationError as error:
                self._state, self._error = "failed", str(error)
                return
            except (PacelineError, OSError) as error:
                # The directory may be held a little longer by a process that was cut off with its node.
                self._state, self._error = "refused", f"{type(error).__name__}: {error}"
                _log.warning("shard %d cannot serve now: %s", self._index, error)
            self._stopping.wait(RETRY_S)

    def _serve(self) -> None:
        """Serve once, until the shard's process ends.

        Raises:
            ConfigurationError: The shard refuses the configuration.
            StorageError: Its directory is in use, damaged, of another run, or not there.
            UnavailableError: The process ended by itself.
        """
        if not self._spec.mark.is_file():
            raise StorageError(
                f"node {_node_ip()} does not see the run's data directory: {self._spec.mark} is not there. "
                "data_dir must be on storage that every node has at the same path"
            )
        command = [sys.executable, "-m", "paceline_server.shard_process"]
        self._process = process = subprocess.Popen(  # noqa: S603  # the command is ours
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, process_group=0
        )
        try:
            config = self._config()
            self._tell(config=config, index=self._index, log_level=self._spec.log_level)
            self._address = _advertised(config["listen"], int(self._heard()["port"]))
            self._book.report(self._index, self._address)
            self._tell(shards=self._addresses())
            self._heard()
            self._state, self._error = "serving", ""
            self._tell_where_shards_are()
            code = process.wait()
        finally:
            self._address = ""
            self._end(process)
        if not self._stopping.is_set():
            raise UnavailableError(f"its process ended by itself with code {code}; see its messages in Ray's logs")

    def _config(self) -> dict[str, Any]:
        storage = {**self._spec.config.get("storage", {}), "data_dir": str(self._spec.data_dir)}
        listen = self._spec.config.get("listen", f"{_bracketed(_node_ip())}:0")
        return {**self._spec.config, "listen": listen, "shards": self._spec.num_shards, "storage": storage}

    def _addresses(self) -> list[str]:
        """Where the shards are, once all have been somewhere; this one is here, whatever the book says."""
        addresses = self._book.wait()
        addresses[self._index] = self._address
        return addresses

    def _book_changed(self, written: list[str]) -> None:
        """Hear of shards that move, and write into a book that does not know, or no longer knows, where this one is."""
        address = self._address
        if not address:
            return
        if written[self._index] != address:
            self._book.report(self._index, address)
        if self._state == "serving":
            self._tell_where_shards_are()

    def _tell_where_shards_are(self) -> None:
        # A process that has just ended is started again, and then told.
        with suppress(OSError, ValueError):
            self._tell(shards=self._addresses())

    def _tell(self, **message: object) -> None:
        with self._speaking:
            if self._process is not None and self._process.stdin is not None:
                self._process.stdin.write(json.dumps(message) + "\n")
                self._process.stdin.flush()

    def _heard(self) -> dict[str, Any]:
        process = self._process
        line = process.stdout.readline() if process is not None and process.stdout is not None else ""
        if not line:
            raise UnavailableError("its process ended before it served; see its messages in Ray's logs")
        message: dict[str, Any] = json.loads(line)
        if "error" in message:
            raise ERRORS_BY_NAME[message["error"]](message["reason"])
        return message

    def _end(self, process: "subprocess.Popen[str]") -> None:
        process.kill()
        process.wait()
        with self._speaking:
            self._process = None
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with suppress(OSError):
                        pipe.close()


def _node_ip() -> str:
    return str(ray.util.get_node_ip_address())


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _advertised(listen: str, port: int) -> str:
    """Where others reach a shard that listens there."""
    host = listen.rpartition(":")[0].strip("[]")
    return f"{_bracketed(_node_ip() if host in _WILDCARDS else host)}:{port}"
