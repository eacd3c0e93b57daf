"""What a run needs and what it gets: bytes, memory, disk, and the share of their time that workers compute. Pure.

The model (derived in docs/sizing.md, and used by `paceline doctor` and the tables there). With N elements in F
fragments of equal size, a payload up of U bytes and one down of D bytes, a link of R_u and R_d bytes a second and a
round trip of r seconds, an exchange is three stages in a row, through which the fragments follow each other:

    a = U / R_u        the way up
    p = N * PROCESS_S  the processors: encoding, applying, encoding, decoding
    d = D / R_d        the way down

    X = r + (a + p + d) / F + (1 - 1/F) max(a, p, d)

A round has H inner steps of T seconds, C = H T. With W rounds in flight at most, and h = N * HOOK_S seconds of the
training thread for a round, a worker that never waits unless it must has

    round = max(C + h, X / W, a, p, d)          utilization = C / round

and one that waits for each exchange has round = C + h + X.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from paceline_wire import codecs
from paceline_wire.manifest import DEFAULT_FRAGMENT_ELEMENTS

PROCESS_S = 3.3e-9
"""Seconds of an exchange for each element where the link is none: 0.327 s for 100 M over loopback, on two cores."""

HOOK_S = 1.0e-9
"""Seconds of the training thread for each element and round: 10.2 ms for 10 M, with an exchange under way."""

TARGET = 0.95
"""Utilization that recommendations aim at."""

MARGIN = 1.2
"""Recommended rounds are so much longer than the exchange: links are shared, and rates are measured for seconds."""

GAIN = 1.1
"""More connections are recommended only if they make the exchange so much faster."""

CODEC_PAIRS = (
    ("bf16", "bf16"),
    ("int8", "bf16"),
    ("int4", "bf16"),
    ("int4", "int8"),
    ("int4", "int4"),
    ("topk", "int4"),
)
"""Codecs up and down, from the most bytes to the fewest."""

MIB = 1024**2

PROCESS_BYTES = 250 * MIB
"""What a server's process takes before it has anything: Python, torch, gRPC."""

BUFFER_BYTES = 512 * MIB
STREAM_BYTES = 6 * MIB
WORK_BYTES = 144 * MIB
LEAST_SHARE = 0.25
"""exchange.buffer_mib by default, what of it a stream and the shard's work take, and what is left for payloads."""

KEPT_SNAPSHOTS = 2
SMALLEST_JOURNAL_BYTES = 256 * MIB
JOURNAL_PER_STATE = 2
"""storage.keep_snapshots by default, and how far the journal grows between two snapshots."""


@dataclass(frozen=True, kw_only=True)
class Path:
    """A worker's way to a shard and back.

    Attributes:
        up_bytes_per_s: What it carries up.
        down_bytes_per_s: What it carries down.
        round_trip_s: Seconds.
    """

    up_bytes_per_s: float
    down_bytes_per_s: float
    round_trip_s: float


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What a worker exchanges in a round.

    Attributes:
        num_elements: Elements of the model (N).
        num_fragments: Fragments of equal size (F).
        bytes_up: All payloads up (U).
        bytes_down: All payloads down (D).
    """

    num_elements: int
    num_fragments: int
    bytes_up: int
    bytes_down: int


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A way to run, and what it should give.

    Attributes:
        uplink: Codec of pushes.
        downlink: Codec of updates.
        connections: TCP connections to each shard.
        inner_steps: Inner steps in a round (H).
        exchange_s: Seconds of an exchange (X).
        utilization: Share of the time in inner steps.
    """

    uplink: str
    downlink: str
    connections: int
    inner_steps: int
    exchange_s: float
    utilization: float


