"""From what was measured to what it means: findings, a recommendation, and what to expect. Pure.

A finding is fine, a warning, or a problem. Any warning or problem makes the command's answer a negative one.
"""

from dataclasses import dataclass
from enum import Enum

from paceline.doctor.probing import Rate, RoundTrips
from paceline.doctor.reach import Certificate
from paceline.doctor.tcp_info import Connections
from paceline.sizing import (
    CODEC_PAIRS,
    PROCESS_S,
    TARGET,
    Path,
    Setting,
    best_connections,
    exchange_s,
    inner_steps_for,
    megabits,
    recommended,
    traffic,
    utilization,
)
from paceline_wire import codecs
from paceline_wire.manifest import DEFAULT_FRAGMENT_ELEMENTS
from paceline_wire.v1 import parameter_server_pb2 as pb

LATEST_EXPIRY_S = 14 * 24 * 3600.0
"""A certificate that ends sooner is warned of: whoever renews it may be away for a week."""

MOST_CLOCK_S = 30.0
"""Clocks may differ by so much: certificates and tokens are valid for days, and starts of a worker minutes apart."""

MOST_LOSS = 0.01
"""Of more lost segments than these one connection carries little, and more connections help little."""

LONGEST_ROUND = 500
"""Inner steps, beyond which advice says that workers drift apart: what blocking DiLoCo takes."""

LIMITED_SHARE = 0.3
"""Share of the time in which a buffer held TCP back, or the server's limit the caller, from which that is named."""


class Level(Enum):
    """How bad a finding is."""

    FINE = "fine"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was found.

    Attributes:
        about: "reach", "tls", "clock", "round trip", "limit", "loss", "shards" or "utilization".
        level: How bad it is.
        text: What, and what to do about it, in a sentence.
    """

    about: str
    level: Level
    text: str


@dataclass(frozen=True, kw_only=True)
class Limit:
    """What the server lets the caller take, as far as its credential names one.

    Attributes:
        caller: Its name.
        mbit: Mbit/s that all who show the credential may send to each shard, and as many that they may receive.
        num_shards: Shards of the run.
        reached: In which of the directions "up" and "down" that was measured, and not the link.
    """

    caller: str
    mbit: float
    num_shards: int
    reached: tuple[str, ...]

    @classmethod
    def of(cls, run: pb.DescribeResponse, rates: tuple[Rate, ...]) -> "Limit | None":
        """The limit that a shard told of; None: it told of none."""
        if not run.HasField("caller_mbit") or not rates:
            return None
        share = {"up": max(rate.up_limited for rate in rates), "down": max(rate.down_limited for rate in rates)}
        reached = tuple(way for way, limited in share.items() if limited >= LIMITED_SHARE)
        return cls(caller=run.caller, mbit=run.caller_mbit, num_shards=len(run.shards), reached=reached)


@dataclass(frozen=True, kw_only=True)
class Model:
    """What the worker will train.

    Attributes:
        num_elements: Elements that are exchanged.
        step_s: Seconds of an inner step.
        source: Where these come from, in words.
    """

    num_elements: int
    step_s: float
    source: str


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """What to expect of the run as it is configured, and what to choose.

    Attributes:
        model: Of what.
        configured: The run's own setting.
        configured_needs: Inner steps with which that would reach TARGET.
        recommended: What to choose.
    """

    model: Model
    configured: Setting
    configured_needs: int
    recommended: Setting


def about_certificate(certificate: Certificate | None, now_s: float, *, is_local: bool) -> Finding:
    """What to say of the server's certificate; None: there is no TLS, which is fine on the same host only."""
    if certificate is None and is_local:
        return Finding(about="tls", level=Level.FINE, text="none, and what is sent does not leave this host")
    if certificate is None:
        text = (
            "none: whoever is on the way can read and change what is sent; start the server with certificates "
            "(`paceline certs make`)"
        )
        return Finding(about="tls", level=Level.WARNING, text=text)
    days = (certificate.not_after_s - now_s) / 86400
    text = f"{certificate.version}; {certificate.subject!r}, signed by {certificate.issuer!r}, ends in {days:.0f} days"
    if certificate.not_after_s - now_s < LATEST_EXPIRY_S:
        return Finding(about="tls", level=Level.WARNING, text=f"{text}: renew it soon")
    return Finding(about="tls", level=Level.FINE, text=text)


