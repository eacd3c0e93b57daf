"""The order of an examination: reach, then the run, then round trips and rates, then what they mean."""

import asyncio
import ipaddress
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import grpc

from paceline.calls import CALL_S, called
from paceline.channels import Access, split_address
from paceline.discovery import find_run
from paceline.doctor.advice import (
    Expectation,
    Finding,
    Level,
    Limit,
    Model,
    about_certificate,
    about_clock,
    about_limit,
    about_loss,
    about_round_trip,
    about_utilization,
    expectation,
)
from paceline.doctor.probing import Prober, Rate, RoundTrips, probing
from paceline.doctor.reach import Reach, reach
from paceline.doctor.tcp_info import Connections, connections_to
from paceline_wire.errors import PacelineError, ProtocolVersionError
from paceline_wire.manifest import DEFAULT_FRAGMENT_ELEMENTS, Manifest
from paceline_wire.v1 import admin_pb2, admin_pb2_grpc
from paceline_wire.v1 import parameter_server_pb2 as pb

REACH_S = 10.0
"""Seconds that the run gets to say what it is, once TCP is connected."""

ASSUMED_STEP_S = 0.5
"""Seconds of an inner step where nobody says."""

SHORTEST_ROUND_TRIP_S = 0.001
"""Below, the server is on this host or beside it, and losses are not looked for."""

COUNTS = (1, 2, 4, 8)
"""Connections that are tried."""


