"""Outer rules through a real server: every rule by its name, rules of users, and the record of arrivals."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import paceline
import paceline_server
from integration.reference import flat
from paceline_server.config_outer import OUTER_RULES, RULE_ENTRY_POINTS
from paceline_server.construction import build_shard
from paceline_server.fragment import FragmentValues
from paceline_server.ledger import Ledger, PushRequest, Roster, Schedule, ScheduleKind, decide_push
from paceline_server.rules import Rates, RuleSettings
from paceline_server.rules.registry import outer_rule
from paceline_server.settings import config_from_mapping
from paceline_wire import codecs
from paceline_wire.errors import ConfigurationError, PushRefusedError
from support_core import EXACT, normal

EXAMPLES = Path(__file__).parents[2] / "examples"
SIZE, LR, MOMENTUM = 300, 0.3, 0.6
FOREIGN = """
from dataclasses import dataclass
from paceline_server.rules import OuterRule

@dataclass(frozen=True, kw_only=True)
class Halving(OuterRule):
    def apply(self, numbers, g, push):
        numbers.w.mul_(0.5)

def not_a_rule():
    pass
"""


def config(rule: str, **others: object) -> dict[str, object]:
    """A run of one worker with this rule, without loss on the wire."""
    outer = {"rule": rule, "lr": LR} | ({} if rule == "sgd" else {"momentum": MOMENTUM}) | others
    return {
        "outer": outer,
        "schedule": {"kind": "async", "quota": 2},
        "exchange": {"uplink": "fp32", "downlink": "fp32", "dynamic_inner_steps": False, "inner_steps": 3},
    }


def expected(rule: str, gradients: list[torch.Tensor], momenta: list[torch.Tensor] | None = None) -> torch.Tensor:
    """What one worker's pushes, each from the newest parameters, come to by the pure core."""
    rates = Rates(peak_lr=LR, full_momentum=0.0 if rule == "sgd" else MOMENTUM)
    values = FragmentValues(torch.zeros(SIZE), outer_rule(rule, RuleSettings(rates=rates, inner_steps=3)))
    ledger, base = Ledger(), 0
    for seq, g in enumerate(gradients, start=1):
        push = PushRequest(worker="a", incarnation=1, seq=seq, base_bin=base)
        roster = Roster(active=frozenset({"a"}), most_active=1)
        decision, ledger = decide_push(Schedule(kind=ScheduleKind.ASYNC, quota=2), ledger, 0.0, roster, push)
        content = g if momenta is None else torch.cat((g, momenta[seq - 1]))
        values.follow(decision, EXACT, codecs.encode(EXACT, content))
        base = decision.answers[0].bin
    return values.published()


@pytest.mark.parametrize("rule", OUTER_RULES)
async def test_every_rule_serves_by_its_name(rule: str) -> None:
    """What a worker is answered after eight pushes is the core's, bit for bit; OrLoMo takes both vectors."""
    gradients = [normal(SIZE, number) for number in range(8)]
    momenta = [normal(SIZE, 100 + number) for number in range(8)] if rule == "orlomo" else None
    with paceline_server.local(config(rule)) as address:
        async with paceline.connect(address, worker_id="a") as client:
            await client.initialize({"x": torch.zeros(SIZE)})
            base = await client.fetch()
            for number, g in enumerate(gradients):
                local = None if momenta is None else {"x": momenta[number]}
                base = await client.exchange({"x": g}, base, local_momentum=local)
    assert torch.equal(flat(base.tensors).float(), expected(rule, gradients, momenta))