def about_clock(trips: RoundTrips) -> Finding:
    """What to say of the two clocks."""
    ahead_ms, error_ms = 1e3 * trips.clock_ahead_s, 1e3 * trips.clock_error_s
    text = f"the server's clock is {abs(ahead_ms):.0f} ms {'ahead' if ahead_ms >= 0 else 'behind'} (+- {error_ms:.0f})"
    if abs(trips.clock_ahead_s) - trips.clock_error_s > MOST_CLOCK_S:
        advice = "certificates and tokens may count as not yet valid or as expired; set the clocks by NTP"
        return Finding(about="clock", level=Level.WARNING, text=f"{text}: {advice}")
    return Finding(about="clock", level=Level.FINE, text=text)


def about_round_trip(trips: RoundTrips) -> Finding:
    """What to say of the round trip."""
    text = (
        f"median {1e3 * trips.median_s:.1f} ms, 95 % within {1e3 * trips.p95_s:.1f} ms, "
        f"jitter {1e3 * trips.jitter_s:.1f} ms"
    )
    return Finding(about="round trip", level=Level.FINE, text=text)


def about_loss(loss: float | None, transfers: Connections | None) -> Finding:
    """What to say of losses on the way up, and of what held the transfers back.

    Args:
        loss: The link's own, at a low rate; None: not known.
        transfers: What the kernel knows of the transfers, which fill queues, and so lose segments by themselves.
    """
    if loss is None or transfers is None:
        text = "unknown: the system does not tell what was sent again, or too little was sent"
        return Finding(about="loss", level=Level.FINE, text=text)
    text = f"{100 * loss:.2g} % of segments up at a low rate were sent again"
    if loss > MOST_LOSS:
        advice = "BBR on this host would help (net.ipv4.tcp_congestion_control), and several connections"
        return Finding(about="loss", level=Level.WARNING, text=f"{text}: {advice}")
    if transfers.sender_limited_s > LIMITED_SHARE * transfers.busy_s:
        text += "; this host's send buffer held TCP back (net.ipv4.tcp_wmem, see docs/wan.md)"
    elif transfers.receiver_limited_s > LIMITED_SHARE * transfers.busy_s:
        text += "; the server's receive buffer held TCP back (net.ipv4.tcp_rmem there, see docs/wan.md)"
    return Finding(about="loss", level=Level.FINE, text=text)


def about_limit(limit: Limit) -> Finding:
    """What to say of the server's limit for the caller."""
    allowed = (
        f"{megabits(limit.mbit * 1e6)} each way"
        + (f" for each of the {limit.num_shards} shards" if limit.num_shards > 1 else "")
        + ", shared by all who show its credential"
    )
    if not limit.reached:
        text = f"the server allows {limit.caller!r} {allowed}; what was measured stays below it"
        return Finding(about="limit", level=Level.FINE, text=text)
    text = (
        f"what was measured {' and '.join(limit.reached)} is the server's limit for {limit.caller!r} and not what the "
        f"link carries, which may be more: {allowed}. The operator may raise it (limits.mbit; 0: no limit)"
    )
    return Finding(about="limit", level=Level.FINE, text=text)


def expectation(
    configuration: pb.RunConfiguration,
    model: Model,
    rates: tuple[Rate, ...],
    trips: RoundTrips,
    *,
    fragment_elements: int = DEFAULT_FRAGMENT_ELEMENTS,
) -> Expectation:
    """What to expect of a run over the measured link.

    Args:
        configuration: The run's.
        model: What is trained.
        rates: The link by connections, at least one.
        trips: Its round trips.
        fragment_elements: The run's largest fragment.
    """
    exchange, outer = configuration.exchange, configuration.outer
    paths = _paths(exchange, rates, trips)
    uplink, downlink = codecs.codec_of_wire(exchange.uplink).name, codecs.codec_of_wire(exchange.downlink).name
    momentum_up, momentum_down = outer.local_momentum, exchange.own_weight == "predicted"
    moved = traffic(
        model.num_elements,
        uplink,
        downlink,
        fragment_elements=fragment_elements,
        momentum_up=momentum_up,
        momentum_down=momentum_down,
    )
    count = _configured_connections(exchange, paths) or best_connections(moved, paths)
    window = max(1, exchange.window)
    return Expectation(
        model=model,
        configured=Setting(
            uplink=uplink,
            downlink=downlink,
            connections=count,
            inner_steps=exchange.inner_steps,
            exchange_s=exchange_s(moved, paths[count]),
            utilization=utilization(moved, paths[count], exchange.inner_steps * model.step_s, window=window),
        ),
        configured_needs=inner_steps_for(moved, paths[count], model.step_s, window=window),
        recommended=recommended(
            model.num_elements,
            paths,
            model.step_s,
            wanted_steps=exchange.inner_steps,
            pairs=_pairs(uplink, downlink, momentum_up=momentum_up),
            window=window,
            fragment_elements=fragment_elements,
            momentum_up=momentum_up,
            momentum_down=momentum_down,
        ),
    )


