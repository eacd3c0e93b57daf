"""The server's look at whether its settings suit the workers it sees."""

import pytest

from paceline_server.config import ServerConfig
from paceline_server.settings import config_from_mapping
from paceline_server.stability_watch import PUSHES_BETWEEN_LOOKS, Seen, StabilityWatch


def configured(rule: str = "ormo", lr: float = 0.7, momentum: float = 0.9, **outer: object) -> ServerConfig:
    """Return a configuration with these outer settings."""
    return config_from_mapping({"outer": {"rule": rule, "lr": lr, "momentum": momentum, **outer}})


def test_it_looks_once_in_a_while_with_the_running_mean() -> None:
    """Between two looks nothing is computed; what is seen is the recent lateness."""
    watch = StabilityWatch(configured())
    seen = [watch.observe(0, 4) for _ in range(PUSHES_BETWEEN_LOOKS)]
    assert seen == [None] * (PUSHES_BETWEEN_LOOKS - 1) + [Seen(workers=4, mean_bins_late=0.0)]
    later = [watch.observe(2, 5) for _ in range(PUSHES_BETWEEN_LOOKS)][-1]
    assert later is not None
    assert later.workers == 5
    assert 1.8 < later.mean_bins_late < 2.0


def test_a_very_late_push_counts_as_what_enters_of_it() -> None:
    """One worker that comes back after an hour does not make the server warn of its settings."""
    watch = StabilityWatch(configured(late_bins=4))
    seen = [watch.observe(100_000 if number == 0 else 0, 4) for number in range(PUSHES_BETWEEN_LOOKS)][-1]
    assert seen is not None
    assert seen.mean_bins_late < 1


@pytest.mark.parametrize("rule", ["momentum", "nesterov", "mla", "delayed-nesterov", "smega2"])
def test_rules_without_a_model_are_never_looked_at(rule: str) -> None:
    """The region is that of ordered momentum."""
    watch = StabilityWatch(configured(rule))
    assert {watch.observe(3, 8) for _ in range(2 * PUSHES_BETWEEN_LOOKS)} == {None}


def test_the_papers_setting_is_warned_of_and_the_default_is_not() -> None:
    """0.7 / 0.9 can blow up with eight workers whose answers are late; the sentence has the settings and a way out."""
    seen = Seen(workers=8, mean_bins_late=1.0)
    warning = StabilityWatch(configured()).warning(seen)
    assert warning is not None
    assert "0.7" in warning
    assert "0.9" in warning
    assert "is stable" in warning
    assert StabilityWatch(ServerConfig()).warning(seen) is None