async def test_a_users_rule_is_served_from_a_dotted_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The example's rule of twenty lines works without a change to ours: steps of the rate's size in every element."""
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES), prepend=os.pathsep)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    with paceline_server.local(config("outer_rule:SignMomentum")) as address:
        async with paceline.connect(address, worker_id="a") as client:
            await client.initialize({"x": torch.zeros(SIZE)})
            base = await client.exchange({"x": normal(SIZE, 1)}, await client.fetch())
    assert torch.allclose(flat(base.tensors).float(), -LR / 2 * normal(SIZE, 1).sign())


def test_an_installed_packages_rule_goes_by_its_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A distribution that offers the entry point makes its name valid in the configuration."""
    (tmp_path / "halving.py").write_text(FOREIGN)
    metadata = tmp_path / "halving-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: halving\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[{RULE_ENTRY_POINTS}]\nhalving = halving:Halving\n")
    with pytest.raises(ConfigurationError, match=r"is no outer rule"):
        config_from_mapping(config("halving"))
    monkeypatch.syspath_prepend(str(tmp_path))
    shard = build_shard(config_from_mapping(config("halving")), 0)
    assert not shard.initialized


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        ("nowhere_at_all:Rule", "cannot be imported from 'nowhere_at_all': ModuleNotFoundError"),
        ("foreign_rules:Missing", "AttributeError"),
        ("foreign_rules:not_a_rule", "not a subclass of paceline_server.rules.OuterRule"),
        ("ormoo", "Did you mean ormo?"),
    ],
)
@pytest.mark.parametrize("shards", ["1", "2"])
def test_a_rule_that_cannot_be_had_ends_serve_at_start(tmp_path: Path, rule: str, reason: str, shards: str) -> None:
    """Before it listens, with the exit code of wrong configuration and a sentence."""
    (tmp_path / "foreign_rules.py").write_text(FOREIGN)
    command = [str(Path(sys.executable).with_name("paceline")), "serve", "--listen", "127.0.0.1:0"]
    ended = subprocess.run(
        [*command, "--outer.rule", rule, "--shards", shards],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert ended.returncode == 2
    assert reason in ended.stderr
    assert "Traceback" not in ended.stderr
    assert "serving" not in ended.stdout


async def test_arrivals_are_written_down_in_order(tmp_path: Path) -> None:
    """One line for every push that was decided, fragment by fragment, with its base bin and what became of it."""
    path = tmp_path / "arrivals.jsonl"
    run = config("ormo") | {"storage": {"arrivals": str(path)}}
    with paceline_server.local(run) as address:
        async with paceline.connect(address, worker_id="a") as client:
            await client.initialize({"x": torch.zeros(SIZE)})
            base = await client.fetch()
            for number in range(3):
                base = await client.exchange({"x": normal(SIZE, number)}, base)
            with pytest.raises(PushRefusedError):
                await client.exchange({"x": torch.full((SIZE,), float("nan"))}, base)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert {(line["worker"], line["fragment"]) for line in lines} == {("a", 0)}
    assert [line["seq"] for line in lines] == [1, 2, 3, 4]
    assert [line["outcome"] for line in lines] == ["applied"] * 3 + ["refused"]
    assert [line["base_bin"] for line in lines] == [0, 1, 1, 2]
    assert sorted(line["time_s"] for line in lines) == [line["time_s"] for line in lines]


def test_a_record_that_cannot_be_written_ends_serve_at_start(tmp_path: Path) -> None:
    """The sentence names the field and the file."""
    command = [str(Path(sys.executable).with_name("paceline")), "serve", "--listen", "127.0.0.1:0"]
    ended = subprocess.run(
        [*command, "--storage.arrivals", str(tmp_path / "no" / "folder.jsonl")],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert ended.returncode == 2
    assert "storage.arrivals" in ended.stderr
    assert "No such file or directory" in ended.stderr


def test_the_server_warns_of_settings_that_may_blow_up() -> None:
    """A rate of 5 is outside of the region for what the server sees; `paceline status` says so."""
    parameter = torch.nn.Linear(2, 2, bias=False)
    with paceline_server.local(config("ormo", lr=5.0)) as address:
        optimizer = torch.optim.SGD(parameter.parameters(), lr=1e-3)
        with paceline.join(address, parameter, optimizer, inner_steps=1, overlap="blocking"):
            for _ in range(70):
                parameter(torch.ones(2)).sum().backward()
                optimizer.step()
        command = [str(Path(sys.executable).with_name("paceline")), "status", address]
        told = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True).stdout
        told_json = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=100, check=True).stdout
    assert "warning: lr 5 with momentum 0.6 may blow up" in told
    (warning,) = json.loads(told_json)["shards"][0]["warnings"]
    assert "may blow up" in warning


def test_the_page_shows_the_example_as_it_is() -> None:
    """docs/rules.md has the rule of examples/outer_rule.py word for word."""
    source = (EXAMPLES / "outer_rule.py").read_text(encoding="utf-8")
    code = source[source.index("from dataclasses") :]
    assert f"```python\n{code}```\n" in (EXAMPLES.parent / "docs" / "rules.md").read_text(encoding="utf-8")
