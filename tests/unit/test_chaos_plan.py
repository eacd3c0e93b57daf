"""Plans of chaos: the same for the same seed, with every kind in them; and the closed form that they are judged by."""

import itertools
import sys
import time
from pathlib import Path

import pytest
import torch

from paceline_chaos.clock import sitecustomize as clock
from paceline_chaos.closed_form import ClosedForm, Coefficients, distance
from paceline_chaos.outcome import Outcome
from paceline_chaos.plan import Kind, server_faults, worker_faults
from paceline_chaos.report import BEGIN, END, machine, section, write_section
from paceline_server.ledger import Schedule, ScheduleKind
from support_core import PlayedFragment, normal


def test_a_plan_is_its_seeds() -> None:
    """The same seed gives the same faults, another one others."""
    first, again, other = ([*itertools.islice(worker_faults(seed, list(Kind)), 50)] for seed in (1, 1, 2))
    assert first == again
    assert first != other
    kills = [[*itertools.islice(server_faults(seed, list(Kind), shards=2), 20)] for seed in (1, 1, 2)]
    assert kills[0] == kills[1] != kills[2]


def test_every_kind_is_among_the_first() -> None:
    """As many faults as there are kinds have each kind once; a server's kills have its other troubles beside them."""
    kinds = [kind for kind in Kind if not kind.on_server]
    faults = list(itertools.islice(worker_faults(3, list(Kind)), len(kinds)))
    assert sorted(fault.kind.value for fault in faults) == sorted(kind.value for kind in kinds)
    around = list(itertools.islice(server_faults(3, list(Kind), shards=1), 2))
    assert around[0].stopped_s is not None
    assert around[1].jump_s is not None
    assert list(worker_faults(3, [Kind.SERVER_KILL])) == []


def test_the_closed_form_is_the_rule() -> None:
    """Two running sums give what the server's rule gives, for late pushes and several bins, up to rounding."""
    played = PlayedFragment(Schedule(kind=ScheduleKind.ASYNC, quota=2), lr=0.5, momentum=0.9, workers=2, size=50)
    form = ClosedForm(played.initial, Coefficients(lr=0.5, momentum=0.9, quota=2))
    for number in range(12):
        base_bin = max(0, played.ledger.issuing_bin - number % 3)
        gradient = normal(50, number)
        decision = played.push("ab"[number % 2], number // 2 + 1, base_bin, gradient)
        form.open_bins(decision.bins_opened_before)
        form.push(gradient, base_bin)
        form.open_bins(decision.bins_opened_after)
    assert distance(form.w, played.w) < 2e-6
    assert distance(form.u, played.u) < 2e-6
    assert distance(form.w + 1e-3, played.w) > 1e-4


def test_a_push_weighs_what_it_moved() -> None:
    """What one gradient has moved w by is told for every later bin."""
    without, with_push = (ClosedForm(torch.zeros(1), Coefficients(lr=0.5, momentum=0.9, quota=2)) for _ in range(2))
    for form in (without, with_push):
        form.open_bins(2)
    with_push.push(torch.ones(1), 1)
    for form in (without, with_push):
        form.open_bins(3)
    assert float(without.w - with_push.w) == pytest.approx(with_push.weight_in_w(1), rel=1e-12)


def test_a_shifted_clock_is_read_and_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """time.time and time.time_ns follow the file, gRPC keeps the system's, and what was read is noted."""
    monkeypatch.setattr(time, "time", time.time)
    monkeypatch.setattr(time, "time_ns", time.time_ns)
    file, real = tmp_path / "clock", time.time
    clock.shift(file)
    assert abs(time.time() - real()) < 100
    file.write_text("-3600.5")
    assert -3700 < time.time() - real() < -3500
    assert -3700 < time.time_ns() / 1e9 - real() < -3500
    scope = {"__name__": "grpc.aio._utils", "time": time}
    exec("now = time.time()", scope)  # noqa: S102  # a module of gRPC's name is the point
    assert abs(float(str(scope["now"])) - real()) < 100
    assert clock.seen_path(file).read_text().split() == ["-3600.5"]


def test_a_report_replaces_what_is_between_the_markers(tmp_path: Path) -> None:
    """The page keeps all else; without a page there is one afterwards."""
    outcome = Outcome(seed=5, skipped={Kind.FULL_DISK: "no root"}, recovery_s=[1.0, 2.0, 4.0])
    outcome.count(Kind.CUT).happened(10)
    outcome.count(Kind.CUT).was_survived(1.5)
    text = section(outcome, machine())
    assert "| cut | " in text
    assert "| full-disk | " in text
    assert "2.00 s in the median" in text
    page = tmp_path / "page.md"
    write_section(page, text)
    page.write_text("above\n" + page.read_text() + "below\n")
    outcome.lost.append("everything is gone")
    write_section(page, section(outcome, machine()))
    found = page.read_text()
    assert found.startswith("above\n# Reliability\n")
    assert found.endswith(f"{END}\nbelow\n")
    assert found.count(BEGIN) == found.count("| cut | ") == 1
    assert "**lost**: everything is gone" in found


def test_the_clock_is_shifted_before_anything_else_is_imported() -> None:
    """The module that shifts the clock imports nothing but the standard library: it runs in every process's start."""
    source = Path(str(clock.__file__)).read_text()
    imported = [line.split()[1] for line in source.splitlines() if line.startswith(("import ", "from "))]
    assert set(imported) <= set(sys.stdlib_module_names)
