"""Rules that users bring, through a real server and from the command line, and the warning of unstable settings."""

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
from support_core import normal

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


async def test_a_users_rule_is_served_from_a_dotted_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The example's rule of twenty lines works without a change to ours: steps of the rate's size in every element."""
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES), prepend=os.pathsep)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    with paceline_server.local(config("outer_rule:SignMomentum")) as address:
        async with paceline.connect(address, worker_id="a") as client:
            await client.initialize({"x": torch.zeros(SIZE)})
            base = await client.exchange({"x": normal(SIZE, 1)}, await client.fetch())
    assert torch.allclose(flat(base.tensors).float(), -LR / 2 * normal(SIZE, 1).sign())


@pytest.mark.parametrize(
    ("rule", "reason", "shards"),
    [
        ("nowhere_at_all:Rule", "cannot be imported from 'nowhere_at_all': ModuleNotFoundError", "2"),
        ("foreign_rules:Missing", "AttributeError", "1"),
        ("foreign_rules:not_a_rule", "not a subclass of paceline_server.rules.OuterRule", "1"),
        ("ormoo", "Did you mean ormo?", "1"),
    ],
)
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
