"""Who a caller is comes from its credential: roles, names, revocation, renewal and limits, through real servers."""

import asyncio
import json
import os
import ssl
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from click.testing import CliRunner
from cryptography import x509
from torch import nn

import paceline
import paceline_server
from integration.authority import make_authority, run_certs, security_of, tls_of, token_of
from integration.patience import PATIENCE_S, wait_until_async
from integration.raw import Ended, RawWorker, ended
from paceline_server.security.command import certs
from paceline_server.security.gate import MAX_REQUEST_BYTES
from paceline_wire.errors import InvalidInputError, LimitExceededError, PermissionDeniedError, UnauthenticatedError
from paceline_wire.v1 import parameter_server_pb2 as pb
from paceline_wire.v1 import parameter_server_pb2_grpc as pb_grpc

WORKER, OBSERVER, ADMIN = ("a", "worker"), ("eve", "observer"), ("root", "admin")
IDENTITIES = ("--worker", "a", "--worker", "b", "--observer", "eve", "--admin", "root")
START = {"x": torch.ones(3)}


@pytest.fixture(scope="module")
def by_token(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A server of two shards that asks for signed tokens, and its authority."""
    folder = tmp_path_factory.mktemp("run") / "certs"
    make_authority(folder, *IDENTITIES)
    config = {"shards": 2, "security": security_of(folder), "exchange": {"inner_steps": 1}}
    with paceline_server.local(config) as address:
        yield address.replace("127.0.0.1", "localhost"), folder


@pytest.fixture(scope="module")
def by_certificate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The same with mutual TLS."""
    folder = tmp_path_factory.mktemp("run") / "certs"
    make_authority(folder, *IDENTITIES, credentials="certificate")
    config = {"shards": 2, "security": security_of(folder, mutual=True), "exchange": {"inner_steps": 1}}
    with paceline_server.local(config) as address:
        yield address.replace("127.0.0.1", "localhost"), folder


@pytest.fixture(params=["by_token", "by_certificate"])
def run(request: pytest.FixtureRequest) -> tuple[str, Path, bool]:
    """Either of them; and whether it asks for certificates."""
    address, folder = request.getfixturevalue(request.param)
    return address, folder, request.param == "by_certificate"


def access(run: tuple[str, Path, bool], name: str, role: str) -> dict[str, Any]:
    """What an identity gives to connect and join."""
    _, folder, mutual = run
    if mutual:
        return {"tls": tls_of(folder, name, role)}
    return {"tls": folder / "server" / "ca.pem", "token": token_of(folder, name, role)}


@asynccontextmanager
async def channel(folder: Path, address: str, token: str) -> AsyncIterator[tuple[grpc.aio.Channel, Any]]:
    """A channel with TLS, and the metadata of a token."""
    credentials = grpc.ssl_channel_credentials((folder / "server" / "ca.pem").read_bytes())
    async with grpc.aio.secure_channel(address, credentials) as opened:
        yield opened, (("authorization", f"Bearer {token}"),)


async def test_a_worker_acts_as_itself_alone(run: tuple[str, Path, bool]) -> None:
    """Under its own name, and under those that begin with it and a dot; another's is refused with a sentence."""
    for worker_id in ("a", "a.gpu0"):
        async with paceline.connect(run[0], worker_id=worker_id, **access(run, *WORKER)) as client:
            await client.initialize(START)
            base = await client.fetch()
            await client.exchange({"x": torch.zeros(3)}, base)
    for worker_id in ("b", "ab", "a-b", "root"):
        with pytest.raises(PermissionDeniedError, match=rf"worker 'a' may not act as worker '{worker_id}'"):
            async with paceline.connect(run[0], worker_id=worker_id, **access(run, *WORKER)):
                pass


def test_a_training_loop_needs_no_name(run: tuple[str, Path, bool]) -> None:
    """`join` without worker_id takes a name of its own that the credential allows."""
    model = nn.ParameterDict({"x": nn.Parameter(torch.ones(3))})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with paceline.join(run[0], model, optimizer, **access(run, *WORKER)) as joined:
        model["x"].sum().backward()
        optimizer.step()
        joined.flush()
        assert joined.stats().rounds == 1


async def test_an_observer_looks_and_does_nothing_else(run: tuple[str, Path, bool]) -> None:
    """It fetches and asks for the status; to join takes a worker; an admin may do both, as anybody."""
    async with paceline.connect(run[0], worker_id="anybody", **access(run, *ADMIN)) as client:
        await client.initialize(START)
    async with paceline.connect(run[0], **access(run, *OBSERVER)) as client:
        assert (await client.fetch()).bins
        assert len(await client.statuses()) == 2
    with pytest.raises(PermissionDeniedError, match=r"observer 'eve' may not call Join: .* worker or admin"):
        async with paceline.connect(run[0], worker_id="eve", **access(run, *OBSERVER)):
            pass


@pytest.mark.parametrize("name", ["heartbeat", "leave", "exchange"])
def test_every_message_with_a_worker_is_checked(tmp_path: Path, name: str) -> None:
    """A worker that has joined cannot be reported for, sent away or pushed for by another."""
    folder = tmp_path / "certs"
    make_authority(folder, *IDENTITIES)
    security = {"token_key": security_of(folder)["token_key"]}
    with (
        paceline_server.local({"security": security}) as address,
        RawWorker(address, "a", token=token_of(folder, "a")) as own,
        RawWorker(address, "a", token=token_of(folder, "b")) as other,
    ):
        own.join()
        own.initialize(pb.Manifest(fragment_elements=4_194_304), {})
        other.worker.CopyFrom(own.worker)
        assert refused_end(other, name).error == "PermissionDeniedError"
        own.heartbeat()


def refused_end(raw: RawWorker, name: str) -> Ended:
    """How a call ends that must be refused."""
    if name == "exchange":
        with raw.exchange() as stream:
            return stream.end()
    with pytest.raises(grpc.RpcError) as refused:
        getattr(raw, name)()
    return ended(refused.value)


async def test_unknown_and_oversized_requests(by_token: tuple[str, Path]) -> None:
    """A method that is not listed is never served to a worker, and a large request is refused before it is parsed."""
    address, folder = by_token
    async with channel(folder, address, token_of(folder, "a")) as (opened, metadata):
        for method in ("/paceline_wire.v1.AdminService/Nothing", "/no.Such/Thing"):
            call: Any = opened.unary_unary(method)
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call(b"", metadata=metadata)
            assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
        for junk, error in ((bytes(MAX_REQUEST_BYTES + 1), "bytes; at most"), (b"\xff\xff", "truncated")):
            call = opened.unary_unary("/paceline_wire.v1.ParameterServerService/Join")
            with pytest.raises(grpc.aio.AioRpcError, match=error) as refused:
                await call(junk, metadata=metadata)
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_revocation_ends_what_runs(tmp_path: Path) -> None:
    """A revoked worker's open stream ends and its calls are refused, within seconds; the others go on."""
    folder = tmp_path / "certs"
    make_authority(folder, *IDENTITIES)
    config = {"security": {**security_of(folder)}, "exchange": {"inner_steps": 1}}
    with paceline_server.local(config) as found:
        address = found.replace("127.0.0.1", "localhost")
        tls = folder / "server" / "ca.pem"
        async with paceline.connect(address, worker_id="b", token=token_of(folder, "b"), tls=tls) as other:
            await other.initialize(START)
            base = await other.fetch()
            async with channel(folder, address, token_of(folder, "a")) as (opened, metadata):
                stub = pb_grpc.ParameterServerServiceStub(opened)
                worker = pb.Worker(worker_id="a", incarnation=1)
                await stub.Join(pb.JoinRequest(protocol_version=1, worker=worker), metadata=metadata)
                stream = stub.Exchange(metadata=metadata)
                await stream.write(pb.ExchangeRequest(open=pb.ExchangeOpen(worker=worker)))
                run_certs("revoke", str(folder), "a")
                with pytest.raises(grpc.aio.AioRpcError, match="was revoked") as refused:
                    await asyncio.wait_for(stream.read(), PATIENCE_S)
                assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
            with pytest.raises(UnauthenticatedError, match="worker 'a' was revoked"):
                async with paceline.connect(address, token=token_of(folder, "a"), tls=tls):
                    pass
            await other.exchange({"x": torch.zeros(3)}, base)
            run_certs("renew", str(folder), "a")
            async with paceline.connect(address, token=token_of(folder, "a"), tls=tls) as again:
                assert (await again.fetch()).bins


async def test_an_expired_token_ends_its_stream_and_a_renewed_one_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker whose token file is renewed in time never notices; the same token is refused once it has ended."""
    folder = tmp_path / "certs"
    make_authority(folder, "--worker", "a", "--days", str(6 / 86400))
    first = token_of(folder, "a")
    monkeypatch.setenv("PACELINE_TOKEN_FILE", str(folder / "workers" / "a" / "token"))
    security = {"token_key": security_of(folder)["token_key"]}
    with paceline_server.local({"security": security}) as address:
        async with paceline.connect(address, worker_id="a") as client:
            await client.initialize(START)
            base = await client.fetch()
            base = await client.exchange({"x": torch.zeros(3)}, base)
            run_certs("renew", str(folder), "a")

            async def first_is_refused() -> bool:
                try:
                    async with paceline.connect(address, token=first):
                        return False
                except UnauthenticatedError as error:
                    return "has expired" in str(error)

            await wait_until_async(first_is_refused)
            await client.exchange({"x": torch.zeros(3)}, base)


async def test_a_token_file_that_is_being_renewed_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A worker that reads its token file while that is empty, or away, goes on with the token that it had."""
    folder = tmp_path / "certs"
    make_authority(folder, "--worker", "a")
    file = folder / "workers" / "a" / "token"
    monkeypatch.setenv("PACELINE_TOKEN_FILE", str(file))
    config = {"security": {"token_key": security_of(folder)["token_key"]}, "schedule": {"lease_s": 3}}
    with paceline_server.local(config) as address:
        async with paceline.connect(address, worker_id="a") as client:
            await client.initialize(START)
            base = await client.exchange({"x": torch.zeros(3)}, await client.fetch())
            file.write_text("")

            async def a_heartbeat_met_it() -> bool:
                return "what was in it before still counts" in caplog.text

            await wait_until_async(a_heartbeat_met_it)
            base = await client.exchange({"x": torch.zeros(3)}, base)
            file.unlink()
            await client.exchange({"x": torch.zeros(3)}, base)
            with pytest.raises(InvalidInputError, match=r"the token file .* cannot be used: No such file"):
                async with paceline.connect(address):
                    pass


async def test_certificates_are_replaced_while_it_serves(by_token: tuple[str, Path]) -> None:
    """A new server certificate is shown to new connections; files that do not fit together change nothing."""
    address, folder = by_token
    server = folder / "server"
    key = (server / "server.key").read_bytes()

    def shown() -> bytes:
        host, _, port = address.rpartition(":")
        return ssl.get_server_certificate((host, int(port))).encode()

    before = await asyncio.to_thread(shown)
    (server / "server.key").write_bytes((folder / "authority" / "ca.key").read_bytes())
    await asyncio.sleep(0)
    (server / "server.key").write_bytes(key)
    run_certs("renew", str(folder), "--server", "localhost")
    serial = x509.load_pem_x509_certificate((server / "server.pem").read_bytes()).serial_number

    async def is_new() -> bool:
        return x509.load_pem_x509_certificate(await asyncio.to_thread(shown)).serial_number == serial

    await wait_until_async(is_new)
    assert x509.load_pem_x509_certificate(before).serial_number != serial
    async with paceline.connect(address, token=token_of(folder, "a"), tls=server / "ca.pem") as client:
        assert await client.statuses()


async def test_limits_hold_for_one_identity_alone(tmp_path: Path) -> None:
    """Too many streams and too many pushes in a bin are refused with a sentence, and others have all of theirs."""
    folder = tmp_path / "certs"
    make_authority(folder, *IDENTITIES)
    config = {
        "security": {"token_key": security_of(folder)["token_key"]},
        "schedule": {"kind": "participation"},
        "limits": {"streams": 1, "pushes_per_bin": 3},
        "exchange": {"uplink": "fp32", "fragment_elements": 256},
    }
    with paceline_server.local(config) as address:
        manifest = pb.Manifest(
            tensors=[pb.Tensor(name="x", shape=[256], dtype=pb.DTYPE_FLOAT32, role=pb.ROLE_PARAMETER)],
            fragment_elements=256,
        )
        with RawWorker(address, "c.waits", token=token_of(folder, "root", "admin")) as waits:
            # The bin stays open until it has pushed.
            waits.initialize(manifest, {0: torch.zeros(256)})
            waits.join()
            for name in ("a", "b"):
                with RawWorker(address, name, token=token_of(folder, name)) as raw:
                    raw.join()
                    with raw.exchange() as stream:
                        stream.push(0, 1, 0, torch.zeros(256))
                        stream.update()
                        with raw.exchange() as second:
                            assert second.end().error == "LimitExceededError"
                        for seq in (2, 3, 4):
                            stream.push(0, seq, 0, torch.zeros(256))
                        end = stream.last()
                        assert (end.error, "limits.pushes_per_bin = 3" in end.details) == ("LimitExceededError", True)


async def test_an_identity_alone_fills_its_bins(tmp_path: Path) -> None:
    """A run of one site would stop for good if its bin were larger than what one identity may push to a bin."""
    folder = tmp_path / "certs"
    make_authority(folder, *IDENTITIES)
    config = {
        "security": {"token_key": security_of(folder)["token_key"]},
        "schedule": {"quota": 4},
        "limits": {"pushes_per_bin": 2},
    }
    with paceline_server.local(config) as address:
        async with (
            asyncio.timeout(PATIENCE_S),
            paceline.connect(address, worker_id="a", token=token_of(folder, "a")) as client,
        ):
            await client.initialize(START)
            base = await client.fetch()
            for _ in range(9):
                base = await client.exchange({"x": torch.zeros(3)}, base)
            assert set(base.bins.values()) == {3}


class TestCommand:
    """`paceline certs`, its files and its refusals."""

    def test_secrets_are_the_owners_alone(self, tmp_path: Path) -> None:
        """Keys and tokens have mode 0600 and their folders 0700; what is public can be read."""
        for credentials in ("token", "certificate"):
            make_authority(tmp_path / credentials, *IDENTITIES, credentials=credentials)
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        public = {"ca.pem", "server.pem", "cert.pem", "token.pub", "revoked"}
        assert {"ca.key", "token.key", "server.key", "key.pem", "token"} <= {path.name for path in files}
        for path in files:
            assert stat.S_IMODE(path.stat().st_mode) == (0o644 if path.name in public else 0o600), path
        assert all(stat.S_IMODE(path.stat().st_mode) == 0o700 for path in tmp_path.rglob("*") if path.is_dir())

    def test_nothing_is_overwritten(self, tmp_path: Path) -> None:
        """Making or adding twice is refused, and changes no file; so are names that would be another's."""
        folder = tmp_path / "certs"
        make_authority(folder, *IDENTITIES)
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for arguments, sentence in (
            (("make", str(folder), "--server", "x"), "is there already"),
            (("add", str(folder), "--worker", "a"), "has a credential already"),
            (("add", str(folder), "--observer", "a"), "has a credential already"),
            (("add", str(folder), "--worker", "a.b"), "too near to 'a'"),
            (("add", str(folder), "--worker", "../b"), "cannot be a name"),
            (("add", str(folder)), "say for whom"),
            (("revoke", str(folder), "nobody"), "nothing was given out to 'nobody'"),
            (("renew", str(folder), "nobody"), "nothing was given out to 'nobody'"),
            (("list", str(tmp_path)), "there is no authority"),
        ):
            done = CliRunner().invoke(certs, arguments)
            assert sentence in str(done.exception), arguments
        assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def test_a_file_that_nobody_knows_of_stays(self, tmp_path: Path) -> None:
        """Also where the authority has no note of it, as when its notes are older than its folders."""
        folder = tmp_path / "certs"
        make_authority(folder)
        stray = folder / "workers" / "a" / "token"
        stray.parent.mkdir(parents=True)
        stray.write_text("another's")
        done = CliRunner().invoke(certs, ["add", str(folder), "--worker", "a"])
        assert "is there already, and is not overwritten" in str(done.exception)
        assert stray.read_text() == "another's"

    def test_the_command_that_it_prints_works(self, tmp_path: Path) -> None:
        """What `make` says serves the run, with the folder as it was given."""
        done = CliRunner().invoke(certs, ["make", str(tmp_path / "c"), "--server", "localhost", "--worker", "a"])
        command = done.output.rpartition("start the server with:\n")[2].split()
        assert command[:3] == ["paceline", "serve", "--listen"]
        serve = [sys.executable, "-m", "paceline", "serve", "--json", "--listen", "127.0.0.1:0", *command[4:]]
        with subprocess.Popen(serve, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                assert json.loads(process.stdout.readline())["event"] == "listening"
            finally:
                process.terminate()


def test_secrets_are_shown_nowhere(tmp_path: Path) -> None:
    """Not in the messages of a server that refuses, not in the list of processes, not in errors or the status."""
    folder = tmp_path / "certs"
    make_authority(folder, *IDENTITIES)
    plain, given = "correct-horse-battery", "staple-by-variable"
    (folder / "server" / "tokens").write_text(f"{plain}\n")
    keys = [(folder / "server" / "server.key").read_text(), (folder / "authority" / "token.key").read_text()]
    secrets = [plain, given, token_of(folder, "a"), token_of(folder, "a").rpartition(".")[2]]
    secrets += [line for key in keys for line in key.splitlines() if not line.startswith("-----")]
    environment = {**os.environ, "PACELINE_SECURITY__TOKEN_FILE": str(folder / "server" / "tokens")}
    environment |= {"PACELINE_SECURITY__TOKENS": given}
    environment |= {f"PACELINE_SECURITY__{name.upper()}": value for name, value in security_of(folder).items()}
    command = [sys.executable, "-m", "paceline", "-vv", "serve", "--json", "--shards", "2", "--listen", "127.0.0.1:0"]
    log = tmp_path / "stderr"
    with log.open("w") as stderr:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment)
    try:
        assert process.stdout is not None
        announced = process.stdout.readline()
        address = json.loads(announced)["address"].replace("127.0.0.1", "localhost")
        seen = [announced]
        for token, answers in ((given, True), (token_of(folder, "a"), True), (token_of(folder, "a") + "x", False)):
            status = [sys.executable, "-m", "paceline", "-vv", "status", address, "--json"]
            status += ["--tls-ca", str(folder / "server" / "ca.pem")]
            client = {**os.environ, "PACELINE_TOKEN": token}
            done = subprocess.run(status, capture_output=True, text=True, env=client, check=False)
            assert (done.returncode == 0) is answers, done.stderr
            seen += [done.stdout, done.stderr]
        lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
        seen += [line.decode(errors="replace") for line in lines]
    finally:
        process.terminate()
        process.communicate(timeout=PATIENCE_S)
    seen.append(log.read_text())
    assert not [text for text in seen for secret in secrets if secret in text]


def test_the_limit_error_can_be_tried_again() -> None:
    """A limit passes; a missing right does not."""
    assert LimitExceededError("").retryable
    assert not PermissionDeniedError("").retryable
