"""What doctor makes of what it measured: rates from arrivals, and findings that warn where they should."""

from typing import Any

import pytest

from paceline.doctor.advice import (
    LONGEST_ROUND,
    Expectation,
    Level,
    Limit,
    Model,
    about_certificate,
    about_clock,
    about_limit,
    about_loss,
    about_utilization,
    expectation,
)
from paceline.doctor.probing import Arrivals, Rate, RoundTrips
from paceline.doctor.reach import Certificate
from paceline.doctor.tcp_info import Connections
from paceline_server.construction import run_configuration
from paceline_server.settings import config_from_mapping
from paceline_wire.v1 import parameter_server_pb2 as pb

DAY_S = 86400.0


def trips(clock_ahead_s: float = 0.0, median_s: float = 0.1) -> RoundTrips:
    """Round trips of a steady link."""
    return RoundTrips(
        median_s=median_s,
        p95_s=median_s,
        least_s=median_s,
        jitter_s=0.0,
        clock_ahead_s=clock_ahead_s,
        clock_error_s=median_s / 2,
    )


def test_a_rate_leaves_out_the_beginning_and_the_end() -> None:
    """Two connections that begin slowly, and of which one ends before the other: what both carried in between."""
    arrivals = Arrivals(2, 10.0)
    for connection, rate in ((0, 100), (1, 300)):
        arrivals.note(connection, 13.0, 3)
        arrivals.note(connection, 19.0, 3 + 6 * rate)
    arrivals.note(1, 40.0, 1900)
    assert arrivals.rate(0.0) == pytest.approx(400)
    assert arrivals.took_s == 30.0
    # Seven round trips of a long link are left out, at most two thirds.
    arrivals = Arrivals(1, 0.0)
    arrivals.note(0, 5.0, 100)
    arrivals.note(0, 9.0, 4100)
    assert arrivals.rate(0.8) == pytest.approx(1000)
    assert arrivals.rate(100.0) == pytest.approx(1000)


def test_a_transfer_that_was_broken_off_still_has_a_rate() -> None:
    """Where something had arrived on each connection, as ever; where not, all that arrived in the time that it took."""
    arrivals = Arrivals(2, 10.0)
    arrivals.note(0, 35.0, 5000)
    assert arrivals.num_bytes == 5000
    assert arrivals.rate(0.1) == pytest.approx(200)
    arrivals.note(1, 35.0, 2500)
    assert arrivals.rate(0.1) == pytest.approx(300)


def test_clocks_are_warned_of_beyond_what_the_round_trip_explains() -> None:
    """Half a minute matters, in either direction; what may be the round trip's does not."""
    assert about_clock(trips(clock_ahead_s=-29.0)).level is Level.FINE
    assert about_clock(trips(clock_ahead_s=31.0, median_s=4.0)).level is Level.FINE
    behind = about_clock(trips(clock_ahead_s=-31.0))
    assert behind.level is Level.WARNING
    assert "31000 ms behind" in behind.text


def test_certificates_are_warned_of_in_time() -> None:
    """Two weeks before it ends; and where there is none, unless what is sent stays on the host."""

    def ending(days: float) -> Certificate:
        ends_s = 1e9 + days * DAY_S
        return Certificate(subject="ps", issuer="run", names=("ps",), not_after_s=ends_s, version="TLSv1.3", cipher="x")

    assert about_certificate(ending(15), 1e9, is_local=False).level is Level.FINE
    assert about_certificate(ending(13), 1e9, is_local=False).level is Level.WARNING
    assert about_certificate(None, 1e9, is_local=True).level is Level.FINE
    assert about_certificate(None, 1e9, is_local=False).level is Level.WARNING


