"""A durable server of its own process that can be killed and started again at the same port."""

import json
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from integration.patience import PATIENCE_S


class KillableServer:
    """`paceline serve` with a data directory; a context manager that ends it.

    Args:
        data_dir: The data directory.
        flags: Further flags of `serve`.
        shards: Its shards.
    """

    def __init__(self, data_dir: Path, *flags: str, shards: int = 1) -> None:
        port = _free_ports(shards)
        self.address = f"127.0.0.1:{port}"
        self.announced: dict[str, Any] = {}
        self.kills = 0
        self._command = [sys.executable, "-m", "paceline", "serve", "--json", "--listen", self.address]
        self._command += ["--shards", str(shards), "--storage.data-dir", str(data_dir), *flags]
        self.process = self._started()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait(PATIENCE_S)
        self._close()

    def kill(self) -> None:
        """End it with SIGKILL."""
        self.process.kill()
        self.process.wait(PATIENCE_S)
        self.kills += 1
        self._close()

    def stop(self) -> int:
        """End it with SIGTERM; its exit code."""
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(PATIENCE_S)
        self._close()
        return code

    def start(self) -> None:
        """Start it again, with the same directory at the same port."""
        self._close()
        self.process = self._started()

    def restart(self) -> None:
        """Kill it and start it again."""
        self.kill()
        self.start()

    def _started(self) -> "subprocess.Popen[str]":
        process = subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        self.announced = json.loads(process.stdout.readline())
        return process

    def _close(self) -> None:
        if self.process.stdout is not None:
            self.process.stdout.close()


def _free_ports(count: int) -> int:
    """The first of so many free ports in a row; below those that the system gives out by itself."""
    for _ in range(1000):
        port = random.randrange(20_000, 30_000)
        try:
            for each in range(port, port + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", each))
        except OSError:
            continue
        return port
    raise AssertionError("no free ports")
