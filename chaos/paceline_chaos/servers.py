"""The server that is broken: one that chaos starts itself, or a user's, which is killed and started by commands."""

import asyncio
import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

import paceline
from paceline_chaos.clock import sitecustomize as clock
from paceline_wire.errors import PacelineError, UnavailableError

START_S = 120.0
"""Seconds that a server gets to serve again: a bound, so that one that never does ends the run with a sentence."""

LOOK_EVERY_S = 0.05


class Server(Protocol):
    """Something that can be killed and started again."""

    @property
    def address(self) -> str:
        """Where it serves, "host:port"."""

    async def kill(self, one_shard: int | None = None) -> None:
        """End it with SIGKILL; returns once it is gone."""

    async def start(self) -> float:
        """Start it; returns the seconds until it served.

        Raises:
            UnavailableError: It did not.
        """

    async def stop_for(self, seconds: float) -> None:
        """Stop it with SIGSTOP, and let it go on."""


def shifted_environment(clock_file: Path) -> dict[str, str]:
    """The environment of a process whose wall clock follows a file."""
    here = str(Path(clock.__file__).parent)
    path = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, clock.VARIABLE: str(clock_file)}


class OwnServer:
    """`paceline serve` on a free port of loopback, with a data directory.

    Args:
        folder: Where its messages go.
        data_dir: Its data directory.
        shards: Its shards.
        flags: Further flags of `serve`.
    """

    def __init__(self, folder: Path, data_dir: Path, shards: int, flags: tuple[str, ...]) -> None:
        port = _free_ports(shards)
        self.clock_file = folder / "server.clock"
        self._address = f"127.0.0.1:{port}"
        self._messages = folder / "server.log"
        self._shards = shards
        self._command = [sys.executable, "-m", "paceline", "-v", "serve", "--json", "--listen", self._address]
        self._command += ["--shards", str(shards), "--storage.data-dir", str(data_dir), *flags]
        self._process: asyncio.subprocess.Process | None = None

    @property
    def address(self) -> str:
        """Where it serves."""
        return self._address

    async def kill(self, one_shard: int | None = None) -> None:
        """Kill all its processes, or one shard's, whose end ends the others."""
        process = self._running()
        children = _children(process.pid) if self._shards > 1 else []
        if one_shard is not None and children:
            os.kill(children[one_shard % len(children)], signal.SIGKILL)
        else:
            for pid in (process.pid, *children):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        await process.wait()
        await _until(lambda: not any(_runs(pid) for pid in children), "a killed shard did not end")

    async def start(self) -> float:
        """Start it with the same command; returns the seconds until it served.

        Raises:
            UnavailableError: It did not.
        """
        began_s = time.monotonic()
        with self._messages.open("ab") as messages:
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                stdout=subprocess.PIPE,
                stderr=messages,
                env=shifted_environment(self.clock_file),
                start_new_session=True,
            )
        stdout = self._process.stdout
        line = await asyncio.wait_for(stdout.readline(), START_S) if stdout is not None else b""
        if not line or json.loads(line).get("event") != "listening":
            tail = self._messages.read_text(errors="replace").splitlines()[-3:]
            raise UnavailableError(f"the server did not start again: {' | '.join(tail)}")
        return time.monotonic() - began_s

    async def stop_for(self, seconds: float) -> None:
        """Stop all its processes, and let them go on."""
        process = self._running()
        pids = [process.pid, *(_children(process.pid) if self._shards > 1 else [])]
        for number, pause_s in ((signal.SIGSTOP, seconds), (signal.SIGCONT, 0.0)):
            for pid in pids:
                os.kill(pid, number)
            await asyncio.sleep(pause_s)

    async def finish(self) -> int:
        """Let it end in order; its exit code."""
        process = self._running()
        process.terminate()
        return await asyncio.wait_for(process.wait(), START_S)

    async def close(self) -> None:
        """End it if it still runs."""
        if self._process is not None and self._process.returncode is None:
            await self.kill()

    def _running(self) -> asyncio.subprocess.Process:
        if self._process is None:
            raise UnavailableError("the server was never started")
        return self._process