def traffic(
    num_elements: int,
    uplink: str,
    downlink: str,
    *,
    fragment_elements: int = DEFAULT_FRAGMENT_ELEMENTS,
    momentum_up: bool = False,
    momentum_down: bool = False,
) -> Traffic:
    """What a round moves.

    Args:
        num_elements: Elements of the model.
        uplink: Codec of pushes.
        downlink: Codec of updates.
        fragment_elements: The largest fragment.
        momentum_up: Whether pushes carry the workers' momentum, too.
        momentum_down: Whether updates carry the server's momentum, too.

    Raises:
        InvalidInputError: There is no such codec.
    """
    num_fragments = max(1, math.ceil(num_elements / fragment_elements))
    return Traffic(
        num_elements=num_elements,
        num_fragments=num_fragments,
        bytes_up=codecs.codec(uplink).encoded_bytes(num_elements * (2 if momentum_up else 1)),
        bytes_down=codecs.codec(downlink).encoded_bytes(num_elements * (2 if momentum_down else 1)),
    )


def exchange_s(moved: Traffic, path: Path) -> float:
    """Seconds of an exchange (X), from the first byte of the first push to the last byte of the last update."""
    stages = _stages_s(moved, path)
    return path.round_trip_s + sum(stages) / moved.num_fragments + (1 - 1 / moved.num_fragments) * max(stages)


def utilization(moved: Traffic, path: Path, compute_s: float, *, window: int = 1, waits: bool = False) -> float:
    """The share of a worker's time in inner steps.

    Args:
        moved: What a round moves.
        path: Over which link.
        compute_s: Seconds of a round's inner steps (C).
        window: Rounds in flight at most (W).
        waits: Whether the worker waits for each exchange (`overlap="blocking"`).
    """
    hook_s = moved.num_elements * HOOK_S
    if waits:
        return compute_s / (compute_s + hook_s + exchange_s(moved, path))
    round_s = max(compute_s + hook_s, exchange_s(moved, path) / window, *_stages_s(moved, path))
    return compute_s / round_s


def inner_steps_for(moved: Traffic, path: Path, step_s: float, *, window: int = 1) -> int:
    """The fewest inner steps in a round (H) that reach TARGET with MARGIN to spare."""
    busy_s = MARGIN * max(exchange_s(moved, path) / window, *_stages_s(moved, path))
    hook_s = moved.num_elements * HOOK_S * TARGET / (1 - TARGET)
    return max(1, math.ceil(max(busy_s, hook_s) / step_s))


def best_connections(moved: Traffic, paths: Mapping[int, Path]) -> int:
    """The fewest connections with which an exchange takes not much longer than with the best of the others."""
    least_s = min(exchange_s(moved, path) for path in paths.values())
    return min(count for count, path in paths.items() if exchange_s(moved, path) <= GAIN * least_s)


def recommended(
    num_elements: int,
    paths: Mapping[int, Path],
    step_s: float,
    *,
    wanted_steps: int,
    pairs: Iterable[tuple[str, str]] = CODEC_PAIRS,
    window: int = 1,
    fragment_elements: int = DEFAULT_FRAGMENT_ELEMENTS,
    momentum_up: bool = False,
    momentum_down: bool = False,
) -> Setting:
    """The codecs with the most bytes that reach TARGET in rounds of at most so many steps; else those with the fewest.

    Args:
        num_elements: Elements of the model.
        paths: The link, by the number of connections.
        step_s: Seconds of an inner step.
        wanted_steps: The most inner steps in a round that the caller wants.
        pairs: Codecs up and down to choose from, from the most bytes to the fewest.
        window: Rounds in flight at most.
        fragment_elements: The largest fragment.
        momentum_up: Whether pushes carry the workers' momentum, too.
        momentum_down: Whether updates carry the server's momentum, too.
    """
    settings: list[Setting] = []
    for uplink, downlink in pairs:
        moved = traffic(
            num_elements,
            uplink,
            downlink,
            fragment_elements=fragment_elements,
            momentum_up=momentum_up,
            momentum_down=momentum_down,
        )
        count = best_connections(moved, paths)
        needed = inner_steps_for(moved, paths[count], step_s, window=window)
        steps = max(needed, wanted_steps)
        setting = Setting(
            uplink=uplink,
            downlink=downlink,
            connections=count,
            inner_steps=steps,
            exchange_s=exchange_s(moved, paths[count]),
            utilization=utilization(moved, paths[count], steps * step_s, window=window),
        )
        if needed <= wanted_steps:
            return setting
        settings.append(setting)
    return min(settings, key=lambda setting: setting.inner_steps)


