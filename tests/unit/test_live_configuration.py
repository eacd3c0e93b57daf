"""What of a configuration can change while a run goes on, and whose word counts after a restart."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from paceline_server.audit import AuditEntry, AuditLog, utc_now
from paceline_server.live_configuration import (
    CHANGEABLE,
    LiveConfiguration,
    Override,
    changed,
    changed_by_operator,
    shaping,
    value_of,
)
from paceline_server.settings import config_from_mapping
from paceline_server.storage.directory import ShardDirectory
from paceline_server.storage.kept_settings import read_settings, write_settings
from paceline_wire.errors import InvalidInputError, StorageError

STARTED = config_from_mapping({"outer": {"lr": 0.7}, "security": {"tokens": ["secret"]}, "listen": "127.0.0.1:7171"})


def test_only_what_was_asked_for_changes() -> None:
    """The rest stays as it was, secrets and addresses included."""
    after = changed(STARTED, {"outer.lr": 0.2, "schedule.quota": 3})
    assert {key: value_of(after, key) for key in CHANGEABLE} == {
        "outer.lr": 0.2,
        "exchange.inner_steps": 50,
        "schedule.quota": 3,
    }
    assert after.model_copy(update={"outer": STARTED.outer, "schedule": STARTED.schedule}) == STARTED
    assert changed(after, {"outer.lr": 0.7, "schedule.quota": None}) == STARTED


@pytest.mark.parametrize(("key", "value"), [("outer.lr", 0.0), ("outer.lr", float("nan")), ("exchange.inner_steps", 0)])
def test_values_that_a_start_would_refuse_are_refused(key: str, value: float) -> None:
    """The checks are those of a start, and the text names the key."""
    with pytest.raises(InvalidInputError, match=f"^{key} = "):
        changed_by_operator(STARTED, {key: value}, local_momentum=False)


def test_workers_are_told_what_counts_now() -> None:
    """A change is in what joining workers are told."""
    live = LiveConfiguration(STARTED)
    live.take(changed(STARTED, {"outer.lr": 0.2, "exchange.inner_steps": 9}))
    assert (live.for_workers.outer.lr, live.for_workers.exchange.inner_steps) == (0.2, 9)


def test_the_newest_word_counts_after_a_restart() -> None:
    """What was set holds for the same start, gives way to a newer configured value, and is gone if set back."""
    live = LiveConfiguration(STARTED)
    live.take(changed(live.config, {"outer.lr": 0.2, "exchange.inner_steps": 9}))
    live.take(changed(live.config, {"exchange.inner_steps": 50}))
    assert live.overrides == {"outer.lr": Override(configured=0.7, value=0.2)}
    again = LiveConfiguration(STARTED, live.overrides)
    assert (value_of(again.config, "outer.lr"), again.notes) == (0.2, [])
    newer = LiveConfiguration(changed(STARTED, {"outer.lr": 0.5}), live.overrides)
    assert value_of(newer.config, "outer.lr") == 0.5
    assert newer.overrides == {}
    assert newer.notes == [
        "outer.lr is 0.5, as the server is started with now; that it was set to 0.2 in place of 0.7 counts no more"
    ]


def test_a_setting_that_stays_keeps_what_it_was_set_in_place_of() -> None:
    """A second change after a restart with the same value does not forget the first one's key."""
    live = LiveConfiguration(STARTED, {"outer.lr": Override(configured=0.7, value=0.2)})
    live.take(changed(live.config, {"schedule.quota": 4}))
    assert live.overrides["outer.lr"] == Override(configured=0.7, value=0.2)
    assert live.overrides["schedule.quota"] == Override(configured=None, value=4)


def test_what_was_set_is_kept_in_a_file(tmp_path: Path) -> None:
    """It is read back, replaced as a whole, and a damaged file is named with what can be done."""
    directory = ShardDirectory(tmp_path, 0)
    directory.create()
    assert read_settings(directory) == {}
    overrides = {"outer.lr": Override(configured=0.7, value=0.2), "schedule.quota": Override(configured=4, value=None)}
    write_settings(directory, overrides)
    assert read_settings(directory) == overrides
    write_settings(directory, {})
    assert read_settings(directory) == {}
    directory.settings.write_text('{"outer.lr": {')
    with pytest.raises(StorageError, match="is damaged: remove it"):
        read_settings(directory)


async def test_a_line_that_a_power_failure_cut_hides_no_other(tmp_path: Path) -> None:
    """The next entry begins a line of its own, and all whole ones are read."""
    log = AuditLog(tmp_path / "audit.jsonl")
    entries = [AuditEntry(time=utc_now(), shard=0, who="", peer="p", act=f"act {n}", result="done") for n in range(3)]
    await log.add(entries[0])
    with log._path.open("a") as file:  # type: ignore[union-attr]
        file.write('{"time": "2026-')
    for entry in entries[1:]:
        await log.add(entry)
    assert await log.newest(10) == entries
    assert await log.newest(1) == entries[2:]
    assert abs(entries[0].time_us / 1e6 - entries[1].time_us / 1e6) < 60


@pytest.mark.parametrize(
    "line", ["5", "{}", "[" * 100_000, '{"time": 5}', '{"time": "then"}', '{"time": "1969-12-31T00:00:00+00:00"}']
)
async def test_a_line_that_says_something_else_hides_no_other(tmp_path: Path, line: str) -> None:
    """What is no entry is left out, also where it is JSON; the log can be asked for all the same."""
    log = AuditLog(tmp_path / "audit.jsonl")
    entry = AuditEntry(time=utc_now(), shard=0, who="", peer="p", act="act", result="done")
    await log.add(entry)
    said = {**asdict(entry), **json.loads(line)} if line.startswith('{"') else None
    with (tmp_path / "audit.jsonl").open("a") as file:
        file.write((json.dumps(said) if said is not None else line) + "\n")
    await log.add(entry)
    assert await log.newest(9) == [entry, entry]


def test_who_may_take_how_much_is_not_what_the_run_is() -> None:
    """Limits are the host's: other ones are no record in the journal, which servers that know none can read, too."""
    limited = config_from_mapping({"limits": {"streams": 3}})
    assert shaping(limited) == shaping(config_from_mapping({}))
    assert changed(limited, {"outer.lr": 0.1}).limits.streams == 3
