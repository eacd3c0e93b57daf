"""Many trials on all cores: every outcome is kept, and every method is tuned on the same budget.

How a method is tuned: each point of its grid is tried with the tuning seeds and judged on the validation part; the best
mean counts. The reported seeds are others, and so is the part of the data (test) that they are judged on.
"""

import json
import math
import multiprocessing
import os
import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from experiments.trial import Outcome, Trial, play

RESULTS = Path(__file__).parents[1] / "results" / "convergence"

Settings = tuple[tuple[str, Any], ...]
"""Server settings by dotted name."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A method in a setting.

    Attributes:
        cell: The setting, such as "K=16, alike": arms of one cell are compared.
        name: The method.
        trial: The run, but for the grid's settings, the seed and the part.
        grid: The settings tried; every arm of a cell has as many points.
    """

    cell: str
    name: str
    trial: Trial
    grid: tuple[Settings, ...]


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One comparison.

    Attributes:
        name: Its name on the command line and in benchmarks/results/convergence/.
        title: Its heading.
        arms: What is compared.
        seeds: Reported seeds.
        tuning_seeds: Seeds that settings are chosen with.
        tuned_as: Another experiment that has these arms too, whose choices are taken; None: this one makes its own.
    """

    name: str
    title: str
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    tuning_seeds: tuple[int, ...] = (100,)
    tuned_as: "Experiment | None" = None


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What became of an arm.

    Attributes:
        arm: The arm.
        point: The settings that were best on validation.
        tried: Mean validation loss of every point of the grid, in its order.
        outcomes: Of the reported seeds, on the test part.
    """

    arm: Arm
    point: Settings
    tried: tuple[float, ...]
    outcomes: tuple[Outcome, ...]

    @property
    def losses(self) -> list[float]:
        """Final losses of the reported seeds."""
        return [outcome.loss for outcome in self.outcomes]

    @property
    def loss(self) -> float:
        """Their mean."""
        return mean(self.losses)

    @property
    def error(self) -> float:
        """Standard error of that mean."""
        return standard_error(self.losses)