class ForeignServer:
    """A user's own deployment, which commands of the user's kill and start.

    Args:
        address: "host:port" of one of its shards.
        kill_command: Ends it with SIGKILL.
        start_command: Starts it.
        token: The run's token.
        tls_ca: CA file, where it uses TLS.
    """

    def __init__(
        self, address: str, kill_command: str | None, start_command: str | None, token: str | None, tls_ca: str | None
    ) -> None:
        self._address = address
        self._commands = (kill_command, start_command)
        self._token, self._tls_ca = token, tls_ca

    @property
    def address(self) -> str:
        """Where it serves."""
        return self._address

    async def kill(self, one_shard: int | None = None) -> None:
        """Run the user's command."""
        await self._run(self._commands[0])

    async def start(self) -> float:
        """Run the user's command; returns the seconds until the server answered.

        Raises:
            UnavailableError: It did not.
        """
        began_s = time.monotonic()
        await self._run(self._commands[1])
        async with paceline.connect(self._address, reach_s=START_S, token=self._token, tls=self._tls_ca):
            return time.monotonic() - began_s

    async def stop_for(self, seconds: float) -> None:
        """Not for servers of others: there is no command for it."""
        raise UnavailableError("a server that chaos did not start cannot be stopped; leave out server-stop")

    async def _run(self, command: str | None) -> None:
        if command is None:
            raise UnavailableError("there is no command for that: give --kill-command and --start-command")
        process = await asyncio.create_subprocess_shell(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        _, said = await process.communicate()
        if process.returncode:
            raise UnavailableError(f"`{command}` failed with {process.returncode}: {said.decode(errors='replace')}")


async def is_full(address: str) -> bool:
    """Whether a server tells that its disk has no room."""
    try:
        async with paceline.connect(address, reach_s=START_S) as observer:
            return any("has no room" in warning for one in await observer.statuses() for warning in one.warnings)
    except PacelineError:
        return False


@contextmanager
def small_disk(path: Path, mib: int) -> Iterator[bool]:
    """A file system of so many MiB at a new folder; False if this process may not mount one."""
    mount, umount = shutil.which("mount"), shutil.which("umount")
    path.mkdir(parents=True)
    if mount is None or umount is None:
        yield False
        return
    options = ["-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(path)]
    mounted = subprocess.run([mount, *options], capture_output=True, check=False)  # noqa: S603  # the command is ours
    if mounted.returncode:
        yield False
        return
    try:
        yield True
    finally:
        subprocess.run([umount, "-l", str(path)], check=True)  # noqa: S603  # the command is ours


def fill(balloon: Path) -> int:
    """Take all room that a file system has; returns the bytes."""
    taken = 0
    try:
        with balloon.open("ab", buffering=0) as file:
            while True:
                taken += file.write(bytes(1 << 16))
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
    return taken


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _runs(pid: int) -> bool:
    """Whether anything of a process that is not this one's child still runs, and may hold files.

    Its first thread may be a zombie already while others are still ending.
    """
    process = Path(f"/proc/{pid}")
    try:
        is_zombie = (process / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
        return not is_zombie or len(list((process / "task").iterdir())) > 1
    except (FileNotFoundError, ProcessLookupError):
        return False


async def _until(condition: Callable[[], bool], otherwise: str) -> None:
    deadline_s = time.monotonic() + START_S
    while not condition():
        if time.monotonic() > deadline_s:
            raise UnavailableError(otherwise)
        await asyncio.sleep(LOOK_EVERY_S)


def _free_ports(count: int) -> int:
    """The first of so many free ports in a row."""
    for port in range(30_000 + os.getpid() % 500 * count, 32_700, count):
        with suppress(OSError):
            for each in range(port, port + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", each))
            return port
    raise UnavailableError("no port between 30000 and 32700 is free")