@dataclass(frozen=True, kw_only=True)
class ServerSize:
    """What the server of a run needs, over all its shards.

    Attributes:
        memory_bytes: Resident memory at most.
        disk_bytes: The data directory at most.
        up_bits_per_s: What all workers together push, on average; the server receives it.
        down_bits_per_s: What all workers together are sent, on average.
    """

    memory_bytes: float
    disk_bytes: float
    up_bits_per_s: float
    down_bits_per_s: float


def server_size(
    num_elements: int,
    workers: int,
    round_s: float,
    *,
    uplink: str = "int4",
    downlink: str = "bf16",
    shards: int = 1,
    vectors: int = 2,
    connections: int = 1,
) -> ServerSize:
    """What a run's server needs.

    Args:
        num_elements: Elements of the model.
        workers: Workers.
        round_s: Seconds of a round.
        uplink: Codec of pushes.
        downlink: Codec of updates.
        shards: Server processes.
        vectors: float32 vectors that the outer rule keeps of the model, the parameters included; ordered momentum: 2.
        connections: TCP connections of a worker to each shard.
    """
    moved = traffic(num_elements, uplink, downlink)
    state_bytes = 4 * vectors * num_elements
    references_bytes = 4 * num_elements * workers if downlink in ("int8", "int4") else 0
    buffer_bytes = max(BUFFER_BYTES, (WORK_BYTES + workers * connections * STREAM_BYTES) / (1 - LEAST_SHARE))
    journal_bytes = max(JOURNAL_PER_STATE * state_bytes, shards * SMALLEST_JOURNAL_BYTES)
    return ServerSize(
        memory_bytes=shards * (PROCESS_BYTES + buffer_bytes) + state_bytes + references_bytes,
        disk_bytes=(KEPT_SNAPSHOTS + 1) * state_bytes + KEPT_SNAPSHOTS * journal_bytes,
        up_bits_per_s=8 * workers * moved.bytes_up / round_s,
        down_bits_per_s=8 * workers * moved.bytes_down / round_s,
    )


def sizing_table(models: Sequence[int], workers: Sequence[int], round_s: float) -> list[list[str]]:
    """The rows of docs/sizing.md: model, workers, memory, disk, network in and out."""
    rows = []
    for num_elements in models:
        for count in workers:
            size = server_size(num_elements, count, round_s)
            rows.append(
                [
                    f"{num_elements / 1e9:g} B" if num_elements >= 1e9 else f"{num_elements / 1e6:g} M",
                    str(count),
                    gibibytes(size.memory_bytes),
                    gibibytes(size.disk_bytes),
                    megabits(size.up_bits_per_s),
                    megabits(size.down_bits_per_s),
                ]
            )
    return rows


def gibibytes(num_bytes: float) -> str:
    """A size as tables have it, in three digits."""
    return f"{num_bytes / 1024**4:.3g} TiB" if num_bytes >= 999.5 * 1024**3 else f"{num_bytes / 1024**3:.3g} GiB"


def megabits(bits_per_s: float) -> str:
    """A rate as tables have it, in three digits."""
    return f"{bits_per_s / 1e9:.3g} Gbit/s" if bits_per_s >= 0.9995e9 else f"{bits_per_s / 1e6:.3g} Mbit/s"


def _stages_s(moved: Traffic, path: Path) -> tuple[float, float, float]:
    return (
        moved.bytes_up / path.up_bytes_per_s,
        moved.num_elements * PROCESS_S,
        moved.bytes_down / path.down_bytes_per_s,
    )
