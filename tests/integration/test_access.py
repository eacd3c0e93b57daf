"""Who may talk to a run: tokens and TLS, on every way in."""

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from torch import nn

import paceline
import paceline_server
from integration.patience import PATIENCE_S
from integration.raw import RawWorker, ended
from paceline import TLS
from paceline_wire.errors import InvalidInputError, UnauthenticatedError, UnavailableError
from paceline_wire.v1 import parameter_server_pb2 as pb

TOKEN, OTHER_TOKEN = "correct-horse", "battery-staple"
SENTENCE = "the token is missing or wrong"


@pytest.fixture(scope="module")
def guarded() -> Iterator[str]:
    """A server of two shards that asks for one of two tokens."""
    config = {"shards": 2, "security": {"tokens": [TOKEN, OTHER_TOKEN]}, "exchange": {"inner_steps": 1}}
    with paceline_server.local(config) as address:
        yield address


async def test_thousands_of_tokens_reach_every_shard() -> None:
    """The configuration goes to the shards' processes as one line, however long it is."""
    tokens = [f"token-{number:040d}" for number in range(2000)]
    with paceline_server.local({"shards": 2, "security": {"tokens": tokens}}) as address:
        async with paceline.connect(address, token=tokens[-1]) as client:
            assert len(await client.statuses()) == 2


def model_and_optimizer() -> tuple[nn.Module, torch.optim.Optimizer]:
    """Something small to join with."""
    model = nn.Linear(3, 2)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize("token", [None, "wrong", "", TOKEN.upper(), TOKEN + " ", TOKEN[:-1]])
async def test_without_the_token_nobody_comes_in(guarded: str, token: str | None) -> None:
    """`connect` and `join` end with the sentence at once; nothing is tried again."""
    with pytest.raises(UnauthenticatedError, match=SENTENCE):
        async with paceline.connect(guarded, worker_id="a", token=token):
            pass
    model, optimizer = model_and_optimizer()
    with pytest.raises(UnauthenticatedError, match=SENTENCE):
        await asyncio.to_thread(paceline.join, guarded, model, optimizer, token=token)


@pytest.mark.parametrize("token", [TOKEN, OTHER_TOKEN])
async def test_any_of_the_tokens_lets_in(guarded: str, token: str) -> None:
    """With a right token `connect` and `join` reach every shard."""
    model, optimizer = model_and_optimizer()
    with paceline.join(guarded, model, optimizer, token=token) as run:
        model(torch.ones(4, 3)).sum().backward()
        optimizer.step()
        run.flush()
        assert run.stats().rounds == 1
    async with paceline.connect(guarded, token=token) as client:
        assert (await client.fetch()).bins
        assert len(await client.statuses()) == 2