def test_losses_and_buffers_are_told_apart() -> None:
    """Beyond one in a hundred segments is a warning; else a full buffer is named; too few segments say nothing."""

    def sent(segments: int, again: int, **limits: float) -> Connections:
        told = {"receiver_limited_s": 0.0, "sender_limited_s": 0.0, **limits}
        return Connections(
            count=1, segments_sent=segments, segments_resent=again, busy_s=10.0, min_round_trip_s=0.1, **told
        )

    before = sent(5000, 100)
    assert about_loss(sent(6000, 130).loss_since(before), before).level is Level.WARNING
    assert about_loss(sent(6000, 103).loss_since(before), before).level is Level.FINE
    assert "send buffer" in about_loss(0.003, sent(1000, 3, sender_limited_s=8.0)).text
    assert "tcp_rmem" in about_loss(0.003, sent(1000, 3, receiver_limited_s=8.0)).text
    assert sent(5050, 130).loss_since(before) is None
    assert "unknown" in about_loss(None, before).text


def test_it_recommends_what_reaches_the_target() -> None:
    """A thin link gets fewer bits or longer rounds, never more bits than the run has; a cap on the uplink counts."""
    rates = tuple(Rate(connections=n, up_bytes_per_s=n * 1e6, down_bytes_per_s=n * 2e6) for n in (1, 2, 4, 8))
    model = Model(num_elements=100_000_000, step_s=0.5, source="as given")
    configuration = run_configuration(config_from_mapping({}))
    found = expectation(configuration, model, rates, trips())
    assert (found.configured.uplink, found.configured.downlink, found.configured.connections) == ("int4", "bf16", 8)
    assert found.configured.utilization >= 0.95
    assert about_utilization(found).level is Level.FINE
    capped = run_configuration(config_from_mapping({"exchange": {"max_uplink_mbit": 5, "connections": 2}}))
    found = expectation(capped, model, rates, trips())
    assert found.configured.connections == 2
    assert found.configured.utilization < 0.5
    assert found.recommended.utilization >= 0.95
    assert found.recommended.downlink in ("int8", "int4")
    warned = about_utilization(found)
    assert warned.level is Level.WARNING
    assert f"choose H = {found.configured_needs} or " in warned.text


GIGABIT = 1e9 / 8


def rates_of(up_bytes_per_s: float, down_bytes_per_s: float, *limited: float) -> tuple[Rate, ...]:
    """A link that one connection fills, and for which share of the time the server held it back up and down."""
    up, down = limited or (0.0, 0.0)
    rate = Rate(
        connections=1,
        up_bytes_per_s=up_bytes_per_s,
        down_bytes_per_s=down_bytes_per_s,
        up_limited=up,
        down_limited=down,
    )
    return (rate,)


def test_the_servers_limit_is_not_taken_for_the_link() -> None:
    """What was held back is named, in its direction; a link of plain Gigabit Ethernet, as fast as the limit, is not."""
    run = pb.DescribeResponse(caller="paris", caller_mbit=1000, shards=[pb.Shard(port=1), pb.Shard(port=2)])
    limit = Limit.of(run, rates_of(0.9 * GIGABIT, 1.05 * GIGABIT, 0.8, 0.9))
    assert limit is not None
    assert limit.reached == ("up", "down")
    found = about_limit(limit)
    assert found.level is Level.FINE
    assert "what was measured up and down is the server's limit for 'paris' and not what the link carries" in found.text
    assert "1 Gbit/s each way for each of the 2 shards" in found.text
    assert "limits.mbit" in found.text
    ethernet = Limit.of(run, rates_of(0.94 * GIGABIT, 0.98 * GIGABIT, 0.0, 0.01))
    assert ethernet is not None
    assert ethernet.reached == ()
    assert "what was measured stays below it" in about_limit(ethernet).text
    assert Limit.of(pb.DescribeResponse(caller="paris"), rates_of(1e9, 1e9)) is None
    assert Limit.of(run, ()) is None


