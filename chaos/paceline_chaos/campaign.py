"""Carries a plan out: kills the server again and again while every worker and link has troubles of its own.

The server's faults come one after the other, each worker's too; all of these go on side by side. Nothing waits for
fixed times: the next kill comes once something was acknowledged since the last one, a worker's next fault once it has
pushed again, and every wait has a bound whose passing is a finding.
"""

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from paceline_chaos.links import ActiveFault, FaultyLink, LinkFault, Way
from paceline_chaos.outcome import Outcome
from paceline_chaos.plan import Kind, ServerFault, WorkerFault, server_faults, worker_faults
from paceline_chaos.servers import OwnServer, Server, fill, is_full
from paceline_chaos.testimony import WitnessLogs
from paceline_chaos.verdict import Verifier
from paceline_chaos.workers import Witness, WitnessSettings, clock_was_read
from paceline_wire.errors import PacelineError

PATIENCE_S = 240.0
"""Seconds within which whatever is waited for must happen: some times the 50 s in which a dead connection is found."""

FIRE_S = 30.0
"""Seconds in which a fault must find something to hit, before it is tried again."""

ATTEMPTS = 4
"""Times that it is tried."""

TELL_EVERY = 10
"""Kills of the server between two lines of progress."""

LOOK_EVERY_S = 0.05


class LostError(Exception):
    """Something did not hold; the message says what."""


@dataclass(frozen=True, kw_only=True)
class CampaignSettings:
    """What is done to which deployment.

    Attributes:
        seed: Decides everything that is drawn.
        kinds: The faults to use.
        kills: Kills of the server; None: as many as there is time for.
        faults: Faults of workers and links; None: as many as there is time for.
        seconds: Seconds after which no further fault begins; None: only the numbers bound the run.
        workers: Witnesses.
        shards: Shards of the server.
        data_dir: The server's data directory, if it can be read here.
        balloon: The file that fills the server's disk; None: it is not filled.
        encrypted: Whether connections use TLS.
    """

    seed: int
    kinds: Sequence[Kind]
    kills: int | None
    faults: int | None
    seconds: float | None
    workers: int
    shards: int
    data_dir: Path | None
    balloon: Path | None
    encrypted: bool = False


