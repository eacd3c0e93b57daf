"""Paceline: one shard, and `join` in each worker.

Options: "uplink" and "downlink", the codecs; "overlap" and "schedule", as in Paceline's configuration.
"""

import signal

import paceline
import paceline_server
from peer_systems.process import ready
from peer_systems.setting import Setting
from peer_systems.training import Training


def coordinate(setting: Setting) -> None:
    """Run the server."""
    config = {
        "listen": setting.coordinator,
        "security": {"insecure": True},  # in a namespace, or on a machine of one's own
        "outer": {"lr": 0.7, "momentum": 0.9},
        "schedule": {"kind": setting.options["schedule"], "quota": setting.workers},
        "exchange": {
            "uplink": setting.options["uplink"],
            "downlink": setting.options["downlink"],
            "inner_steps": setting.inner_steps,
        },
    }
    with paceline_server.local(config):
        ready()
        signal.pause()


def work(setting: Setting, training: Training) -> None:
    """Make all rounds of one worker."""
    with paceline.join(
        setting.coordinator,
        training.model,
        training.optimizer,
        worker_id=f"worker{setting.rank}",
        overlap=setting.options["overlap"],
    ):
        for _ in training.rounds_with_hook():
            pass