class Campaign:
    """Plays the trials of an experiment, once each: outcomes are kept in a file and found there again.

    Args:
        experiment: What is compared; the file is NAME.jsonl.
        folder: Where the file is.
        processes: Trials at once; None: one a core.
    """

    def __init__(self, experiment: Experiment, folder: Path = RESULTS, processes: int | None = None) -> None:
        self._experiment = experiment
        self._folder = folder
        self._path = folder / f"{experiment.name}.jsonl"
        self._processes = processes or os.cpu_count() or 1
        self._outcomes: dict[str, Outcome] = {}
        if self._path.exists():
            for line in self._path.read_text(encoding="utf-8").splitlines():
                entry = json.loads(line)
                self._outcomes[entry["key"]] = _outcome(entry["outcome"])

    def outcomes(self, trials: Sequence[Trial]) -> list[Outcome]:
        """The outcomes of trials, played now where they are not known yet."""
        missing = {trial.key: trial for trial in trials if trial.key not in self._outcomes}
        if missing:
            self._play(missing)
        return [self._outcomes[trial.key] for trial in trials]

    @property
    def is_complete(self) -> bool:
        """Whether every outcome that the experiment needs is kept."""
        chooser = self._chooser()
        if any(trial.key not in chooser._outcomes for trial in chooser._tuning_trials()):
            return False
        return all(trial.key in self._outcomes for trials in self._reported(self.choices()[1]) for trial in trials)

    def tune(self) -> list[Tuned]:
        """Choose each arm's settings on validation, and play the chosen ones with other seeds on test."""
        if set(self._experiment.tuning_seeds) & set(self._experiment.seeds):
            raise ValueError("seeds that settings were chosen with are not for reporting")
        tried, points = self.choices()
        reported = self._reported(points)
        self.outcomes([trial for trials in reported for trial in trials])
        return [
            Tuned(arm=arm, point=point, tried=losses, outcomes=tuple(self.outcomes(trials)))
            for arm, point, losses, trials in zip(self._experiment.arms, points, tried, reported, strict=True)
        ]

    def choices(self) -> tuple[list[tuple[float, ...]], list[Settings]]:
        """Mean validation loss at every point of each arm's grid, and the best point."""
        chooser = self._chooser()
        if chooser is not self:
            tried, points = chooser.choices()
            places = {(arm.cell, arm.name): place for place, arm in enumerate(chooser._experiment.arms)}
            own = [places[arm.cell, arm.name] for arm in self._experiment.arms]
            return [tried[place] for place in own], [points[place] for place in own]
        self.outcomes(self._tuning_trials())
        arms, seeds = self._experiment.arms, self._experiment.tuning_seeds
        tried = [
            tuple(
                mean([o.loss for o in self.outcomes([_at(arm, point, seed, "validation") for seed in seeds])])
                for point in arm.grid
            )
            for arm in arms
        ]
        return tried, [arm.grid[losses.index(min(losses))] for arm, losses in zip(arms, tried, strict=True)]

    def _chooser(self) -> "Campaign":
        other = self._experiment.tuned_as
        return self if other is None else Campaign(other, self._folder, self._processes)

    def _tuning_trials(self) -> list[Trial]:
        return [
            _at(arm, point, seed, "validation")
            for arm in self._experiment.arms
            for point in arm.grid
            for seed in self._experiment.tuning_seeds
        ]

    def _reported(self, points: Sequence[Settings]) -> list[list[Trial]]:
        return [
            [_at(arm, point, seed, "test") for seed in self._experiment.seeds]
            for arm, point in zip(self._experiment.arms, points, strict=True)
        ]

    @property
    def cpu_s(self) -> float:
        """Processor seconds of all outcomes kept."""
        return sum(outcome.cpu_s for outcome in self._outcomes.values())

    def _play(self, trials: Mapping[str, Trial]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # Long ones first, so that no core is left with one at the end.
        ordered = sorted(trials.values(), key=_cost, reverse=True)
        context = multiprocessing.get_context("spawn")
        with (
            ProcessPoolExecutor(self._processes, mp_context=context) as pool,
            self._path.open("a", encoding="utf-8") as file,
        ):
            playing = {pool.submit(play, trial): trial for trial in ordered}
            for done in as_completed(playing):
                trial, outcome = playing[done], done.result()
                self._outcomes[trial.key] = outcome
                entry = {"key": trial.key, "trial": asdict(trial), "outcome": asdict(outcome)}
                file.write(json.dumps(entry) + "\n")
                file.flush()


def grid(**axes: Sequence[Any]) -> tuple[Settings, ...]:
    """Return all combinations of settings; names are given with "__" for the dot."""
    points: list[Settings] = [()]
    for name, values in axes.items():
        points = [(*point, (name.replace("__", "."), value)) for point in points for value in values]
    return tuple(points)


def mean(losses: Sequence[float]) -> float:
    """Return the mean, infinite if one is."""
    return statistics.fmean(losses) if all(math.isfinite(loss) for loss in losses) else math.inf


def standard_error(losses: Sequence[float]) -> float:
    """Return the standard error of the mean; 0 for one value, infinite if one is."""
    if not all(math.isfinite(loss) for loss in losses):
        return math.inf
    return statistics.stdev(losses) / math.sqrt(len(losses)) if len(losses) > 1 else 0.0


def _at(arm: Arm, point: Settings, seed: int, part: Any) -> Trial:
    server = tuple(sorted({**dict(arm.trial.server), **dict(point)}.items()))
    points = arm.trial.points if part == "test" else 1
    return replace(arm.trial, server=server, seed=seed, part=part, points=points)


def _cost(trial: Trial) -> float:
    if trial.until_s is not None:
        return round(sum(trial.until_s / slowness for slowness in trial.fleet.slowness))
    return (trial.until_gradients or 0) + (trial.until_rounds or 0) * len(trial.fleet.slowness) * 20


def _outcome(fields: dict[str, Any]) -> Outcome:
    return Outcome(**{**fields, "curve": [tuple(point) for point in fields["curve"]]})
