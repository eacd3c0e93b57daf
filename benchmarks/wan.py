"""How much of a long link an exchange fills, beside raw TCP that moves the same bytes over it, in the same run.

Needs root (link.py). A server in host a and a worker in host b exchange whole rounds over the emulated link, with
Linux's default buffers. Between two exchanges as many bytes are moved both ways, at once, over raw TCP connections that
stay open; ratios are those of neighbours. Either side's connections are as cold as a round's pause makes them.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from link import Host, Link
from link_queue import LinkShape
from wan_worker import payload_bytes

PORT = 7070
HERE = Path(__file__).parent
RESULTS = HERE / "results" / "wan.json"
TARGET_CONNECTIONS = 4
"""Raw TCP connections that the targets name."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A link, what is exchanged over it, and what that is compared with.

    Attributes:
        shape: The link.
        parameters: Parameters of the model.
        uplink: Codec of pushes.
        downlink: Codec of updates.
        target: Share of raw TCP's rate that an exchange is to reach.
        raw_connections: Connections of raw TCP; None: as many as the exchange has found to pay.
        warm_s: Seconds of exchanges that do not count, in which the number of connections is found.
        fragment_elements: The largest fragment.
    """

    shape: LinkShape
    parameters: int
    uplink: str
    downlink: str
    target: float
    raw_connections: int | None = TARGET_CONNECTIONS
    warm_s: float = 75.0
    fragment_elements: int = 4_194_304


_FAST = LinkShape(rate_mbit=1000, delay_ms=50)
_SLOW = LinkShape(rate_mbit=100, delay_ms=50)
SETTINGS = {
    "1g-up": Setting(shape=_FAST, parameters=100_000_000, uplink="fp32", downlink="bf16", target=0.85),
    "1g-down": Setting(shape=_FAST, parameters=100_000_000, uplink="int4", downlink="fp32", target=0.85),
    "1g-both": Setting(shape=_FAST, parameters=100_000_000, uplink="int8", downlink="int8", target=0.85),
    "100m-up": Setting(shape=_SLOW, parameters=20_000_000, uplink="fp32", downlink="bf16", target=0.95),
    "100m-down": Setting(shape=_SLOW, parameters=20_000_000, uplink="int4", downlink="fp32", target=0.95),
    "lossy-both": Setting(
        shape=LinkShape(rate_mbit=1000, delay_ms=50, loss=0.001),
        parameters=4_000_000,
        uplink="int8",
        downlink="int8",
        target=1.0,
        raw_connections=None,
        fragment_elements=131_072,
    ),
}


@contextmanager
def _process(host: Host, command: Sequence[str], **options: Any) -> "Iterator[subprocess.Popen[Any]]":
    with host.popen([sys.executable, *command], **options) as process:
        try:
            yield process
        finally:
            process.terminate()


def measure(setting: Setting, rounds: int, connections: str) -> dict[str, Any]:
    """Alternate exchanges and raw rounds over one link, and compare them pair by pair."""
    with Link(setting.shape) as link:
        server_host, worker_host = link.hosts
        serving = ["-m", "paceline", "serve", "--listen", f"{server_host.address}:{PORT}", "--schedule.quota", "1"]
        # Nobody else is in this namespace.
        serving += ["--insecure", "--exchange.uplink", setting.uplink, "--exchange.downlink", setting.downlink]
        serving += [
            "--exchange.connections",
            connections,
            "--exchange.fragment-elements",
            str(setting.fragment_elements),
        ]
        working = [str(HERE / "wan_worker.py"), "--server", f"{server_host.address}:{PORT}"]
        working += ["--parameters", str(setting.parameters), "--uplink", setting.uplink]
        working += ["--downlink", setting.downlink, "--rounds", str(rounds), "--warm-s", str(setting.warm_s)]
        if setting.raw_connections is not None:
            working += ["--raw-connections", str(setting.raw_connections)]
        raw = [str(HERE / "raw_tcp.py"), "--serve", server_host.address]
        with (
            _process(server_host, serving, stdout=subprocess.DEVNULL),
            _process(server_host, raw, stdout=subprocess.DEVNULL),
            _process(worker_host, working, stdout=subprocess.PIPE, text=True) as worker,
        ):
            assert worker.stdout is not None
            answer = worker.stdout.read()
    if not answer:
        raise RuntimeError("the worker ended without a result; what it printed says why")
    found: dict[str, Any] = json.loads(answer)
    up, down = payload_bytes(setting.parameters, setting.uplink, setting.downlink)
    ratios = [raw_s / s for s, raw_s in zip(found["exchange_s"], found["raw_s"], strict=True)]
    exchange_s, raw_s = statistics.median(found["exchange_s"]), statistics.median(found["raw_s"])
    return {
        **asdict(setting),
        **found,
        "megabytes_up": up / 1e6,
        "megabytes_down": down / 1e6,
        "exchange_mbit_per_s": [num_bytes * 8 / 1e6 / exchange_s for num_bytes in (up, down)],
        "raw_mbit_per_s": [num_bytes * 8 / 1e6 / raw_s for num_bytes in (up, down)],
        "share_of_raw": statistics.median(ratios),
        "share_of_raw_min": min(ratios),
        "share_of_raw_max": max(ratios),
        "carrier_cpu_s": link.carried["cpu_s"],
        "lost_segments": [link.carried[way]["lost_segments"] for way in ("up", "down")],
        "overflowed_segments": [link.carried[way]["overflowed_segments"] for way in ("up", "down")],
    }


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--connections", default="auto", help="as exchange.connections")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--keep", action="store_true", help=f"put the results into {RESULTS.name} beside earlier ones")
    arguments = parser.parse_args()
    results = {}
    for name in arguments.settings:
        measured = measure(SETTINGS[name], arguments.rounds, arguments.connections)
        results[name] = measured | _origin()
        if not arguments.json:
            print(_line(name, measured), flush=True)
        if arguments.keep:
            kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
            RESULTS.write_text(json.dumps(kept | {name: results[name]}, indent=1) + "\n")
    if arguments.json:
        print(json.dumps(results))


def _line(name: str, measured: dict[str, Any]) -> str:
    up, down = measured["exchange_mbit_per_s"]
    raw_up, raw_down = measured["raw_mbit_per_s"]
    return (
        f"{name:<10} {up:4.0f} up and {down:4.0f} down Mbit/s over {measured['connections']} connections; "
        f"raw TCP {raw_up:4.0f} and {raw_down:4.0f} over {measured['raw_connections']}: "
        f"{measured['share_of_raw']:.2f} ({measured['share_of_raw_min']:.2f} to {measured['share_of_raw_max']:.2f}, "
        f"target {measured['target']:.2f})"
    )


def _origin() -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "kernel": platform.release(),
        "versions": {name: version(name) for name in ("grpcio", "protobuf", "torch")}
        | {"python": platform.python_version()},
    }


if __name__ == "__main__":
    main()
