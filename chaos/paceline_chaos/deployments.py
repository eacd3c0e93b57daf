"""Puts a deployment under fire, chaos's own or a user's, and brings home what it came to."""

import asyncio
import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import paceline
from paceline_chaos.campaign import Campaign, CampaignSettings
from paceline_chaos.foreign import compare_fetched, require_comparable
from paceline_chaos.outcome import Outcome
from paceline_chaos.plan import Kind
from paceline_chaos.servers import ForeignServer, OwnServer, small_disk
from paceline_chaos.verdict import Verdict
from paceline_chaos.workers import WitnessSettings
from paceline_wire.errors import PacelineError

PAUSE_S = 0.4
"""Seconds between a witness's rounds: enough pushes to lose some, few enough for two cores and a small disk."""

DISK_MIB = 384
"""Size of the disk that is filled: the room that a server waits for before it goes on, and a journal beside it."""

FILLS = 3
"""Times that it is."""

FLAGS = (
    *("--outer.momentum", "0.9", "--outer.lr", "0.1", "--outer.late-bins", "1000000"),
    *("--schedule.quota", "4", "--schedule.lease-s", "3"),
    *("--exchange.uplink", "int4", "--exchange.fragment-elements", "20480"),
    *("--storage.replay-s", "0.05", "--storage.keep-snapshots", "1000000"),
)
"""A run with a closed form, whose journal stays whole, whose snapshots are frequent, and whose leases are short."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What was asked for.

    Attributes:
        seed: Decides everything that is drawn.
        kinds: The faults to use.
        kills: Kills of the server.
        faults: Faults of workers and links.
        seconds: Seconds after which no further fault begins.
        workers: Witnesses.
        shards: Shards of a deployment of chaos's own.
        data_dir: The server's data directory: for a deployment of chaos's own, where it is to be; for a user's, where
            it can be read here. None: a temporary one; or it cannot.
    """

    seed: int
    kinds: Sequence[Kind]
    kills: int | None
    faults: int | None
    seconds: float | None
    workers: int
    shards: int = 1
    data_dir: Path | None = None

    def settings(self, **other: object) -> CampaignSettings:
        """What a campaign is told, with what is different."""
        names = {field.name for field in dataclasses.fields(CampaignSettings)} & set(vars(self))
        same = {name: getattr(self, name) for name in names}
        return CampaignSettings(**{**same, "balloon": None, **other})


async def try_own(request: Request, tell: Callable[[str], None]) -> Outcome:
    """Start a deployment on this machine and break it; the full disk has one of its own, which is small."""
    ordinary = [kind for kind in request.kinds if kind is not Kind.FULL_DISK]
    outcome = Outcome(seed=request.seed)
    with tempfile.TemporaryDirectory(prefix="paceline-chaos-") as folder:
        if ordinary:
            data_dir = request.data_dir or Path(folder) / "data"
            settings = request.settings(kinds=ordinary, data_dir=data_dir)
            outcome = await _campaign(settings, Path(folder) / "logs", tell)
        if Kind.FULL_DISK in request.kinds and outcome.held:
            outcome = outcome.merged(await _with_full_disk(request, Path(folder), tell))
    return _with_every_kind(outcome, request)


async def try_foreign(
    request: Request,
    tell: Callable[[str], None],
    *,
    address: str,
    token: str | None,
    tls_ca: str | None,
    kill_command: str | None,
    start_command: str | None,
) -> Outcome:
    """Break a user's deployment by the user's commands and through faulty links.

    Raises:
        InvalidInputError: The run there is not one that can be compared; the text says what chaos needs.
    """
    async with paceline.connect(address, token=token, tls=tls_ca) as client:
        coefficients = require_comparable(client.configuration, initialized=client.manifest is not None)
    with tempfile.TemporaryDirectory(prefix="paceline-chaos-") as folder:
        witnesses = WitnessSettings(
            folder=Path(folder), seed=request.seed, pause_s=PAUSE_S, keep_payloads=True, token=token, tls_ca=tls_ca
        )
        server = ForeignServer(address, kill_command, start_command, token, tls_ca)
        settings = request.settings(encrypted=tls_ca is not None)
        campaign = Campaign(settings, server, witnesses, tell)
        outcome = await campaign.run()
        if outcome.held:
            try:
                async with paceline.connect(address, token=token, tls=tls_ca) as client:
                    found = await compare_fetched(client, campaign.testimony, coefficients, request.seed)
            except PacelineError as error:
                outcome.lost.append(f"the run could not be fetched at the end: {error}")
            else:
                outcome.lost += found.lost
                outcome.verdict = outcome.verdict or Verdict(
                    sent=len(campaign.testimony.sent),
                    acknowledged=found.acknowledged,
                    refused=len(campaign.testimony.refused),
                    found=found.acknowledged,
                    in_flight=found.in_flight,
                    distance=found.distance,
                )
    return _with_every_kind(outcome, request)


async def _campaign(settings: CampaignSettings, folder: Path, tell: Callable[[str], None]) -> Outcome:
    await asyncio.to_thread(folder.mkdir)
    if settings.data_dir is None:
        raise ValueError("a deployment of chaos's own has a data directory")
    server = OwnServer(folder, settings.data_dir, settings.shards, FLAGS)
    witnesses = WitnessSettings(folder=folder, seed=settings.seed, pause_s=PAUSE_S)
    return await Campaign(settings, server, witnesses, tell).run()


async def _with_full_disk(request: Request, folder: Path, tell: Callable[[str], None]) -> Outcome:
    disk = folder / "disk"
    with small_disk(disk, DISK_MIB) as mounted:
        if not mounted:
            reason = "a small file system could not be mounted here (it takes root)"
            return Outcome(seed=request.seed, skipped={Kind.FULL_DISK: reason})
        tell("the disk is filled now and then")
        kinds = [kind for kind in request.kinds if kind in (Kind.FULL_DISK, Kind.SERVER_KILL)]
        settings = request.settings(
            kinds=kinds, kills=FILLS, seconds=None, data_dir=disk / "data", balloon=disk / "balloon", faults=0, shards=1
        )
        return await _campaign(settings, folder / "disk-logs", tell)


def _with_every_kind(outcome: Outcome, request: Request) -> Outcome:
    """The outcome, to which it belongs that every kind happened for which faults enough were asked for."""
    of_workers = [kind for kind in request.kinds if not kind.on_server]
    enough = {True: (request.kills or 0) >= 2, False: (request.faults or 0) >= len(of_workers)}
    for kind in request.kinds:
        if kind in outcome.skipped or outcome.count(kind).fired or not outcome.held:
            continue
        if enough[kind.on_server] and request.seconds is None:
            outcome.lost.append(f"{kind.value} never happened, though there were faults enough for every kind")
        else:
            outcome.skipped[kind] = "the run was too short for it"
    return outcome
