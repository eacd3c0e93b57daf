"""Tells the operator when a run's settings lie outside the stability region for what the server sees of its workers."""

from dataclasses import dataclass
from typing import cast

from paceline_server.config import ServerConfig
from paceline_server.stability import Estimate, setting_seen, warning_of

PUSHES_BETWEEN_LOOKS = 64
"""The region is looked up again after so many pushes: computing it may take tens of milliseconds."""

_LATENESS_MEMORY = 0.95
"""Weight of the past in the running mean of lateness: about the last twenty pushes count."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What the region depends on beside the configuration.

    Attributes:
        workers: Active workers.
        mean_bins_late: Running mean of the bins that pushes were late.
    """

    workers: int
    mean_bins_late: float


class StabilityWatch:
    """Follows a run's lateness, and says whether its settings suit it.

    Ordered momentum only: other rules have no model here, and are never warned of.

    Args:
        config: The run's configuration.
    """

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self._mean_bins_late: float | None = None
        self._pushes = 0
        self._modelled = config.outer.rule in ("ormo", "ormo-da", "sgd") and config.outer.correction is None

    def take(self, config: ServerConfig) -> None:
        """Judge by other settings from here on."""
        self._config = config

    def observe(self, bins_late: int, workers: int) -> Seen | None:
        """Count a push that was applied; every PUSHES_BETWEEN_LOOKS, returns what is seen: then look the region up."""
        # Of the lateness beyond late_bins only a part enters, as if the push were that late.
        late = float(min(bins_late, self._config.outer.late_bins))
        mean = self._mean_bins_late
        self._mean_bins_late = late if mean is None else _LATENESS_MEMORY * mean + (1 - _LATENESS_MEMORY) * late
        self._pushes += 1
        if not self._modelled or self._pushes % PUSHES_BETWEEN_LOOKS:
            return None
        return Seen(workers=max(1, workers), mean_bins_late=self._mean_bins_late)

    def warning(self, seen: Seen) -> str | None:
        """A sentence for the operator if a fresh model could blow up, None if not. May take tens of milliseconds."""
        config = self._config
        return warning_of(
            setting_seen(
                lr=config.outer.lr,
                momentum=config.outer.momentum,
                workers=seen.workers,
                look_ahead=config.look_ahead,
                estimate=cast("Estimate", config.exchange.own_weight),
                asynchronous=config.schedule.kind in ("async", "participation"),
                mean_bins_late=seen.mean_bins_late,
            )
        )
