"""Whole runs in virtual time: the server's decisions and the workers' logic, without sockets, threads or a clock."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paceline_simulator.arrivals import Arrival, read_arrivals
    from paceline_simulator.result import Evaluation, Result, WorkerResult
    from paceline_simulator.simulation import Simulation
    from paceline_simulator.task import ModuleTask, Task
    from paceline_simulator.workers import Absence, Manner, WorkerSpec

__all__ = [
    "Absence",
    "Arrival",
    "Evaluation",
    "Manner",
    "ModuleTask",
    "Result",
    "Simulation",
    "Task",
    "WorkerResult",
    "WorkerSpec",
    "read_arrivals",
]

_HOMES = {
    "arrivals": ("Arrival", "read_arrivals"),
    "result": ("Evaluation", "Result", "WorkerResult"),
    "simulation": ("Simulation",),
    "task": ("ModuleTask", "Task"),
    "workers": ("Absence", "Manner", "WorkerSpec"),
}


def __getattr__(name: str) -> Any:
    """Import a public name at its first use: torch takes seconds, which `paceline --help` need not wait for."""
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"paceline_simulator.{home}"), name)
    raise AttributeError(f"module 'paceline_simulator' has no attribute {name!r}")
