"""Acts of operators on a shard: done whole and noted, whoever hangs up, whatever the disk takes, or not at all."""

import asyncio
from typing import Any, Self

import pytest

from paceline_server.audit import AuditLog
from paceline_server.config import ServerConfig
from paceline_server.construction import build_shard
from paceline_server.engine import Engine
from paceline_server.journal import MembershipChanged, Record
from paceline_server.live_configuration import LiveConfiguration
from paceline_server.operations import LONGEST_EVICTION_S, Operations
from paceline_server.rules.base import RuleSettings
from paceline_server.rules.naive_momentum import NaiveMomentum
from paceline_server.security.caller import Caller
from paceline_server.security.identity import Identity, Role
from paceline_server.settings import config_from_mapping
from paceline_server.status import status_of
from paceline_wire.errors import InvalidInputError, StorageFullError
from paceline_wire.manifest import Manifest, TensorSpec

OPERATOR = Caller(identity=Identity(name="root", role=Role.ADMIN), peer="ipv4:192.0.2.1:1")


class FakeJournal:
    """A journal that keeps records in a list, waits when told to, and may be full."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.goes_on = asyncio.Event()
        self.goes_on.set()
        self.is_full = False

    async def append(self, record: Record) -> int:
        """Keep a record, if there is room."""
        await self.goes_on.wait()
        if self.is_full:
            raise StorageFullError("the disk is full")
        self.records.append(record)
        return len(self.records)

    def refuse_when_full(self) -> None:
        """Nothing is refused before it is tried."""

    async def close(self) -> None:
        """Do nothing."""


class Operated:
    """A shard whose journal a test has in its hands."""

    def __init__(self, config: ServerConfig | None = None) -> None:
        self.config = config or ServerConfig()
        self.journal = FakeJournal()
        self.engine = Engine(build_shard(self.config, 0), self.journal)
        self.live = LiveConfiguration(self.config)
        self.audit = AuditLog(None)
        self.operations = Operations(
            self.engine,
            self.live,
            None,
            self.audit,
            keep_settings=None,
            stop_serving=_nothing,
            end=lambda: None,
        )

    async def entries(self) -> list[tuple[str, str, str]]:
        """What the audit log has: acts, subjects and results."""
        return [(entry.act, entry.subject, entry.result) for entry in await self.audit.newest(10)]


async def _nothing() -> None:
    pass


@pytest.mark.parametrize("act", ["evict", "admit"])
async def test_an_act_whose_caller_hangs_up_is_done_whole_and_noted(act: str) -> None:
    """The deadline of an operator's call must not leave an act that nobody knows of."""
    operated = Operated()
    operated.engine.shard.membership.join(operated.engine.clock(), "a", 1)
    operations = operated.operations
    if act == "admit":
        await operations.evict(OPERATOR, "a", "", None)
    operated.journal.goes_on.clear()
    work = operations.evict(OPERATOR, "a", "", None) if act == "evict" else operations.admit(OPERATOR, "a")
    call: asyncio.Task[Any] = asyncio.create_task(work)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    operated.journal.goes_on.set()
    while operations._begun:
        await asyncio.wait(operations._begun)
    assert (await operated.entries())[-1] == (act, "a", "done")
    await operated.engine.finish()


async def test_an_eviction_that_a_full_disk_does_not_take_is_kept_later() -> None:
    """It counts at once, the audit log says that it is not kept yet, and it is as soon as there is room."""
    operated = Operated()
    operated.journal.is_full = True
    await operated.operations.evict(OPERATOR, "a", "", None)
    assert "once the disk has room" in (await operated.entries())[-1][2]
    await operated.engine.keep_membership()
    operated.journal.is_full = False
    for _ in range(2):
        await operated.engine.keep_membership()
    (record,) = operated.journal.records
    assert isinstance(record, MembershipChanged)
    assert [held.worker for held in record.membership.evicted] == ["a"]
    await operated.engine.finish()


