"""Peers of other protocol versions, peers that are no Paceline servers, and peers that are not there."""

import asyncio
import socket
import socketserver
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import pytest
import torch
from grpc_health.v1 import health, health_pb2_grpc
from torch import nn

import paceline
import paceline_server
from integration.patience import PATIENCE_S
from integration.raw import Ended, RawWorker, ended
from paceline.calls import describe
from paceline.channels import Access
from paceline_server import service
from paceline_wire import PROTOCOL_VERSION
from paceline_wire.errors import (
    ERROR_METADATA_KEY,
    InvalidInputError,
    PacelineError,
    ProtocolVersionError,
    UnavailableError,
)
from paceline_wire.v1 import parameter_server_pb2 as pb

LATER, EARLIER = 99, 0


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A server of this version."""
    with paceline_server.local() as found:
        yield found


def initialize(raw: RawWorker, *, version: int) -> object:
    """Begin an upload that names a version."""
    start = raw.initialize_start(pb.Manifest(fragment_elements=256), version=version)
    return raw.stub.Initialize(iter([pb.InitializeRequest(start=start)]), timeout=PATIENCE_S)


CALLS: dict[str, Callable[..., object]] = {
    "Describe": RawWorker.describe,
    "Join": RawWorker.join,
    "Initialize": initialize,
}


def refused(raw: RawWorker, call: str, version: int) -> Ended:
    """How a call that names a version is refused."""
    with pytest.raises(grpc.RpcError) as error:
        CALLS[call](raw, version=version)
    return ended(error.value)


@pytest.mark.parametrize("call", CALLS)
def test_a_worker_of_another_version_is_told_what_to_upgrade(address: str, call: str) -> None:
    """Calls that name another version end with both versions and which side is older."""
    with RawWorker(address) as raw:
        end = refused(raw, call, LATER)
        assert (end.code, end.error) == (grpc.StatusCode.FAILED_PRECONDITION, "ProtocolVersionError")
        assert "version 99" in end.details
        assert f"version {PROTOCOL_VERSION}: upgrade the server" in end.details
        if call != "Describe":
            assert "upgrade the worker" in refused(raw, call, EARLIER).details


def test_describe_answers_who_does_not_tell_a_version(address: str) -> None:
    """Tools of any version may ask what a server is."""
    with RawWorker(address) as raw:
        assert raw.describe(version=0).protocol_version == PROTOCOL_VERSION


Describe = Callable[[pb.DescribeRequest, grpc.ServicerContext], pb.DescribeResponse]


def of_version(version: int) -> Describe:
    """A server of another version that answers whoever comes."""
    return lambda _request, _context: pb.DescribeResponse(protocol_version=version, shards=[pb.Shard(port=1)])


def refusing(error: str) -> Describe:
    """A server of a later version that refuses this one, with an error that this version may not know."""

    def describe(_request: pb.DescribeRequest, context: grpc.ServicerContext) -> pb.DescribeResponse:
        context.set_trailing_metadata(((ERROR_METADATA_KEY, error),))
        context.abort(grpc.StatusCode.FAILED_PRECONDITION, "this server speaks version 99: upgrade the worker")
        raise AssertionError("abort returned")

    return describe


@contextmanager
def serving(describe: Describe | None) -> Iterator[str]:
    """A gRPC server that answers Describe; without a function for it, health checks only."""
    server = grpc.server(ThreadPoolExecutor(max_workers=2))
    if describe is None:
        health_pb2_grpc.add_HealthServicer_to_server(health.HealthServicer(), server)
    else:
        method = grpc.unary_unary_rpc_method_handler(
            describe,
            request_deserializer=pb.DescribeRequest.FromString,
            response_serializer=pb.DescribeResponse.SerializeToString,
        )
        service = pb.DESCRIPTOR.services_by_name["ParameterServerService"].full_name
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {"Describe": method}),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


async def error_at(address: str, reach_s: float = PATIENCE_S / 2) -> PacelineError:
    """What `connect` raises there."""
    try:
        async with asyncio.timeout(PATIENCE_S), paceline.connect(address, worker_id="a", reach_s=reach_s):
            raise AssertionError("connected")
    except PacelineError as error:
        return error


@pytest.mark.parametrize(("version", "older"), [(LATER, "client"), (EARLIER, "server")])
async def test_a_server_of_another_version_is_named(version: int, older: str) -> None:
    """The client says both versions and which side to upgrade, even to a server that does not check."""
    with serving(of_version(version)) as address:
        error = await error_at(address)
        assert isinstance(error, ProtocolVersionError)
        assert f"speaks protocol version {version}" in str(error)
        assert f"upgrade the {older}" in str(error)
        model = nn.Linear(2, 2)
        with pytest.raises(ProtocolVersionError):
            await asyncio.to_thread(paceline.join, address, model, torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize("error", ["ProtocolVersionError", "AnErrorOfTheFuture"])
async def test_a_refusal_keeps_its_sentence(error: str) -> None:
    """A server's own sentence arrives, under its error's name if this version knows it."""
    with serving(refusing(error)) as address:
        raised = await error_at(address)
    assert "upgrade the worker" in str(raised)
    assert type(raised) is (ProtocolVersionError if error == "ProtocolVersionError" else PacelineError)


async def test_another_grpc_server_is_told_apart() -> None:
    """A gRPC server that does not know the protocol is called that."""
    with serving(None) as address:
        error = await error_at(address)
    assert isinstance(error, ProtocolVersionError)
    assert "is not a Paceline server" in str(error)


class WebServer(socketserver.StreamRequestHandler):
    """Answers as a web server that knows no HTTP/2."""

    def handle(self) -> None:
        """Answer whatever comes."""
        self.request.recv(1024)
        self.wfile.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")


class Silent(socketserver.StreamRequestHandler):
    """Accepts, and says nothing."""

    test_is_over = threading.Event()

    def handle(self) -> None:
        """Hold the connection."""
        self.test_is_over.wait(PATIENCE_S)


@pytest.mark.parametrize("handler", [Silent, WebServer])
async def test_whoever_speaks_no_grpc_is_unavailable(handler: type[socketserver.StreamRequestHandler]) -> None:
    """A web server, or one that never answers, ends in UnavailableError once reach_s has passed."""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as server:
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        try:
            error = await error_at(f"127.0.0.1:{server.server_address[1]}", reach_s=0.5)
        finally:
            Silent.test_is_over.set()
            server.shutdown()
            serving.join()
    assert isinstance(error, UnavailableError)
    assert "cannot be reached" in str(error)


async def test_nobody_there_is_unavailable() -> None:
    """A port where nobody listens ends in UnavailableError once reach_s has passed, and so does an unknown host."""
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    for address in (f"127.0.0.1:{port}", "host.invalid:7070"):
        error = await error_at(address, reach_s=0.5)
        assert isinstance(error, UnavailableError)
        assert address in str(error)


@pytest.mark.parametrize(
    "address", ["", "localhost", ":7070", "localhost:", "localhost:port", "localhost:0", "a:70707"]
)
async def test_an_address_has_a_host_and_a_port(address: str) -> None:
    """Anything else is the caller's mistake, and is said at once."""
    with pytest.raises(InvalidInputError, match="host:port"):
        async with paceline.connect(address):
            pass