def test_the_token_may_come_from_the_environment(guarded: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`join` takes the variable PACELINE_TOKEN when it is given no token."""
    monkeypatch.setenv("PACELINE_TOKEN", TOKEN)
    model, optimizer = model_and_optimizer()
    paceline.join(guarded, model, optimizer).close()


CALLS: dict[str, Callable[[RawWorker], object]] = {
    "Describe": lambda raw: raw.describe(),
    "Initialize": lambda raw: raw.initialize(pb.Manifest(fragment_elements=256), {}),
    "Join": lambda raw: raw.join(),
    "Heartbeat": lambda raw: raw.heartbeat(),
    "Leave": lambda raw: raw.leave(),
    "Fetch": lambda raw: raw.fetch(0),
    "Exchange": lambda raw: next(raw.stub.Exchange(iter([pb.ExchangeRequest()]), metadata=raw.metadata)),
    "Probe": lambda raw: next(raw.stub.Probe(iter([pb.ProbeRequest(ping=1)]), metadata=raw.metadata)),
    "Status": lambda raw: raw.status(),
}


@pytest.mark.parametrize("token", [None, "wrong"])
@pytest.mark.parametrize("call", CALLS)
def test_every_call_asks_for_the_token(guarded: str, call: str, token: str | None) -> None:
    """No call of the protocol gets past the token, whatever its shape, and each says why."""
    with RawWorker(guarded, token=token) as raw:
        with pytest.raises(grpc.RpcError) as refused:
            CALLS[call](raw)
        end = ended(refused.value)
    assert (end.code, end.error) == (grpc.StatusCode.UNAUTHENTICATED, "UnauthenticatedError")
    assert SENTENCE in end.details


def test_all_calls_are_covered_above() -> None:
    """The list of calls is the protocol's."""
    methods = pb.DESCRIPTOR.services_by_name["ParameterServerService"].methods_by_name
    assert CALLS.keys() == {*methods, "Status"}


def test_health_is_told_without_the_token_and_nothing_else_is(guarded: str) -> None:
    """Probes carry no token: a health check is open, watching the health and reflection are not."""
    with grpc.insecure_channel(guarded) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        answer = health.Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as refused:
            list(health.Watch(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S))
        assert ended(refused.value).code is grpc.StatusCode.UNAUTHENTICATED
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        with pytest.raises(grpc.RpcError) as refused:
            list(reflection.ServerReflectionInfo(iter([request]), timeout=PATIENCE_S))
        assert ended(refused.value).code is grpc.StatusCode.UNAUTHENTICATED


@dataclass(frozen=True)
class Certificates:
    """Files in PEM, from two authorities of which the server trusts and uses the first.

    Attributes:
        ca: The first authority.
        server: The server's certificate and key, for localhost and 127.0.0.1.
        worker: A worker's certificate and key.
        other_ca: The second authority.
        stranger: A certificate and key of the second authority.
    """

    ca: Path
    server: tuple[Path, Path]
    worker: tuple[Path, Path]
    other_ca: Path
    stranger: tuple[Path, Path]


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Certificates made for this test run."""
    folder = tmp_path_factory.mktemp("certificates")

    def authority(name: str) -> tuple[trustme.CA, Path]:
        made = trustme.CA()
        made.cert_pem.write_to_path(folder / f"{name}.pem")
        return made, folder / f"{name}.pem"

    def issue(ca: trustme.CA, name: str, *identities: str, common_name: str | None = None) -> tuple[Path, Path]:
        issued = ca.issue_cert(*identities, common_name=common_name)
        cert, key = folder / f"{name}.pem", folder / f"{name}.key"
        cert.write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
        issued.private_key_pem.write_to_path(key)
        return cert, key

    ca, ca_path = authority("ca")
    other_ca, other_path = authority("other")
    return Certificates(
        ca=ca_path,
        server=issue(ca, "server", "localhost", "127.0.0.1"),
        worker=issue(ca, "worker", "worker@example.org", common_name="a"),
        other_ca=other_path,
        stranger=issue(other_ca, "stranger", "worker@example.org", common_name="a"),
    )


@pytest.fixture(scope="module")
def tls_server(certificates: Certificates) -> Iterator[str]:
    """A server that speaks TLS and asks workers for nothing but the token."""
    cert, key = certificates.server
    config = {"security": {"tls_cert": str(cert), "tls_key": str(key), "tokens": [TOKEN]}}
    with paceline_server.local(config) as address:
        yield address


@pytest.fixture(scope="module")
def mutual_server(certificates: Certificates) -> Iterator[str]:
    """A server that speaks TLS, of two shards, and asks workers for a certificate of its own authority."""
    cert, key = certificates.server
    security = {"tls_cert": str(cert), "tls_key": str(key), "client_ca": str(certificates.ca)}
    with paceline_server.local({"shards": 2, "security": security, "exchange": {"inner_steps": 1}}) as address:
        yield address


async def comes_in(address: str, **arguments: Any) -> bool:
    """Whether a client gets to use the run."""
    async with paceline.connect(address, worker_id="a", **arguments) as client:
        await client.initialize({"x": torch.ones(3)})
        return bool((await client.fetch()).bins)


async def test_tls_with_the_servers_authority_lets_in(tls_server: str, certificates: Certificates) -> None:
    """A CA file, as a path or in a `TLS`, verifies the server; the token is asked for on top."""
    assert await comes_in(tls_server, tls=certificates.ca, token=TOKEN)
    assert await comes_in(tls_server, tls=TLS(ca=str(certificates.ca)), token=TOKEN)
    assert await comes_in(tls_server.replace("127.0.0.1", "localhost"), tls=certificates.ca, token=TOKEN)
    with pytest.raises(UnauthenticatedError, match=SENTENCE):
        await comes_in(tls_server, tls=certificates.ca, token="wrong")


async def test_tls_refuses_a_server_it_cannot_verify(tls_server: str, certificates: Certificates) -> None:
    """Another authority, the system's, another name, or no TLS at all: the client does not come in, and says why."""
    for tls in (certificates.other_ca, True, TLS(ca=certificates.ca, server_name="elsewhere.example.org")):
        with pytest.raises(UnavailableError, match=r"(?i)certificate|hostname"):
            await comes_in(tls_server, tls=tls, token=TOKEN, reach_s=1)
    with pytest.raises(UnavailableError):
        await comes_in(tls_server, token=TOKEN, reach_s=1)


async def test_the_servers_name_can_be_told(tls_server: str, certificates: Certificates) -> None:
    """A server that is reached under another name than its certificate's is verified with server_name."""
    assert await comes_in(tls_server, tls=TLS(ca=certificates.ca, server_name="localhost"), token=TOKEN)


async def test_mutual_tls_asks_for_a_certificate(mutual_server: str, certificates: Certificates) -> None:
    """With client_ca, only a worker with a certificate of that authority comes in, and trains over every shard."""
    cert, key = certificates.worker
    assert await comes_in(mutual_server, tls=TLS(ca=certificates.ca, cert=cert, key=key))
    stranger_cert, stranger_key = certificates.stranger
    for tls in (TLS(ca=certificates.ca), TLS(ca=certificates.ca, cert=stranger_cert, key=stranger_key)):
        with pytest.raises(UnavailableError):
            await comes_in(mutual_server, tls=tls, reach_s=1)


def test_a_training_loop_joins_over_mutual_tls(mutual_server: str, certificates: Certificates) -> None:
    """`join` takes the same TLS as `connect`."""
    cert, key = certificates.worker
    model = nn.ParameterDict({"x": nn.Parameter(torch.ones(3))})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with paceline.join(mutual_server, model, optimizer, tls=TLS(ca=certificates.ca, cert=cert, key=key)) as run:
        model["x"].sum().backward()
        optimizer.step()
        run.flush()
        assert run.stats().rounds == 1


def test_tls_files_are_checked_before_anything_is_sent(certificates: Certificates, tmp_path: Path) -> None:
    """A missing file, or a certificate without its key, is the caller's mistake and is called that."""
    with pytest.raises(InvalidInputError, match="cert and key together"):
        TLS(ca=certificates.ca, cert=certificates.worker[0])
    model, optimizer = model_and_optimizer()
    with pytest.raises(InvalidInputError, match=r"nowhere\.pem"):
        paceline.join("127.0.0.1:1", model, optimizer, tls=tmp_path / "nowhere.pem")
