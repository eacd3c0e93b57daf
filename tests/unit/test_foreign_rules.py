"""From a configured name to an outer rule: ours, an installed package's, or anybody's module; and what is wrong."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from paceline_server.config import ServerConfig
from paceline_server.config_outer import OUTER_RULES
from paceline_server.construction import build_shard
from paceline_server.rules import OuterRule, Rates, RuleSettings
from paceline_server.rules.registry import RULES, outer_rule
from paceline_server.settings import config_from_mapping
from paceline_wire.errors import ConfigurationError
from support_core import assert_near, normal
from support_rules import AsynchronousWorkers, asynchronous

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = RuleSettings(rates=Rates(peak_lr=0.5, full_momentum=0.9), inner_steps=7)
MODULE = '''
"""Rules that somebody wrote."""
from paceline_server.rules import OuterRule

print("hello from somebody's module")

class Still(OuterRule):
    """Nothing ever moves."""

    def apply(self, numbers, g, push):
        """Nothing."""

class Holder:
    """Keeps a rule inside."""

    Inner = Still

class Abstract(OuterRule):
    """Has no apply."""

class Choosy(Still):
    """Does not like its settings."""

    @classmethod
    def of(cls, settings):
        raise ValueError(f"{settings.inner_steps} inner steps are too few")

class Pointless(Still):
    """Points nowhere."""

    momentum_vector = "m"

a_number = 7
'''


@pytest.fixture
def somebody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on sys.path with modules of somebody's, and an installed package that offers one of their rules."""
    (tmp_path / "somebodys_rules.py").write_text(MODULE, encoding="utf-8")
    (tmp_path / "broken_rules.py").write_text("import a_package_that_nobody_has\n", encoding="utf-8")
    (tmp_path / "failing_rules.py").write_text("1 / 0\n", encoding="utf-8")
    (tmp_path / "ending_rules.py").write_text("raise SystemExit(3)\n", encoding="utf-8")
    installed = tmp_path / "somebodys_rules-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: somebodys-rules\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text(
        "[paceline.outer_rules]\n"
        "still = somebodys_rules:Still\nbroken = broken_rules:Rule\nsgd = somebodys_rules:Still\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    yield tmp_path
    for name in ("somebodys_rules", "broken_rules", "failing_rules", "ending_rules"):
        sys.modules.pop(name, None)


def config(rule: str) -> ServerConfig:
    """A run under a rule."""
    return config_from_mapping({"outer": {"rule": rule}})


def test_the_configuration_names_our_rules() -> None:
    """The list that the configuration has, without importing them, is the registry's."""
    assert tuple(RULES) == OUTER_RULES
    for name, rule in RULES.items():
        assert type(outer_rule(name, SETTINGS)) is rule


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_our_rules_say_what_they_keep(rule: type[OuterRule]) -> None:
    """A momentum that others read is one of the vectors that the rule keeps."""
    assert rule.momentum_vector is None or rule.momentum_vector in rule.state
    assert len(set(rule.state)) == len(rule.state)


@pytest.mark.parametrize("name", ["somebodys_rules:Still", "somebodys_rules:Holder.Inner", "still"])
def test_a_rule_of_somebody_elses_is_found(somebody: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """By module and attribute, or by the name of an entry point; what its module prints does not go to stdout."""
    shard = build_shard(config(name), 0)
    assert shard.schedule.kind.value == "async"
    rule = outer_rule(name, SETTINGS)
    assert (type(rule).__name__, rule.rates) == ("Still", SETTINGS.rates)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "hello from somebody's module\n"


def test_our_names_are_ours(somebody: Path) -> None:
    """An installed package cannot change what a name of ours means."""
    assert type(outer_rule("sgd", SETTINGS)) is RULES["sgd"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("no_such_module:Rule", "cannot be imported from 'no_such_module': ModuleNotFoundError: .* in PYTHONPATH?"),
        ("somebodys_rules:Missing", "cannot be imported from 'somebodys_rules': AttributeError: .*'Missing'"),
        ("broken_rules:Rule", "cannot be imported from 'broken_rules': ModuleNotFoundError: .*a_package_that_nobody"),
        ("broken", "outer.rule = 'broken' cannot be imported from 'broken_rules': ModuleNotFoundError"),
        ("failing_rules:Rule", "cannot be imported from 'failing_rules': ZeroDivisionError: division by zero"),
        ("ending_rules:Rule", "cannot be imported from 'ending_rules': SystemExit: 3"),
        ("..:Rule", r"cannot be imported from '\.\.'"),
        ("somebodys_rules:a_number", "is 7, not a subclass of paceline_server.rules.OuterRule"),
        ("somebodys_rules:Holder", "is <class 'somebodys_rules.Holder'>, not a subclass"),
        ("somebodys_rules:Abstract", "cannot be made from the configuration: TypeError: .*abstract.*apply"),
        ("somebodys_rules:Choosy", "cannot be made from the configuration: ValueError: 7 inner steps are too few"),
        ("somebodys_rules:Pointless", "names 'm' as its momentum_vector, which is not in its state"),
        ("paceline_server.rules:OuterRule", "cannot be made from the configuration: TypeError: .*abstract"),
    ],
)
def test_a_rule_that_cannot_be_had_is_a_clear_error(somebody: Path, name: str, text: str) -> None:
    """The sentence names the field, the value, and what somebody else's module said."""
    config(name)  # its form is right
    with pytest.raises(ConfigurationError, match=f"outer.rule = .*{text}" if "outer.rule" not in text else text):
        outer_rule(name, SETTINGS)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("orno", r"is no outer rule; the valid ones are ormo, .*smega2, .*and module:attribute\. Did you mean ormo\?"),
        ("", "is no outer rule"),
        ("module:", "is no outer rule"),
        (":Rule", "is no outer rule"),
    ],
)
def test_a_name_that_nobody_has_is_refused_by_the_configuration(name: str, text: str) -> None:
    """With the valid ones, and the one that was probably meant."""
    with pytest.raises(ConfigurationError, match=rf"(?s)outer\.rule.*{text}"):
        config(name)


def test_the_valid_names_include_installed_ones(somebody: Path) -> None:
    """What installed packages offer is listed, and guessed."""
    with pytest.raises(ConfigurationError, match=r"(?s)still, and module:attribute\. Did you mean still\?"):
        config("stil")


# --- The example.


def test_the_example_makes_steps_of_equal_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """M = beta m + (1 - beta) g ; w -= lr / quota sign(m), found as a server finds it."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    played = asynchronous(outer_rule("outer_rule:SignMomentum", SETTINGS), 2)
    sys.modules.pop("outer_rule")
    workers = AsynchronousWorkers(played, 2)
    w, m = played.initial.double(), torch.zeros(3, dtype=torch.float64)
    for t in range(12):
        g = normal(3, t)
        workers.push(t % 2, g)
        m = 0.9 * m + 0.1 * g.double()
        w = w - 0.5 / 2 * m.sign()
        assert_near(w, played.w)