class Campaign:
    """One deployment under fire.

    Args:
        settings: What is done.
        server: The server, not started yet if it is chaos's own.
        witnesses: What the workers have in common.
        tell: Told a line of progress now and then.
    """

    def __init__(
        self, settings: CampaignSettings, server: Server, witnesses: WitnessSettings, tell: Callable[[str], None]
    ) -> None:
        self.outcome = Outcome(seed=settings.seed)
        self.testimony = WitnessLogs(witnesses.folder)
        self._settings = settings
        self._server = server
        self._witness_settings = witnesses
        self._tell = tell
        self._verifier = None if settings.data_dir is None else Verifier(settings.data_dir, self.testimony)
        self._reading = asyncio.Lock()
        self._workers: list[Witness] = []
        self._over_s = float("inf")

    async def run(self) -> Outcome:
        """Do all of it; the outcome says what did not hold."""
        began_s = time.monotonic()
        if self._settings.seconds is not None:
            self._over_s = began_s + self._settings.seconds
        async with AsyncExitStack() as stack:
            try:
                await self._begin(stack)
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._break_server())
                    for number, worker in enumerate(self._workers):
                        group.create_task(self._break_worker(number, worker))
                await self._finish()
            except* LostError as lost:
                self.outcome.lost += [str(error) for error in _leaves(lost)]
            except* PacelineError as failed:
                self.outcome.lost += [str(error) for error in _leaves(failed)]
        self.outcome.starts = sum(worker.starts for worker in self._workers)
        ends = [end for worker in self._workers for end in worker.ends]
        self.outcome.ends = [end.sentence for end in ends]
        self.outcome.lost += [end.sentence for end in ends if not end.excused]
        self.outcome.looks = self._verifier.looks if self._verifier is not None else 0
        self.outcome.took_s = time.monotonic() - began_s
        return self.outcome

    async def _begin(self, stack: AsyncExitStack) -> None:
        if isinstance(self._server, OwnServer):
            await self._server.start()
            stack.push_async_callback(self._server.close)
        for number in range(self._settings.workers):
            link = FaultyLink(
                self._server.address, seed=self._settings.seed + number, encrypted=self._settings.encrypted
            )
            await stack.enter_async_context(link)
            worker = Witness(f"witness-{number}", link, self._witness_settings)
            self._workers.append(worker)
            stack.push_async_callback(worker.close)
            await worker.start()
        await self._until(lambda: len(self.testimony.pushes_of) == len(self._workers), "not every worker ever pushed")

    async def _finish(self) -> None:
        """Let everybody push once more without faults, end in order, and compare."""
        for worker in self._workers:
            worker.link.cut()
        await asyncio.gather(*(self._require_push(worker.name, "the last fault") for worker in self._workers))
        await asyncio.gather(*(worker.finish() for worker in self._workers))
        if isinstance(self._server, OwnServer):
            code = await self._server.finish()
            if code:
                raise LostError(f"the server ended with code {code} after SIGTERM")
        await self._compare()

    async def _break_server(self) -> None:
        settings = self._settings
        if not any(kind.on_server for kind in settings.kinds):
            return
        faults = server_faults(settings.seed, settings.kinds, shards=settings.shards)
        for number, fault in enumerate(itertools.islice(faults, settings.kills), start=1):
            await asyncio.sleep(fault.pause_s)
            if time.monotonic() > self._over_s:
                return
            await self._break_server_once(fault)
            if number % TELL_EVERY == 0:
                self._tell(self._progress())

    async def _break_server_once(self, fault: ServerFault) -> None:
        outcome = self.outcome
        if fault.fill and self._settings.balloon is not None:
            await self._fill_disk(self._settings.balloon)
        if fault.stopped_s is not None:
            await self._server.stop_for(fault.stopped_s)
            outcome.count(Kind.SERVER_STOP).happened()
            after_s = await self._require_any_push("SIGSTOP and SIGCONT of the server")
            outcome.count(Kind.SERVER_STOP).was_survived(after_s)
        if Kind.SERVER_KILL not in self._settings.kinds:
            return
        began_s = time.monotonic()
        await self._server.kill(fault.one_shard)
        killed_s = time.monotonic() - began_s
        outcome.count(Kind.SERVER_KILL).happened()
        await self._compare()
        if fault.jump_s is not None and isinstance(self._server, OwnServer):
            await asyncio.to_thread(self._server.clock_file.write_text, repr(fault.jump_s))
        outcome.recovery_s.append(killed_s + await self._server.start())
        after_s = await self._require_any_push("SIGKILL and restart of the server")
        outcome.count(Kind.SERVER_KILL).was_survived(after_s)
        if fault.jump_s is not None and isinstance(self._server, OwnServer):
            clock_file, jump_s = self._server.clock_file, fault.jump_s
            await self._until(lambda: clock_was_read(clock_file, jump_s), "the server never read its moved clock")
            outcome.count(Kind.SERVER_CLOCK).happened()
            outcome.count(Kind.SERVER_CLOCK).was_survived(after_s)

    async def _fill_disk(self, balloon: Path) -> None:
        count = self.outcome.count(Kind.FULL_DISK)
        num_bytes = await asyncio.to_thread(fill, balloon)
        deadline_s = time.monotonic() + PATIENCE_S
        while not await is_full(self._server.address):
            if time.monotonic() > deadline_s:
                raise LostError("the disk is full, and the server does not tell")
            # A snapshot that was given up leaves room again.
            num_bytes += await asyncio.to_thread(fill, balloon)
        count.happened(num_bytes)
        await asyncio.to_thread(balloon.unlink)
        count.was_survived(await self._require_any_push("the disk was full and has room again"))

    async def _compare(self) -> None:
        """Compare the stopped server's directory with the witnesses.

        Raises:
            LostError: Something is not as it was acknowledged.
        """
        if self._verifier is None:
            return
        async with self._reading:
            verdict = await asyncio.to_thread(self._verifier.look)
        self.outcome.verdict = verdict
        if verdict.lost:
            self.outcome.lost += verdict.lost[1:]
            raise LostError(verdict.lost[0])

    async def _break_worker(self, number: int, worker: Witness) -> None:
        settings = self._settings
        faults = worker_faults(settings.seed, settings.kinds)
        for fault in itertools.islice(faults, number, settings.faults, settings.workers):
            await asyncio.sleep(fault.pause_s)
            if time.monotonic() > self._over_s:
                return
            await self._break_worker_once(worker, fault)

    async def _break_worker_once(self, worker: Witness, fault: WorkerFault) -> None:
        count = self.outcome.count(fault.kind)
        for _ in range(ATTEMPTS):
            touched = await self._apply(worker, fault)
            if touched is not None:
                break
        else:
            raise LostError(f"{fault.kind.value} found nothing to hit at worker {worker.name} in {ATTEMPTS} attempts")
        count.happened(touched)
        count.was_survived(await self._require_push(worker.name, f"{fault.kind.value} of worker {worker.name}"))

    async def _apply(self, worker: Witness, fault: WorkerFault) -> int | None:
        """Let a fault happen; returns the bytes that it touched, or None if it found nothing to hit."""
        if fault.kind is Kind.WORKER_KILL:
            await worker.restart_killed()
            return 0
        if fault.kind is Kind.WORKER_STOP:
            await worker.stop_for(fault.lasts_s)
            return 0
        if fault.kind is Kind.WORKER_CLOCK:
            was_read = await worker.restart_with_clock(fault.jump_s)
            await self._until(was_read, f"worker {worker.name} never read its moved clock")
            return 0
        return await self._afflict(worker, fault)

    async def _afflict(self, worker: Witness, fault: WorkerFault) -> int | None:
        link = worker.link
        active = ActiveFault(
            kind=LinkFault(fault.kind.value),
            way=Way.UP if fault.up else Way.DOWN,
            bytes_per_s=fault.bytes_per_s,
            delay_s=fault.delay_s,
        )
        link.begin(active)
        try:
            await asyncio.wait_for(active.fired.wait(), FIRE_S)
            worker.garbled_since_start |= active.kind.garbles and not self._settings.encrypted
            cuts = fault.ends_with_cut and (active.kind.garbles or active.kind is LinkFault.BLACKHOLE)
            if active.kind.lasts or cuts:
                await asyncio.sleep(fault.lasts_s)
        except TimeoutError:
            return None
        finally:
            link.end(active)
        if cuts:
            link.cut()
        return active.num_bytes

    async def _require_push(self, worker: str, after: str) -> float:
        """Wait for an acknowledgement of this worker; returns the seconds that it took.

        Raises:
            LostError: None came.
        """
        await self._refresh()
        before = self.testimony.pushes_of.get(worker, 0)
        sentence = f"worker {worker} had no push acknowledged within {PATIENCE_S:g} s after {after}"
        return await self._until(lambda: self.testimony.pushes_of.get(worker, 0) > before, sentence)

    async def _require_any_push(self, after: str) -> float:
        await self._refresh()
        before = len(self.testimony.acknowledged)
        sentence = f"no push of any worker was acknowledged within {PATIENCE_S:g} s after {after}"
        return await self._until(lambda: len(self.testimony.acknowledged) > before, sentence)

    async def _until(self, condition: Callable[[], bool], otherwise: str) -> float:
        began_s = time.monotonic()
        deadline_s = began_s + PATIENCE_S
        while not condition():
            if time.monotonic() > deadline_s:
                raise LostError(otherwise)
            await asyncio.sleep(LOOK_EVERY_S)
            await self._refresh()
        return time.monotonic() - began_s

    async def _refresh(self) -> None:
        async with self._reading:
            await asyncio.to_thread(self.testimony.refresh)

    def _progress(self) -> str:
        counts = self.outcome.counts
        kills = self.outcome.count(Kind.SERVER_KILL).fired
        others = sum(count.fired for kind, count in counts.items() if not kind.on_server)
        pushes = len(self.testimony.acknowledged)
        return f"{kills} kills of the server, {others} faults of workers and links, {pushes} pushes acknowledged"


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    found: list[BaseException] = []
    for error in group.exceptions:
        found += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return found