def about_utilization(expected: Expectation, limit: Limit | None = None) -> Finding:
    """What to say of it; limit: what the server lets the caller take."""
    now, choice = expected.configured, expected.recommended
    text = (
        f"{100 * now.utilization:.0f} % with {now.uplink} up, {now.downlink} down and H = {now.inner_steps}: an "
        f"exchange takes {now.exchange_s:.3g} s, a round's steps {now.inner_steps * expected.model.step_s:.3g} s"
    )
    if now.utilization >= TARGET:
        return Finding(about="utilization", level=Level.FINE, text=text)
    other = f" or {choice.uplink} up, {choice.downlink} down with H = {choice.inner_steps}"
    same = (choice.uplink, choice.downlink) == (now.uplink, now.downlink)
    advice = f"choose H = {expected.configured_needs}{'' if same else other}"
    waits_for_link = expected.model.num_elements * PROCESS_S < choice.exchange_s / 2
    if waits_for_link and limit is not None and limit.reached:
        advice += ", or let the operator raise limits.mbit, since it and not the link was measured"
    if choice.inner_steps > LONGEST_ROUND:
        remedy = "a faster link" if waits_for_link else "faster processors, or more shards,"
        advice += (
            f". In rounds of more than {LONGEST_ROUND} steps workers drift apart: {remedy} or fewer parameters to "
            "exchange (such as adapters, LoRA) would be better"
        )
    return Finding(about="utilization", level=Level.WARNING, text=f"{text}; {advice}")


def _paths(exchange: pb.ExchangeConfiguration, rates: tuple[Rate, ...], trips: RoundTrips) -> dict[int, Path]:
    """What the link carries of a run's pushes and updates, by connections."""
    return {
        rate.connections: Path(
            up_bytes_per_s=_capped(rate.up_bytes_per_s, exchange),
            down_bytes_per_s=rate.down_bytes_per_s,
            round_trip_s=trips.median_s,
        )
        for rate in rates
    }


def _capped(up_bytes_per_s: float, exchange: pb.ExchangeConfiguration) -> float:
    if not exchange.HasField("max_uplink_mbit"):
        return up_bytes_per_s
    return min(up_bytes_per_s, exchange.max_uplink_mbit * 1e6 / 8)


def _configured_connections(exchange: pb.ExchangeConfiguration, paths: dict[int, Path]) -> int | None:
    """The measured count next below what the run fixes; None: it is found by trying."""
    if not exchange.connections:
        return None
    return max(count for count in paths if count <= max(exchange.connections, min(paths)))


def _pairs(uplink: str, downlink: str, *, momentum_up: bool) -> list[tuple[str, str]]:
    """The run's own codecs, and those that send less.

    What the run is configured to send is a choice of whoever runs it: in neither direction is more recommended. What
    topk drops of a worker's momentum could not be sent later.
    """
    up_bytes, down_bytes = _bytes(uplink), _bytes(downlink)
    fewer = [
        (up, down)
        for up, down in CODEC_PAIRS
        if _bytes(up) <= up_bytes
        and _bytes(down) <= down_bytes
        and _bytes(up) + _bytes(down) < up_bytes + down_bytes
        and not (momentum_up and up == "topk")
    ]
    return [(uplink, downlink), *fewer]


def _bytes(codec: str) -> int:
    return codecs.codec(codec).encoded_bytes(1 << 20)
