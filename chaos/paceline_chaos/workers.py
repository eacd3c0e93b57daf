"""Witnesses as processes, each behind a faulty link of its own: started, killed, stopped, and started again."""

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from paceline_chaos.clock import sitecustomize as clock
from paceline_chaos.links import FaultyLink
from paceline_chaos.servers import shifted_environment

FINISH_S = 60.0
"""Seconds that a witness gets to finish its round and leave."""


@dataclass(frozen=True, kw_only=True)
class WitnessSettings:
    """What all witnesses of a run have in common.

    Attributes:
        folder: Where logs go.
        seed: Decides what they push.
        pause_s: Seconds between rounds.
        keep_payloads: Whether payloads are written down whole.
        token: The run's token.
        tls_ca: CA file, where the run uses TLS.
    """

    folder: Path
    seed: int
    pause_s: float
    keep_payloads: bool = False
    token: str | None = None
    tls_ca: str | None = None


class End(NamedTuple):
    """How a witness ended that was not told to.

    Attributes:
        sentence: What it said.
        excused: Whether it may: bytes of its connection were changed outside of payloads, which without TLS nothing can
            tell from a message of the server, or it was starting and found no server.
    """

    sentence: str
    excused: bool


class Witness:
    """One worker: a process that is started again whenever it ends before it should.

    Args:
        name: Its worker_id.
        link: Its way to the server.
        settings: What all witnesses have in common.
    """

    def __init__(self, name: str, link: FaultyLink, settings: WitnessSettings) -> None:
        self.name = name
        self.link = link
        self.starts = 0
        self.ends: list[End] = []
        self.garbled_since_start = False
        self._settings = settings
        self._clock_file = settings.folder / f"{name}.clock"
        self._process: asyncio.subprocess.Process | None = None
        self._expected_to_end = False
        self._watch: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start a process of it."""
        settings = self._settings
        self.starts += 1
        self._expected_to_end = False
        self.garbled_since_start = False
        command = [sys.executable, "-m", "paceline_chaos.witness", "--address", self.link.address]
        command += ["--worker-id", self.name, "--start", str(self.starts), "--seed", str(settings.seed)]
        command += ["--log", str(self._log()), "--pause-s", str(settings.pause_s)]
        command += ["--keep-payloads"] if settings.keep_payloads else []
        command += ["--tls-ca", settings.tls_ca] if settings.tls_ca else []
        environment = shifted_environment(self._clock_file)
        if settings.token:
            environment["PACELINE_TOKEN"] = settings.token
        with self._log().with_suffix(".stderr").open("wb") as messages:
            self._process = await asyncio.create_subprocess_exec(
                *command, stdin=subprocess.PIPE, stdout=messages, stderr=messages, env=environment
            )
        self._watch = asyncio.create_task(self._start_again_when_ended(self._process))

    async def restart_killed(self) -> None:
        """Kill it and start it again under the same name."""
        await self._kill()
        await self.start()

    async def restart_with_clock(self, jump_s: float) -> Callable[[], bool]:
        """Kill it and start it with its wall clock moved; returns what tells whether it has read it."""
        await self._kill()
        self._clock_file.write_text(repr(jump_s))
        await self.start()
        return lambda: clock_was_read(self._clock_file, jump_s)

    async def stop_for(self, seconds: float) -> None:
        """Stop it, and let it go on."""
        process = self._running()
        with suppress(ProcessLookupError):  # it may end meanwhile, and is started again
            process.send_signal(signal.SIGSTOP)
            await asyncio.sleep(seconds)
            process.send_signal(signal.SIGCONT)

    async def finish(self) -> None:
        """Let it finish its round and leave; one that does not is killed."""
        self._expected_to_end = True
        process = self._running()
        if process.stdin is not None:
            process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), FINISH_S)
        except TimeoutError:
            sentence = f"worker {self.name} did not finish its last round within {FINISH_S:g} s"
            self.ends.append(End(sentence, excused=False))
        await self._kill()

    async def close(self) -> None:
        """End it if it still runs."""
        if self._process is not None:
            await self._kill()

    async def _kill(self) -> None:
        self._expected_to_end = True
        process = self._running()
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        if self._watch is not None:
            await self._watch

    async def _start_again_when_ended(self, process: asyncio.subprocess.Process) -> None:
        await process.wait()
        if self._expected_to_end:
            return
        self.ends.append(await asyncio.to_thread(self._end, process.returncode))
        await self.start()

    def _end(self, code: int | None) -> End:
        """What its log says of its end, or its messages."""
        said = [json.loads(line) for line in self._log().read_text().splitlines()[-1:]]
        link = "garbled" if self.garbled_since_start else "sound"
        opening = f"worker {self.name} ended by itself, its link {link} since its start"
        if not said or said[0]["event"] != "ended":
            tail = self._log().with_suffix(".stderr").read_text(errors="replace").splitlines()[-2:]
            return End(f"{opening}: exit code {code}; {' | '.join(tail)}", excused=False)
        # Who cannot reach a run at the start is told so; only a member must never see an error.
        unreached = said[0]["error"] == "UnavailableError" and not self._had_joined()
        sentence = f"{opening}: {said[0]['error']}: {said[0]['reason']}"
        return End(sentence, excused=self.garbled_since_start or unreached)

    def _had_joined(self) -> bool:
        return '"sent"' in self._log().read_text()

    def _running(self) -> asyncio.subprocess.Process:
        if self._process is None:
            raise RuntimeError(f"worker {self.name} was never started")
        return self._process

    def _log(self) -> Path:
        return self._settings.folder / f"{self.name}.{self.starts}.jsonl"


def clock_was_read(clock_file: Path, jump_s: float) -> bool:
    """Whether a process has read a clock that was moved by so many seconds."""
    try:
        return repr(jump_s) in clock.seen_path(clock_file).read_text().splitlines()
    except FileNotFoundError:
        return False