@dataclass(kw_only=True)
class Examination:
    """What was found. What comes after a step that failed is left out.

    Attributes:
        reach: How far one came.
        others: Likewise for the run's other shards.
        trips: Round trips and clocks.
        rates: What the link carries, by connections.
        limit: What the server lets this caller take of it; None: it tells of no limit.
        connections: What the kernel knows of the transfers.
        loss: Share of small messages up, at a low rate, that had to be sent again; None: not known.
        expected: What to expect of the run.
        findings: All of it in sentences.
        error: What ended the examination early; None: nothing did.
    """

    reach: Reach
    others: list[Reach] = field(default_factory=list)
    trips: RoundTrips | None = None
    rates: tuple[Rate, ...] = ()
    limit: Limit | None = None
    connections: Connections | None = None
    loss: float | None = None
    expected: Expectation | None = None
    findings: list[Finding] = field(default_factory=list)
    error: PacelineError | None = None


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What the caller wants to know.

    Attributes:
        num_elements: Elements of the model; None: the run's.
        step_s: Seconds of an inner step; None: as the run's workers say.
        seconds: What each transfer should take about.
        most_connections: Connections that are tried at most.
    """

    num_elements: int | None
    step_s: float | None
    seconds: float
    most_connections: int


async def examine(target: str, access: Access, wishes: Wishes, tell: Callable[[str], None]) -> Examination:
    """Examine the way to a server.

    Args:
        target: "host:port" of any shard.
        access: TLS and token.
        wishes: What to look at.
        tell: Told what is being done, in a few words.
    """
    tell("connecting")
    found = Examination(reach=await asyncio.to_thread(reach, target, access.tls))
    if found.reach.problem is not None:
        about = "tls" if found.reach.failed == "tls" else "reach"
        found.findings.append(Finding(about=about, level=Level.PROBLEM, text=found.reach.problem))
        return found
    is_local = all(ipaddress.ip_address(address).is_loopback for address in found.reach.addresses)
    certificate = about_certificate(found.reach.certificate, time.time(), is_local=is_local)
    found.findings += [_about_reach(found.reach), certificate]
    try:
        run, targets = await find_run(target, access, REACH_S)
        await _look_at_others(found, targets, target, access)
        await _probe(found, target, access, wishes, tell)
        _note_limit(found, run)
        await _expect(found, run, target, access, wishes)
    except PacelineError as error:
        found.error = error
        found.findings.append(Finding(about="reach", level=Level.PROBLEM, text=str(error)))
    return found


async def _look_at_others(found: Examination, targets: list[str], target: str, access: Access) -> None:
    others = [other for other in targets if other != target]
    found.others = list(await asyncio.gather(*(asyncio.to_thread(reach, other, access.tls) for other in others)))
    for other in found.others:
        if other.problem is not None:
            text = f"the run's shard at {other.target} cannot be reached: {other.problem}"
            found.findings.append(Finding(about="shards", level=Level.PROBLEM, text=text))


async def _probe(found: Examination, target: str, access: Access, wishes: Wishes, tell: Callable[[str], None]) -> None:
    """Measure what can be measured; a server of before answers no probes, which is no fault."""
    try:
        async with probing(target, access, wishes.seconds) as prober:
            await _measure(found, prober, wishes, tell)
    except ProtocolVersionError as error:
        text = f"the server answers no probes, so nothing more can be measured: {error}"
        found.findings.append(Finding(about="round trip", level=Level.WARNING, text=text))


async def _measure(found: Examination, prober: Prober, wishes: Wishes, tell: Callable[[str], None]) -> None:
    tell("measuring round trips")
    found.trips = await prober.round_trips()
    found.findings += [about_clock(found.trips), about_round_trip(found.trips)]
    for count in COUNTS:
        if count <= wishes.most_connections:
            tell(f"measuring the rate of {count} connection{'s' if count > 1 else ''}")
            found.rates += (await prober.rate(count),)
    port = split_address(found.reach.target)[1]
    found.connections = connections_to(port)
    if found.trips.median_s < SHORTEST_ROUND_TRIP_S:
        text = "not looked for: the server is on this host or beside it"
        found.findings.append(Finding(about="loss", level=Level.FINE, text=text))
        return
    if found.connections is not None:
        tell("measuring losses")
        with suppress(TimeoutError):
            await prober.trickle(max(rate.up_bytes_per_s for rate in found.rates))
        after = connections_to(port)
        found.loss = after.loss_since(found.connections) if after is not None else None
    found.findings.append(about_loss(found.loss, found.connections))


def _note_limit(found: Examination, run: pb.DescribeResponse) -> None:
    found.limit = Limit.of(run, found.rates)
    if found.limit is not None:
        found.findings.append(about_limit(found.limit))


async def _expect(found: Examination, run: pb.DescribeResponse, target: str, access: Access, wishes: Wishes) -> None:
    if found.trips is None or not found.rates:
        return
    model = await _model(run, target, access, wishes)
    if model is None:
        text = "unknown: the run has no parameters yet; give --parameters"
        found.findings.append(Finding(about="utilization", level=Level.FINE, text=text))
        return
    found.expected = expectation(
        run.configuration,
        model,
        found.rates,
        found.trips,
        fragment_elements=run.fragment_elements or DEFAULT_FRAGMENT_ELEMENTS,
    )
    found.findings.append(about_utilization(found.expected, found.limit))


async def _model(run: pb.DescribeResponse, target: str, access: Access, wishes: Wishes) -> Model | None:
    """What is to be trained: as the caller says, or else as the run and its workers say."""
    num_elements, sources = wishes.num_elements, []
    if num_elements is None and run.HasField("manifest"):
        num_elements = sum(tensor.num_elements for tensor in Manifest.from_wire(run.manifest).tensors)
        sources.append("the run's model")
    if not num_elements:
        return None
    step_s = wishes.step_s
    if step_s is None:
        step_s = await _step_s(target, access)
        sources.append("assumed steps" if step_s is None else "the fastest worker's steps")
    return Model(num_elements=num_elements, step_s=step_s or ASSUMED_STEP_S, source=", ".join(sources) or "as given")


async def _step_s(target: str, access: Access) -> float | None:
    """Seconds of an inner step of the run's fastest worker; None: nobody says."""
    channel = access.channel(target)
    try:
        stub: admin_pb2_grpc.AdminServiceAsyncStub = admin_pb2_grpc.AdminServiceStub(channel)
        call = stub.Status(admin_pb2.StatusRequest(), timeout=CALL_S, metadata=access.metadata)
        status = await called(call, target)
    except (PacelineError, grpc.RpcError):
        return None
    finally:
        await channel.close()
    steps = [member.inner_step_us / 1e6 for member in status.members if member.HasField("inner_step_us")]
    return min(steps, default=None)


def _about_reach(found: Reach) -> Finding:
    resolved = f"{1e3 * found.resolve_s:.0f} ms" if found.resolve_s is not None else "?"
    connected = f"{1e3 * found.connect_s:.0f} ms" if found.connect_s is not None else "?"
    text = f"{found.target} is {', '.join(found.addresses)}: name in {resolved}, TCP in {connected}, HTTP/2"
    return Finding(about="reach", level=Level.FINE, text=text)