async def test_names_and_times_that_cannot_be_are_refused_and_noted_shortly() -> None:
    """A long name would hide what was done before it from whoever asks for the log, and an endless time the status."""
    operated = Operated()
    operations = operated.operations
    for name in ("no name", "x" * 1_000_000):
        with pytest.raises(InvalidInputError, match="is not allowed"):
            await operations.evict(OPERATOR, name, "", None)
        with pytest.raises(InvalidInputError, match="is not allowed"):
            await operations.admit(OPERATOR, name)
    assert max(len(subject) for _, subject, _ in await operated.entries()) <= 128
    for time_s in (0.0, (2**64 - 1) / 1000):
        with pytest.raises(InvalidInputError, match="time of an eviction"):
            await operations.evict(OPERATOR, "a", "", time_s)
    await operations.evict(OPERATOR, "a", "", LONGEST_EVICTION_S)
    assert status_of(operated.engine, None, 0.0).evicted[0].remaining_ms > 0
    await operated.engine.finish()


async def test_who_is_kept_out_by_a_shorter_name_is_not_called_admitted() -> None:
    """The operator is told which name to admit, and nothing changes."""
    operated = Operated()
    await operated.operations.evict(OPERATOR, "paris", "", None)
    await operated.operations.evict(OPERATOR, "paris.1", "", None)
    with pytest.raises(InvalidInputError, match=r"kept out by the eviction of 'paris': admit 'paris'"):
        await operated.operations.admit(OPERATOR, "paris.1")
    assert await operated.operations.admit(OPERATOR, "paris")
    assert await operated.operations.admit(OPERATOR, "paris.1")
    await operated.engine.finish()


class Careful(NaiveMomentum):
    """A rule that refuses large rates."""

    @classmethod
    def of(cls, settings: RuleSettings) -> Self:
        """Make it."""
        if settings.rates.peak_lr > 1:
            raise ValueError("a rate above 1 diverges")
        return super().of(settings)


async def test_a_rate_that_the_rule_refuses_is_not_in_the_journal() -> None:
    """The journal could not be replayed: the shard would never start again."""
    rule = f"{__name__}:Careful"
    operated = Operated(config_from_mapping({"outer": {"rule": rule, "lr": 0.5}}))
    with pytest.raises(Exception, match="a rate above 1 diverges"):
        await operated.operations.configure(OPERATOR, {"outer.lr": 2.0})
    assert not operated.journal.records
    assert operated.live.config.outer.lr == 0.5
    await operated.operations.configure(OPERATOR, {"outer.lr": 0.75})
    assert len(operated.journal.records) == 1
    assert [result.partition(":")[0] for _, _, result in await operated.entries()] == [
        "refused",
        "done, until the next restart",
    ]
    await operated.engine.finish()


async def test_bins_are_looked_at_while_a_run_is_begun_anew() -> None:
    """An upload with fewer fragments takes the place of one that broke off; the look goes on with what is left."""
    operated = Operated()
    engine = operated.engine

    def manifest(num_elements: int) -> Manifest:
        return Manifest.of([TensorSpec(name="x", shape=(num_elements,), dtype="float32", role="parameter")], 256)

    await engine.begin_initialization(manifest(256 * 50), 1)
    looking = asyncio.create_task(engine.close_due_bins())
    await asyncio.sleep(0)
    await engine.begin_initialization(manifest(256), 2)
    await looking
    with pytest.raises(Exception, match="begun anew"):
        await engine.copied(0)
    await engine.finish()


def test_leaving_under_a_name_that_none_can_have_is_refused() -> None:
    """What the log says of it would be lines of the caller's own."""
    membership = build_shard(ServerConfig(), 0).membership
    with pytest.raises(InvalidInputError, match="is not allowed"):
        membership.leave(0.0, "paris.\nERROR all is lost", 1)