def test_the_time_that_connections_were_held_back_is_a_share() -> None:
    """The mean of the connections' newest words, of the time of the whole transfer."""
    arrivals = Arrivals(2, 10.0)
    arrivals.note(0, 12.0, 100, 1.0)
    arrivals.note(0, 14.0, 200, 3.0)
    arrivals.note(1, 14.0, 200, 1.0)
    assert arrivals.limited_share == pytest.approx(0.5)


def expected_of(config: dict[str, Any], num_elements: int, step_s: float, *rates: Rate) -> Expectation:
    """What to expect of a run with a configuration."""
    model = Model(num_elements=num_elements, step_s=step_s, source="as given")
    return expectation(run_configuration(config_from_mapping(config)), model, rates, trips())


def test_advice_names_the_limit_where_it_may_be_what_counts() -> None:
    """Too short a round over a link that the server limits: the operator can help, too."""
    limit = Limit(caller="paris", mbit=1000, num_shards=1, reached=("down",))
    found = expected_of({}, 7_000_000_000, 0.5, *rates_of(GIGABIT, GIGABIT))
    assert "let the operator raise limits.mbit" in about_utilization(found, limit).text
    assert "limits.mbit" not in about_utilization(found).text
    assert "limits.mbit" not in about_utilization(found, Limit(caller="a", mbit=1, num_shards=1, reached=())).text


def test_recommendations_count_the_momentum_that_travels_too() -> None:
    """Updates with the server's momentum are twice as large, whichever codecs: what is recommended takes as long."""
    config = {"exchange": {"own_weight": "predicted"}}
    found = expected_of(config, 1_000_000_000, 10.0, *rates_of(1e8, 1e8))
    assert (found.configured.uplink, found.configured.downlink) == (
        found.recommended.uplink,
        found.recommended.downlink,
    )
    assert found.recommended.exchange_s == pytest.approx(found.configured.exchange_s)
    pushed = expected_of(
        {"outer": {"rule": "orlomo"}, "exchange": {"dynamic_inner_steps": False}}, 10**9, 0.1, *rates_of(1e5, 1e9)
    )
    assert pushed.recommended.uplink != "topk"


def test_no_direction_is_recommended_more_bytes_than_it_has() -> None:
    """A run that spares its uplink keeps doing so, however wide the link is there."""
    found = expected_of({"exchange": {"uplink": "int4", "downlink": "fp32"}}, 10**9, 0.5, *rates_of(1e9, 1e8))
    assert found.configured.utilization < 0.95
    assert found.recommended.uplink in ("int4", "topk")
    assert found.recommended.downlink != "fp32"


@pytest.mark.parametrize("num_elements", [1, 10**13])
@pytest.mark.parametrize("bytes_per_s", [10.0, 1e11])
@pytest.mark.parametrize("step_s", [1e-6, 1e5])
def test_extremes_have_an_answer(num_elements: int, bytes_per_s: float, step_s: float) -> None:
    """The smallest and largest models, links and steps; rounds that are far too long come with what would be better."""
    found = expected_of({}, num_elements, step_s, *rates_of(bytes_per_s, bytes_per_s))
    told = about_utilization(found)
    assert 0 < found.configured.utilization <= 1
    assert found.recommended.utilization >= 0.95
    too_long = found.recommended.inner_steps > LONGEST_ROUND
    assert ("workers drift apart" in told.text) is (too_long and told.level is Level.WARNING)


def test_advice_for_a_model_that_keeps_the_processors_busy() -> None:
    """Where the link is not what takes long, neither it nor the server's limit is blamed."""
    limit = Limit(caller="paris", mbit=1000, num_shards=1, reached=("up", "down"))
    text = about_utilization(expected_of({}, 70_000_000_000, 1.0, *rates_of(2e9, 2e9)), limit).text
    assert "faster processors, or more shards" in text
    assert "limits.mbit" not in text
    assert "a faster link or fewer" in about_utilization(expected_of({}, 10**9, 0.1, *rates_of(1e6, 1e6))).text
