"""Child processes that speak JSON lines: started, listened to, and ended together, so that none is left behind."""

import asyncio
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import AsyncGenerator
from types import TracebackType
from typing import IO, Any, Self

STOP_TIMEOUT_S = 10.0
"""How long a child may take to stop when asked, before it is killed; a server drains within a second or two."""
STDERR_TAIL_LINES = 15
"""Lines of a failed child's standard error that are shown."""


class ChildFailedError(Exception):
    """A child process ended on its own, without having done its work; the message shows its last words."""


class Child:
    """One child process: its standard input is a pipe, its output JSON lines, its standard error kept in a file."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, stderr: IO[bytes]) -> None:
        self.name = name
        self._process = process
        self._stderr = stderr

    async def events(self) -> AsyncGenerator[dict[str, Any], None]:
        """Yield what the child prints until it closes its output; lines that aren't JSON objects are passed over.

        Raises:
            ChildFailedError: It then exited with anything but 0.
        """
        assert self._process.stdout is not None  # noqa: S101  # it was started with a pipe
        while line := await self._process.stdout.readline():
            with contextlib.suppress(json.JSONDecodeError):
                if isinstance(event := json.loads(line), dict):
                    yield event
        if await self._process.wait() != 0:
            raise self.failure()

    async def events_until(self, last: str) -> AsyncGenerator[dict[str, Any], None]:
        """Yield what the child prints, up to and including the first event of the kind `last`.

        Raises:
            ChildFailedError: It ended without one.
        """
        async with contextlib.aclosing(self.events()) as events:
            async for event in events:
                yield event
                if event.get("event") == last:
                    return
        raise self.failure()

    async def expect(self, kind: str) -> dict[str, Any]:
        """Pass over what the child prints until an event of this kind, and return that.

        Raises:
            ChildFailedError: It ended without one.
        """
        return [event async for event in self.events_until(kind)][-1]

    async def finish(self) -> None:
        """Wait until the child has ended by itself.

        Raises:
            ChildFailedError: It exited with anything but 0.
        """
        async for _ in self.events():
            pass

    def failure(self) -> ChildFailedError:
        """Return the error that says how this child, which has ended, went wrong."""
        self._stderr.seek(0)
        tail = self._stderr.read().decode(errors="replace").splitlines()[-STDERR_TAIL_LINES:]
        code = self._process.returncode
        how = "ended too early" if code in (None, 0) else f"failed with exit code {code}"
        words = "; its last words:" if tail else ", without a word"
        return ChildFailedError("\n".join([f"{self.name} {how}{words}", *(f"  {line}" for line in tail)]))

    def send_line(self, text: str) -> None:
        """Write a line to the child's standard input."""
        assert self._process.stdin is not None  # noqa: S101  # it was started with a pipe
        self._process.stdin.write(text.encode() + b"\n")

    def close_input(self) -> None:
        """End the child's standard input."""
        assert self._process.stdin is not None  # noqa: S101  # it was started with a pipe
        self._process.stdin.close()

    async def stop(self) -> None:
        """End the process if it still runs: ask first, then kill. Returns once it is gone."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()
            try:
                await asyncio.wait_for(self._process.wait(), STOP_TIMEOUT_S)
            except TimeoutError:
                self._process.kill()
                await self._process.wait()

    def close(self) -> None:
        """Kill the process if it still runs, and drop what was kept of its standard error."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
        self._stderr.close()


class Children:
    """Owns child processes: `async with Children() as children`. Leaving it, however, ends those that still run."""

    def __init__(self) -> None:
        self._children: list[Child] = []

    async def start_module(self, name: str, module: str, *arguments: str) -> Child:
        """Start `python -m module arguments...` with this interpreter.

        Args:
            name: What messages call it.
            module: The module to run.
            *arguments: Its command line.

        Returns:
            The child, already owned.
        """
        stderr = tempfile.TemporaryFile()  # noqa: SIM115  # open for as long as the child may fail
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", module, *arguments),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=stderr,
            # One thread each: the processes share the machine's cores already.
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
            start_new_session=True,  # Ctrl-C is ours to handle: children are ended in order, not interrupted
        )
        child = Child(name, process, stderr)
        self._children.append(child)
        return child

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            await asyncio.gather(*(child.stop() for child in self._children))
        finally:  # also if a second Ctrl-C cut the line above short
            for child in self._children:
                child.close()
