"""The entry point of every process of a measurement: calls one function of one system.

python -m peer_systems.process '{"system": "gloo", "role": "worker", ...}'
"""

import importlib
import json
import signal
import sys
from importlib.metadata import PackageNotFoundError, version

from peer_systems.setting import Setting
from peer_systems.training import Training

PACKAGES = ("torch", "torchft", "flwr", "grpcio", "paceline")


def main() -> None:
    """Call the function that the setting names."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    setting = Setting.from_json(sys.argv[1])
    system = importlib.import_module(f"peer_systems.{setting.system}")
    if setting.role == "coordinator":
        system.coordinate(setting)
    else:
        training = Training(setting)
        system.work(setting, training)
        training.report(versions=_versions())
    sys.stdin.readline()  # until its memory has been looked at


def ready() -> None:
    """Say that a coordinator serves."""
    print(json.dumps({"event": "ready"}), flush=True)


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    main()
