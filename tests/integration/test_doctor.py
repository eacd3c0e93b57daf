"""`paceline doctor`: what it finds over links that are known, and what it says of servers that cannot be reached."""

import asyncio
import datetime
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
import trustme
from click.testing import CliRunner

import paceline
import paceline_server
from integration.patience import PATIENCE_S
from integration.raw import RawWorker, ended
from link import Link
from link_queue import LinkShape
from paceline.cli import cli
from paceline.doctor import probing
from paceline_server.probe import BURST_BYTES, MAX_CALLERS, MAX_PROBES, REFILL_BYTES_PER_S, Probes
from paceline_wire.errors import UnavailableError
from paceline_wire.v1 import parameter_server_pb2 as pb

TOKEN = "correct-horse-battery-staple-0123456789"
MBIT = 1e6 / 8
OTHER_SERVER = """
import http.server
server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
print(server.server_port)
server.serve_forever()
"""


def doctor(*arguments: str, code: int = 0) -> dict[str, Any]:
    """Run `paceline doctor ... --json` to its end; what it found."""
    result = CliRunner().invoke(cli, ["doctor", *arguments, "--json"])
    assert result.exit_code == code, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def problems(found: dict[str, Any]) -> dict[str, str]:
    """What is not fine, by what it is about."""
    return {finding["about"]: finding["text"] for finding in found["findings"] if finding["level"] != "fine"}


