"""What doctor makes of what it measured: rates from arrivals, and findings that warn where they should."""

import pytest

from paceline.doctor.advice import (
    Level,
    Model,
    about_certificate,
    about_clock,
    about_loss,
    about_utilization,
    expectation,
)
from paceline.doctor.probing import Arrivals, Rate, RoundTrips
from paceline.doctor.reach import Certificate
from paceline.doctor.tcp_info import Connections
from paceline_server.construction import run_configuration
from paceline_server.settings import config_from_mapping

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
