"""Starts and stops the processes of a run's shards, and the embedded server for tests and notebooks."""

import json
import logging
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from paceline_server.config import ServerConfig
from paceline_server.settings import config_from_mapping, config_to_mapping
from paceline_wire.errors import ERRORS_BY_NAME, UnavailableError

STOP_S = 15.0
"""Seconds that a shard gets to finish before it is killed: longer than it takes to drain its streams."""


class ShardProcesses:
    """The processes of the shards of a run that are served on this host.

    Args:
        config: The run's configuration.
    """

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self.processes: list[subprocess.Popen[str]] = []
        self.ports: list[int] = []
        self.recoveries: list[dict[str, Any]] = []

    def start(self) -> None:
        """Start all shards; returns when all of them serve.

        Raises:
            ConfigurationError: A shard refused the configuration; the text is its own.
            StorageError: A shard's data directory is in use, damaged, or of another run; the text is its own.
            UnavailableError: A shard ended before it served.
        """
        try:
            mapping = config_to_mapping(self._config)
            for index in self._config.shard_indexes:
                self.processes.append(_started())
                level = logging.getLogger("paceline_server").getEffectiveLevel()
                _tell(self.processes[-1], {"config": mapping, "index": index, "log_level": level})
            self.ports = [int(_next_line(process)["port"]) for process in self.processes]
            for process in self.processes:
                _tell(process, {"ports": self.ports})
            self.recoveries = [_recovery(_next_line(process)) for process in self.processes]
        except BaseException:
            self.stop()
            raise

    def failed(self) -> list[int]:
        """Indexes of the shards whose processes have ended by themselves."""
        served = zip(self._config.shard_indexes, self.processes, strict=True)
        return [index for index, process in served if process.poll() not in (None, 0)]

    def drained(self) -> bool:
        """Whether all have ended because an operator drained them; one that is drained waits for the others."""
        return all(process.poll() == 0 for process in self.processes)

    def stop(self) -> int:
        """Let every shard finish and wait for it; the highest exit code."""
        for process in self.processes:
            process.terminate()
        return max((_ended(process) for process in self.processes), default=0)


@contextmanager
def local(config: Mapping[str, Any] | None = None) -> Iterator[str]:
    """An embedded server for tests and notebooks: processes of its own on free loopback ports.

    Args:
        config: A mapping of the same form as the configuration file; `listen` is a free loopback port unless given.

    Yields:
        The address of the first shard, "127.0.0.1:port"; clients find the others from it.

    Raises:
        ConfigurationError: The configuration is wrong.
        StorageError: The data directory is in use, damaged, or of another run.

    Example:
        with paceline_server.local({"schedule": {"kind": "barrier"}}) as address:
            ...
    """
    shards = ShardProcesses(config_from_mapping({"listen": "127.0.0.1:0", **(config or {})}))
    shards.start()
    try:
        yield f"127.0.0.1:{shards.ports[0]}"
    finally:
        shards.stop()


def _started() -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "paceline_server.shard_process"]
    # A group of its own: Ctrl-C in a terminal reaches the starter alone, which then stops the shards.
    return subprocess.Popen(  # noqa: S603  # the command is ours
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, process_group=0
    )


def _tell(process: "subprocess.Popen[str]", message: Mapping[str, object]) -> None:
    """Say a line to a shard; one that has ended says so itself, where its next line is waited for."""
    if process.stdin is not None:
        with suppress(BrokenPipeError):
            process.stdin.write(json.dumps(message) + "\n")
            process.stdin.flush()


def _next_line(process: "subprocess.Popen[str]") -> dict[str, Any]:
    line = process.stdout.readline() if process.stdout is not None else ""
    if not line:
        raise UnavailableError(
            f"a shard's process ended with code {process.wait()} before it served; see its messages above"
        )
    message: dict[str, Any] = json.loads(line)
    if "error" in message:
        raise ERRORS_BY_NAME[message["error"]](message["reason"])
    return message


def _recovery(serving: dict[str, Any]) -> dict[str, Any]:
    """What a shard that serves told of its recovery."""
    return {key: value for key, value in serving.items() if key != "event"}


def _ended(process: "subprocess.Popen[str]") -> int:
    try:
        code = process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        code = process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(BrokenPipeError):
                pipe.close()
    return code
