"""The record of arrivals: one line a push, in the order of decisions, and no trouble for the run."""

import json
import logging
from pathlib import Path

import pytest

from paceline_server.arrivals import ArrivalRecorder
from paceline_server.journal import Decided, FragmentInitialized, NoJournal
from paceline_server.ledger import Decision, Ledger, Outcome, PushRequest
from paceline_wire.errors import ConfigurationError
from support_core import normal


def decided(seq: int, *, worker: str = "a", outcome: Outcome = Outcome.APPLIED, time_s: float = 0.0) -> Decided:
    """The record of a push."""
    return Decided(
        fragment=3,
        time_s=time_s,
        push=PushRequest(worker=worker, incarnation=2, seq=seq, base_bin=seq - 1),
        decision=Decision(outcome=outcome, reason="due"),
        ledger=Ledger(),
    )


async def test_a_line_says_who_pushed_what_when(tmp_path: Path) -> None:
    """The lines are JSON objects in the order of `append`."""
    recorder = ArrivalRecorder(NoJournal(), tmp_path / "arrivals.jsonl")
    await recorder.append(decided(1, time_s=0.5))
    await recorder.append(decided(2, worker="b\n", outcome=Outcome.REFUSED, time_s=0.75))
    await recorder.close()
    first, second = map(json.loads, (tmp_path / "arrivals.jsonl").read_text(encoding="utf-8").splitlines())
    assert first == {
        "time_s": 0.5,
        "fragment": 3,
        "worker": "a",
        "incarnation": 2,
        "seq": 1,
        "base_bin": 0,
        "outcome": "applied",
    }
    assert (second["worker"], second["outcome"], second["time_s"]) == ("b\n", "refused", 0.75)


async def test_what_is_no_push_is_not_recorded(tmp_path: Path) -> None:
    """First parameters, and bins that close by themselves, are no arrivals."""
    recorder = ArrivalRecorder(NoJournal(), tmp_path / "arrivals.jsonl")
    await recorder.append(FragmentInitialized(fragment=0, payload=normal(1, 0)))
    closed = Decision(outcome=Outcome.CLOSED, reason="due")
    await recorder.append(Decided(fragment=0, time_s=1.0, push=None, decision=closed, ledger=Ledger()))
    await recorder.close()
    assert (tmp_path / "arrivals.jsonl").read_text(encoding="utf-8") == ""


async def test_a_second_run_goes_on_in_the_file(tmp_path: Path) -> None:
    """A file that is there already keeps its lines."""
    for seq in (1, 2):
        recorder = ArrivalRecorder(NoJournal(), tmp_path / "arrivals.jsonl")
        await recorder.append(decided(seq))
        await recorder.close()
    assert len((tmp_path / "arrivals.jsonl").read_text(encoding="utf-8").splitlines()) == 2


@pytest.mark.parametrize("path", ["missing/arrivals.jsonl", "."])
def test_a_path_that_cannot_be_written_is_an_error(tmp_path: Path, path: str) -> None:
    """The sentence names the field, the path and the reason."""
    with pytest.raises(ConfigurationError, match=r"storage\.arrivals: .* cannot be written: \w"):
        ArrivalRecorder(NoJournal(), tmp_path / path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is always full")
async def test_a_full_disk_ends_the_record_and_not_the_run(caplog: pytest.LogCaptureFixture) -> None:
    """The error is logged once; pushes go on."""
    recorder = ArrivalRecorder(NoJournal(), Path("/dev/full"))
    with caplog.at_level(logging.ERROR):
        for seq in range(1, 1000):
            await recorder.append(decided(seq))
        await recorder.close()
    assert [record.getMessage() for record in caplog.records] == [
        "storage.arrivals: /dev/full cannot be written any more: No space left on device"
    ]
