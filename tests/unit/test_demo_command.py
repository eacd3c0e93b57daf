"""The command `paceline demo` where it says no before it starts anything."""

import importlib.util
from collections.abc import Sequence
from importlib.machinery import ModuleSpec

import pytest
from click.testing import CliRunner

from paceline.demo.command import demo


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without rich, the command says in one sentence what to install, and fails."""
    find_spec = importlib.util.find_spec

    def without_rich(name: str, package: str | None = None) -> ModuleSpec | None:
        return None if name == "rich" else find_spec(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", without_rich)
    result = CliRunner().invoke(demo, [])
    assert result.exit_code == 1
    assert result.output == "Error: the demo needs rich: pip install 'paceline[demo]'\n"


@pytest.mark.parametrize(
    "arguments", [["--workers", "0"], ["--seconds", "0"], ["--rate-mbit", "0"], ["--delay-ms", "-1"]]
)
def test_impossible_options_are_refused(arguments: Sequence[str]) -> None:
    """What cannot be run is a usage error that names the option."""
    result = CliRunner().invoke(demo, list(arguments))
    assert result.exit_code == 2
    assert arguments[0] in result.output