@pytest.mark.parametrize(("version", "sentence"), [(2, None), (3, None), (1, "worker"), (4, "server"), (0, "worker")])
def test_a_server_serves_the_version_before_its_own(
    version: int, sentence: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a run is upgraded, workers of the version before go on; others are told what the server speaks."""
    monkeypatch.setattr(service, "PROTOCOL_VERSION", 3)
    monkeypatch.setattr(service, "OLDEST_PROTOCOL_VERSION", 2)
    if sentence is None:
        service._require_version(version)
        return
    with pytest.raises(ProtocolVersionError, match=f"version {version} and this server versions 2 to 3: .*{sentence}"):
        service._require_version(version)


@pytest.mark.parametrize(
    ("oldest", "newest", "sentence"),
    [
        (PROTOCOL_VERSION, PROTOCOL_VERSION + 1, None),
        (0, PROTOCOL_VERSION, None),
        (PROTOCOL_VERSION + 1, PROTOCOL_VERSION + 2, "versions 2 to 3 and this client version 1: upgrade the client"),
        (0, PROTOCOL_VERSION + 1, "version 2 and this client version 1: upgrade the client"),
        (0, PROTOCOL_VERSION - 1, "version 0 and this client version 1: upgrade the server"),
    ],
)
async def test_a_client_takes_a_newer_server_that_serves_its_version(
    oldest: int, newest: int, sentence: str | None
) -> None:
    """A server that was upgraded first says whom it serves still; one that does not say so serves its own version."""
    answer = pb.DescribeResponse(protocol_version=newest, oldest_protocol_version=oldest, shards=[pb.Shard(port=1)])

    class Stub:
        async def Describe(self, _request: pb.DescribeRequest, **_: object) -> pb.DescribeResponse:  # noqa: N802
            return answer

    asked = describe(Stub(), Access(), "there:1")  # type: ignore[arg-type]  # all of a stub that it uses
    if sentence is None:
        assert await asked == answer
        return
    with pytest.raises(ProtocolVersionError, match=sentence):
        await asked
