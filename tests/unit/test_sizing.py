"""What a run needs and gets: the model's limits, and that the page's tables are the model's."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.sizing import (
    BUFFER_BYTES,
    JOURNAL_PER_STATE,
    KEPT_SNAPSHOTS,
    LEAST_SHARE,
    SMALLEST_JOURNAL_BYTES,
    STREAM_BYTES,
    TARGET,
    WORK_BYTES,
    best_connections,
    exchange_s,
    inner_steps_for,
    recommended,
    server_size,
    sizing_table,
    traffic,
    utilization,
)
from paceline.sizing import (
    Path as Way,
)
from paceline_server import buffers
from paceline_server.config import DEFAULT_BUFFER_MIB, ServerConfig
from paceline_server.storage import snapshotter

ROOT = Path(__file__).resolve().parents[2]
MBIT = 1e6 / 8
WAYS = st.builds(
    Way,
    up_bytes_per_s=st.floats(1e5, 1e9),
    down_bytes_per_s=st.floats(1e5, 1e9),
    round_trip_s=st.floats(0.0, 0.5),
)
MODELS = st.integers(1_000_000, 10_000_000_000)
prop = settings(deadline=None, derandomize=True, max_examples=150)


@prop
@given(WAYS, MODELS)
def test_an_exchange_is_no_faster_than_its_parts(way: Way, num_elements: int) -> None:
    """It takes at least the round trip and the slowest direction, and at most all stages one after the other."""
    moved = traffic(num_elements, "int4", "bf16")
    up_s, down_s = moved.bytes_up / way.up_bytes_per_s, moved.bytes_down / way.down_bytes_per_s
    took_s = exchange_s(moved, way)
    assert took_s >= max(way.round_trip_s, up_s, down_s) * (1 - 1e-9)
    assert took_s <= way.round_trip_s + up_s + down_s + 3.3e-9 * num_elements + 1e-9


@prop
@given(WAYS, MODELS, st.floats(0.01, 10.0))
def test_as_many_steps_as_recommended_reach_the_target(way: Way, num_elements: int, step_s: float) -> None:
    """With the recommended H a worker computes TARGET of its time; with less than what the bytes take, it cannot."""
    moved = traffic(num_elements, "int4", "bf16")
    steps = inner_steps_for(moved, way, step_s)
    assert utilization(moved, way, steps * step_s) >= TARGET * (1 - 1e-9)
    busiest_s = max(moved.bytes_up / way.up_bytes_per_s, moved.bytes_down / way.down_bytes_per_s)
    assert utilization(moved, way, busiest_s / 2) <= 0.5
    assert utilization(moved, way, steps * step_s, waits=True) < utilization(moved, way, steps * step_s) + 1e-9


def test_a_second_round_in_flight_hides_the_round_trip_and_no_bytes() -> None:
    """A window of two halves what latency costs; where the bytes are the limit, it changes nothing."""
    small = traffic(1_000_000, "int4", "bf16")
    far = Way(up_bytes_per_s=1e9, down_bytes_per_s=1e9, round_trip_s=0.4)
    one, two = (utilization(small, far, 0.1, window=window) for window in (1, 2))
    assert two == pytest.approx(2 * one)
    large, thin = traffic(10**9, "int4", "bf16"), Way(up_bytes_per_s=1e6, down_bytes_per_s=1e8, round_trip_s=0.1)
    one, two = (utilization(large, thin, 10.0, window=window) for window in (1, 2))
    assert two == pytest.approx(one, rel=0.01)


def test_it_recommends_more_bytes_where_the_link_carries_them() -> None:
    """A fast link keeps bf16 both ways, a thin one gets few bits; a thinner one longer rounds."""

    def choice(mbit: float) -> tuple[str, str, int]:
        ways = {1: Way(up_bytes_per_s=mbit * MBIT, down_bytes_per_s=mbit * MBIT, round_trip_s=0.05)}
        setting = recommended(100_000_000, ways, 0.5, wanted_steps=50)
        assert setting.utilization >= TARGET
        return setting.uplink, setting.downlink, setting.inner_steps

    assert choice(1000) == ("bf16", "bf16", 50)
    assert choice(60) == ("int4", "int8", 50)
    assert choice(5)[:2] == ("topk", "int4")
    assert choice(5)[2] > 50


def test_connections_are_added_only_where_they_pay() -> None:
    """Of equal counts the fewest is taken; what carries twice as much is."""
    moved = traffic(100_000_000, "int4", "bf16")
    ways = {
        count: Way(up_bytes_per_s=rate, down_bytes_per_s=rate, round_trip_s=0.1)
        for count, rate in ((1, 20e6), (2, 40e6), (4, 78e6), (8, 80e6))
    }
    assert best_connections(moved, ways) == 4


@pytest.mark.parametrize("name", ["1g-both", "1g-up"])
def test_the_model_is_near_what_was_measured(name: str) -> None:
    """Exchanges over the emulated links of docs/wan.md took what the model says at raw TCP's rate, within 20 %."""
    told = json.loads((ROOT / "benchmarks" / "results" / "wan.json").read_text())[name]
    up, down = (rate * MBIT for rate in told["raw_mbit_per_s"])
    way = Way(up_bytes_per_s=up, down_bytes_per_s=down, round_trip_s=2 * told["shape"]["delay_ms"] / 1000)
    moved = traffic(told["parameters"], told["uplink"], told["downlink"])
    assert (moved.bytes_up / 1e6, moved.bytes_down / 1e6) == (told["megabytes_up"], told["megabytes_down"])
    measured = sorted(told["exchange_s"])[len(told["exchange_s"]) // 2]
    assert exchange_s(moved, way) == pytest.approx(measured, rel=0.2)


def test_the_servers_own_figures_are_meant() -> None:
    """What the model says of buffers, snapshots and the journal are the server's constants and defaults."""
    config = ServerConfig()
    assert BUFFER_BYTES == DEFAULT_BUFFER_MIB * 1024**2
    assert (
        buffers.STREAM_BYTES,
        buffers.work_bytes(config),
        buffers.LEAST_SHARE,
    ) == (STREAM_BYTES, WORK_BYTES, LEAST_SHARE)
    assert config.storage.keep_snapshots == KEPT_SNAPSHOTS
    assert (JOURNAL_PER_STATE, SMALLEST_JOURNAL_BYTES) == (
        snapshotter.JOURNAL_PER_STATE,
        snapshotter.SMALLEST_JOURNAL_BYTES,
    )


def test_a_servers_memory_grows_with_what_it_keeps() -> None:
    """8 bytes for each parameter; 4 more for each worker where updates are differences; a process for each shard."""
    plain, more = (server_size(count, 4, 50.0).memory_bytes for count in (10**9, 2 * 10**9))
    assert more - plain == pytest.approx(8e9)
    differences = server_size(10**9, 4, 50.0, downlink="int8").memory_bytes
    assert differences - plain == pytest.approx(16e9)
    assert server_size(10**9, 4, 50.0, shards=2).memory_bytes > plain


def test_the_pages_table_is_the_models() -> None:
    """docs/sizing.md has what the model gives, row by row."""
    page = (ROOT / "docs" / "sizing.md").read_text(encoding="utf-8")
    section = page.partition("\n## What a server needs\n")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")][2:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert cells == sizing_table((10**8, 10**9, 7 * 10**9, 70 * 10**9), (2, 8, 32), 100.0)


def test_the_pages_rounds_are_the_models() -> None:
    """docs/sizing.md's table of rounds has what the model gives for each link and model."""
    page = (ROOT / "docs" / "sizing.md").read_text(encoding="utf-8")
    section = page.partition("\n## How long a round must be\n")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    for link, *cells in rows[2:]:
        rate, round_trip = link.split(", ")
        number, unit = rate.split(" ")
        bytes_per_s = float(number) * (1000 if unit == "Gbit/s" else 1) * MBIT
        way = Way(up_bytes_per_s=bytes_per_s, down_bytes_per_s=bytes_per_s, round_trip_s=float(round_trip[:-3]) / 1000)
        for num_elements, cell in zip((10**8, 10**9, 7 * 10**9), cells, strict=True):
            moved = [traffic(num_elements, *pair) for pair in (("int4", "bf16"), ("int4", "int4"))]
            parts = [inner_steps_for(each, way, 1.0) for each in moved]
            assert cell == " / ".join(f"{seconds} s" for seconds in parts), (link, num_elements)
