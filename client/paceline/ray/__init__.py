"""Runs on a Ray cluster: `launch` puts shards and workers on it as actors that it starts again; `attach` finds them.

Ray is an optional extra: `pip install 'paceline[ray]'`.
"""

import importlib.util

if importlib.util.find_spec("ray") is None:
    raise ModuleNotFoundError("paceline.ray needs Ray, which is not installed: pip install 'paceline[ray]'", name="ray")

from paceline.ray.launching import attach, launch
from paceline.ray.running import RayRun, RunStatus
from paceline.ray.status import ActorStatus
from paceline.ray.training import Train, WorkerContext

__all__ = ["ActorStatus", "RayRun", "RunStatus", "Train", "WorkerContext", "attach", "launch"]
