"""Paceline beside the systems that people use instead: seconds and bytes of an outer step, and how busy training stays.

    make bench-peers
    python benchmarks/peers.py --parameters 10000000 --links loopback --systems paceline gloo --json

Two workers, twenty float32 tensors, the same for all, blocking outer steps after inner steps that cost nothing; then
rounds of inner steps that last a stated time, each system with the overlap that it has. The repeats of all systems are
interleaved. Every measured cell replaces that of an earlier run in benchmarks/results/peers.json.

The peers live in an environment of their own, `.venv-peers`, which `--install` makes.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import venv
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from peer_systems import places
from peer_systems.measuring import DidNotRun, Load, System, measure

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "peers.json"
VENV = ROOT / ".venv-peers"
REQUIREMENTS = ("torch==2.13.0", "numpy", "torchft==0.2.0", "flwr==1.42.0")
WORKERS = 2


def systems(uplink: str, downlink: str) -> dict[str, System]:
    """Every system that can be measured, by a short name."""
    codecs = {"uplink": uplink, "downlink": downlink}
    both = uplink if uplink == downlink else f"{uplink} up, {downlink} down"
    ours = {"module": "paceline_join", "is_ours": True, "package": "paceline", "on_the_wire": both}
    gloo = {"module": "gloo", "has_coordinator": False, "between_workers": True}
    return {
        "paceline": System(
            label="Paceline", options=codecs | {"schedule": "barrier", "overlap": "blocking"}, **ours
        ),
        "gloo": System(label="torch.distributed, gloo", on_the_wire="fp32", options={"dtype": "float32"}, **gloo),
        "gloo-bf16": System(label="torch.distributed, gloo", on_the_wire="bf16", options={"dtype": "bfloat16"}, **gloo),
        "torchft": System(
            label="torchft DiLoCo, gloo",
            module="torchft_diloco",
            on_the_wire="fp32",
            options={"delay": "0"},
            between_workers=True,
            package="torchft",
        ),
        "http": System(label="http.server, torch.save", module="http_server", on_the_wire="bf16"),
        "rpc": System(label="torch.distributed.rpc", module="rpc_server", on_the_wire="bf16"),
        "flower": System(label="Flower, FedAvgM", module="flower", on_the_wire="fp32", package="flwr"),
    }