@contextmanager
def relayed(address: str, delay_ms: float, rate_mbit: float) -> Iterator[str]:
    """An address from which the server is reached over a link of that delay and rate."""
    command = [sys.executable, "-m", "paceline.relay", "--target", address]
    command += ["--delay-ms", str(delay_ms), "--rate-mbit", str(rate_mbit)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        try:
            (port,) = json.loads(process.stdout.readline())["ports"]
            yield f"127.0.0.1:{port}"
        finally:
            process.stdin.close()
            process.wait(PATIENCE_S)


@pytest.fixture(scope="module")
def served() -> Iterator[str]:
    """A server in memory."""
    with paceline_server.local() as address:
        yield address


def test_it_tells_a_thin_long_link_from_a_wider_shorter_one(served: str) -> None:
    """Rates and round trips are in the order of the links, and near what they were made."""
    found = []
    for delay_ms, rate_mbit in ((40, 8), (5, 80)):
        with relayed(served, delay_ms, rate_mbit) as address:
            found.append(doctor(address, "--connections", "1", "--seconds", "0.4"))
    thin, wide = (each["rates"][0] for each in found)
    for way in ("up_bytes_per_s", "down_bytes_per_s"):
        assert 3 * MBIT < thin[way] < 16 * MBIT
        assert 2 * thin[way] < wide[way] < 160 * MBIT
    assert found[0]["trips"]["median_s"] > 0.08 > found[1]["trips"]["least_s"] > 0.01
    assert abs(found[0]["trips"]["clock_ahead_s"]) <= found[0]["trips"]["clock_error_s"] + 0.005


@pytest.mark.skipif(os.geteuid() != 0 or not Path("/dev/net/tun").exists(), reason="needs root and /dev/net/tun")
def test_it_measures_an_emulated_link_that_tcp_crosses(tmp_path: Path) -> None:
    """Over two emulated links it finds the longer one longer, the thinner one thinner, and the lossy one lossy."""
    found: list[dict[str, Any]] = []
    certificates = Certificates(tmp_path, "10.77.0.1")
    (tmp_path / "tokens").write_text(f"{TOKEN}\n")
    secured = ["--tls-cert", certificates.cert, "--tls-key", certificates.key]
    secured += ["--security.token-file", str(tmp_path / "tokens")]
    for shape in (LinkShape(rate_mbit=10, delay_ms=30), LinkShape(rate_mbit=80, delay_ms=5, loss=0.03)):
        with Link(shape) as link:
            a, b = link.hosts
            listen = f"{a.address}:7070"
            serve = [sys.executable, "-m", "paceline", "serve", "--json", "--listen", listen, *secured]
            with a.popen(serve, stdout=subprocess.PIPE, text=True) as server:
                assert server.stdout is not None
                server.stdout.readline()
                command = [sys.executable, "-m", "paceline", "doctor", listen, "--json", "--seconds", "0.5"]
                command += ["--connections", "2", "--tls-ca", certificates.ca, "--token", TOKEN]
                done = b.run(command, capture_output=True, text=True, timeout=60)
                server.terminate()
        assert done.returncode == len(found), done.stderr
        found.append(json.loads(done.stdout))
    long, lossy = found
    assert long["trips"]["least_s"] > 0.06 > lossy["trips"]["least_s"] > 0.01
    # What was lost and sent again arrives at once, so a rate may come out a little above the link's.
    assert all(2 * MBIT < rate["up_bytes_per_s"] < 15 * MBIT for rate in long["rates"])
    assert long["loss"] < 0.01 < lossy["loss"]
    assert set(problems(long)) == set()
    assert set(problems(lossy)) == {"loss"}


def test_it_tells_the_servers_limit_from_the_link(tmp_path: Path) -> None:
    """Over loopback, which carries far more, what is measured is the identity's limit, and doctor says whose it is."""
    folder = tmp_path / "certs"
    make = ["certs", "make", str(folder), "--server", "localhost", "--worker", "paris"]
    assert CliRunner().invoke(cli, make).exit_code == 0
    token = (folder / "workers" / "paris" / "token").read_text().strip()
    arguments = ("--connections", "2", "--seconds", "0.5", "--token", token)
    for mbit, told in ((200, True), (0, False)):
        config = {"security": {"token_key": str(folder / "server" / "token.pub")}, "limits": {"mbit": mbit}}
        with paceline_server.local(config) as address:
            found = doctor(address, *arguments)
        if not told:
            assert found["limit"] is None
            continue
        assert found["limit"] == {"caller": "paris", "mbit": 200, "num_shards": 1, "reached": ["up", "down"]}
        (text,) = [each["text"] for each in found["findings"] if each["about"] == "limit"]
        assert "is the server's limit for 'paris' and not what the link carries" in text


def test_a_very_thin_link_is_measured_all_the_same(served: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """First transfers are small enough for it; where nothing arrives in time, that is said, with code 3."""
    monkeypatch.setattr(probing, "LONGEST_S", 4.0)
    with relayed(served, 5, 0.2) as address:
        (rate,) = doctor(address, "--connections", "1", "--seconds", "0.2")["rates"]
        for way in ("up_bytes_per_s", "down_bytes_per_s"):
            assert 0.05 * MBIT < rate[way] < 0.8 * MBIT
        monkeypatch.setattr(probing, "LONGEST_S", 0.3)
        found = doctor(address, "--connections", "1", "--seconds", "0.2", code=3)
    assert "the link stands still, or is far too thin" in problems(found)["reach"]


async def test_it_takes_the_model_and_its_speed_from_the_run() -> None:
    """With neither given, parameters are the run's and steps its fastest worker's; too short a round is warned of."""
    with paceline_server.local({"exchange": {"inner_steps": 1}}) as address:
        model = torch.nn.Linear(1000, 1000)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        with await asyncio.to_thread(paceline.join, address, model, optimizer) as run:
            for _ in range(3):
                model(torch.ones(1, 1000)).sum().backward()
                optimizer.step()
            await asyncio.to_thread(run.flush)
            with relayed(address, 100, 50) as far:
                found = await asyncio.to_thread(doctor, far, "--connections", "1", "--seconds", "0.2", code=1)
    expected = found["expected"]
    assert expected["model"]["num_elements"] == 1_001_000
    assert expected["model"]["source"] == "the run's model, the fastest worker's steps"
    assert 0 < expected["model"]["step_s"] < 5
    assert (expected["configured"]["uplink"], expected["configured"]["inner_steps"]) == ("int4", 1)
    assert 1 < expected["recommended"]["inner_steps"] <= expected["configured_needs"]
    assert "choose H = " in problems(found)["utilization"]


class Certificates:
    """A run's authority, and the server's certificate."""

    def __init__(self, folder: Path, name: str, not_after: datetime.datetime | None = None) -> None:
        authority = trustme.CA()
        server = authority.issue_cert(name, not_after=not_after)
        self.ca, self.cert, self.key = (str(folder / file) for file in ("ca.pem", "server.pem", "server.key"))
        authority.cert_pem.write_to_path(self.ca)
        server.private_key_pem.write_to_path(self.key)
        server.cert_chain_pems[0].write_to_path(self.cert)

    @property
    def config(self) -> dict[str, Any]:
        """What makes a server use it."""
        return {"security": {"tls_cert": self.cert, "tls_key": self.key}}


def test_it_reads_the_servers_certificate(tmp_path: Path) -> None:
    """With the run's authority all is well, and a certificate that soon ends is warned of; it says until when."""
    for days, code in ((200, 0), (5, 1)):
        ends = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)
        certificates = Certificates(tmp_path, "127.0.0.1", ends)
        with paceline_server.local(certificates.config) as address:
            arguments = ("--tls-ca", certificates.ca, "--connections", "1", "--seconds", "0.1")
            found = doctor(address, *arguments, code=code)
        assert found["reach"]["certificate"]["version"].startswith("TLSv1.")
        assert abs(found["reach"]["certificate"]["not_after_s"] - ends.timestamp()) < 2
        assert ("renew it soon" in problems(found).get("tls", "")) is (code == 1)


def test_a_certificate_that_does_not_verify_is_named(tmp_path: Path) -> None:
    """Another authority, another name, an end that has passed, and no TLS at all: code 4 or 3, each with its reason."""
    (tmp_path / "other").mkdir()
    other = Certificates(tmp_path / "other", "127.0.0.1")
    expired = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
    for name, not_after, ca, reason in (
        ("127.0.0.1", None, other.ca, "unable to get local issuer certificate|self-signed"),
        ("elsewhere.example", None, None, "IP address mismatch"),
        ("127.0.0.1", expired, None, "certificate has expired"),
    ):
        certificates = Certificates(tmp_path, name, not_after)
        with paceline_server.local(certificates.config) as address:
            found = doctor(address, "--tls-ca", ca or certificates.ca, code=4)
            assert any(part in problems(found)["tls"] for part in reason.split("|")), found["findings"]
            plain = doctor(address, code=3)
            assert "TLS may be needed" in problems(plain)["reach"]
            if name != "127.0.0.1":
                told = ("--tls-ca", certificates.ca, "--tls-server-name", name)
                assert not problems(doctor(address, *told, "--connections", "1", "--seconds", "0.1"))
    with paceline_server.local() as address:
        assert "does the server speak TLS?" in problems(doctor(address, "--tls-ca", other.ca, code=4))["tls"]


def test_what_cannot_be_reached_is_named(served: str) -> None:
    """A port that nobody has, a name that does not exist, and a server of something else: code 3, and why."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        assert "no TCP connection" in problems(doctor(f"127.0.0.1:{taken.getsockname()[1]}", code=3))["reach"]
    for name in ("nowhere.invalid", "two..dots", "l" * 64 + ".example"):
        assert "cannot be resolved" in problems(doctor(f"{name}:7070", code=3))["reach"]
    command = [sys.executable, "-u", "-c", OTHER_SERVER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        try:
            found = doctor(f"127.0.0.1:{process.stdout.readline().strip()}", code=3)
        finally:
            process.terminate()
    assert "does not speak HTTP/2" in problems(found)["reach"]
    with paceline_server.local({"security": {"tokens": ["secret"]}}) as guarded:
        assert doctor(guarded, "--token", "wrong", code=4)["error"] == "UnauthenticatedError"


def test_a_server_that_answers_no_probes_is_no_fault(served: str) -> None:
    """One of before, which knows no `Probe`, is warned of; what can be found without is."""
    with RawWorker(served) as raw:
        description = raw.describe()
    with describing(description) as address:
        found = doctor(address, code=1)
    assert "answers no probes" in problems(found)["round trip"]
    assert found["reach"]["http2"] is True


def test_a_server_of_another_protocol_version_is_named(served: str) -> None:
    """Code 4, and which side to upgrade; likewise for a gRPC server of something else."""
    with RawWorker(served) as raw:
        description = raw.describe()
    description.protocol_version = description.oldest_protocol_version = 99
    with describing(description) as address:
        found = doctor(address, code=4)
    assert "upgrade the client" in problems(found)["reach"]
    with describing(None) as address:
        found = doctor(address, code=4)
    assert "is not a Paceline server" in problems(found)["reach"]


@contextmanager
def describing(description: pb.DescribeResponse | None) -> Iterator[str]:
    """The address of a gRPC server that knows `Describe` and nothing else; without a description, nothing at all."""
    methods = {
        "Describe": grpc.unary_unary_rpc_method_handler(
            lambda request, context: description,
            request_deserializer=pb.DescribeRequest.FromString,
            response_serializer=pb.DescribeResponse.SerializeToString,
        )
    }
    server = grpc.server(ThreadPoolExecutor(2))
    service = pb.DESCRIPTOR.services_by_name["ParameterServerService"].full_name
    handlers = methods if description is not None else {}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    if description is not None:
        description.shards[0].port = port
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait(PATIENCE_S)


def test_it_prints_for_people(served: str) -> None:
    """As a process of its own it prints findings, rates, and what to expect."""
    command = [sys.executable, "-m", "paceline", "doctor", served, "--parameters", "125m", "--step-seconds", "0.5"]
    done = subprocess.run(
        [*command, "--connections", "2", "--seconds", "0.1"], capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 0, done.stderr
    assert "fine  round trip: median" in done.stdout
    assert "125,000,000 parameters and steps of 0.5 s (as given)" in done.stdout
    assert "recommended: int4 up, bf16 down, H = 50" in done.stdout


def test_probes_are_bounded_and_touch_no_run(served: str) -> None:
    """Pings come back, bytes are counted and sent; asking twice, or for more than a caller may have, is refused."""
    with RawWorker(served) as raw:

        def probe(*requests: pb.ProbeRequest) -> list[pb.ProbeResponse]:
            return list(raw.stub.Probe(iter(requests), metadata=raw.metadata))

        before = raw.status()
        answers = probe(pb.ProbeRequest(ping=7, data=bytes(5000), download_bytes=300_000), pb.ProbeRequest(ping=8))
        assert [answer.ping for answer in answers if answer.HasField("ping")] == [7, 8]
        assert max(answer.received_bytes for answer in answers) == 5000
        assert sum(len(answer.data) for answer in answers) == 300_000
        for requests, code in (
            ([pb.ProbeRequest(download_bytes=1)] * 2, grpc.StatusCode.INVALID_ARGUMENT),
            ([pb.ProbeRequest(download_bytes=BURST_BYTES + 1)], grpc.StatusCode.UNAVAILABLE),
        ):
            with pytest.raises(grpc.RpcError) as refused:
                probe(*requests)
            assert ended(refused.value).code is code
        after = raw.status()
        assert (after.bytes_received, after.bytes_sent) == (before.bytes_received, before.bytes_sent)


def test_a_caller_may_move_more_as_time_passes() -> None:
    """What is used up grows again; others have theirs; so many probes at once and callers are remembered."""
    now_s = 0.0
    probes = Probes(lambda: now_s)
    probes.take("a", BURST_BYTES)
    with pytest.raises(UnavailableError, match="try again in 1 s"):
        probes.take("a", REFILL_BYTES_PER_S)
    probes.take("b", 1)
    now_s = 1.0
    probes.take("a", REFILL_BYTES_PER_S)
    for number in range(2 * MAX_CALLERS):
        probes.take(f"other {number}", 2)
    with pytest.raises(UnavailableError):
        probes.take("a", 1)
    held = [probes.begin() for _ in range(MAX_PROBES)]
    for each in held:
        each.__enter__()
    with pytest.raises(UnavailableError, match="as many as this shard answers"), probes.begin():
        pass
    held[0].__exit__(None, None, None)
    with probes.begin():
        pass
