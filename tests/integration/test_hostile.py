"""What no honest client sends: each gets a named error and a sentence, and neither state nor others suffer."""

import contextlib
import json
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import paceline_server
from integration.patience import PATIENCE_S
from integration.raw import Ended, RawWorker, ended, fp32_bytes, payload_of
from paceline_wire.v1 import parameter_server_pb2 as pb

FRAGMENT = 256
MANIFEST = pb.Manifest(
    tensors=[pb.Tensor(name="x", shape=[2, FRAGMENT], dtype=pb.DTYPE_FLOAT32, role=pb.ROLE_PARAMETER)],
    fragment_elements=FRAGMENT,
)
VALUES = {0: torch.linspace(-1, 1, FRAGMENT), 1: torch.linspace(2, 3, FRAGMENT)}
ONES = fp32_bytes(torch.ones(FRAGMENT))
CONFIG = {
    "schedule": {"quota": 1, "lease_s": 3600},
    "exchange": {"uplink": "fp32", "downlink": "fp32", "fragment_elements": FRAGMENT},
}
BIGGEST = (1 << 64) - 1


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A run of two fragments."""
    with paceline_server.local(CONFIG) as found:
        with RawWorker(found) as raw:
            raw.initialize(MANIFEST, VALUES)
        yield found


@pytest.fixture
def hostile(address: str) -> Iterator[RawWorker]:
    """A member up to no good; afterwards the state is as it was, and an honest worker's exchange works."""
    with RawWorker(address, "hostile") as raw:
        raw.join()
        before = [raw.fetch(fragment) for fragment in (0, 1)]
        yield raw
        after = [raw.fetch(fragment) for fragment in (0, 1)]
        for (old_bin, old_values), (new_bin, new_values) in zip(before, after, strict=True):
            assert old_bin == new_bin
            assert torch.equal(old_values, new_values)
        with RawWorker(address, "honest") as honest:
            honest.join()
            with honest.exchange() as stream:
                stream.push(0, 1, before[0][0], torch.zeros(FRAGMENT))
                update, values = stream.update()
                assert not update.HasField("refusal")
                assert torch.isfinite(values).all()


def pushed(**changes: object) -> pb.ExchangeRequest:
    """An honest first push of ones to fragment 0 but for changes of its announcement's fields, or of `data`."""
    data = changes.pop("data", ONES)
    assert isinstance(data, bytes)
    payload = payload_of(ONES)
    for name in ("codec", "num_bytes", "crc32"):
        if name in changes:
            setattr(payload, name, changes.pop(name))
    push = pb.Push(fragment=0, seq=1, base_bin=0, payload=payload)
    for name, value in changes.items():
        setattr(push, name, value)
    return pb.ExchangeRequest(push=push, data=data)


INVALID = grpc.StatusCode.INVALID_ARGUMENT
STREAMS: dict[str, tuple[list[pb.ExchangeRequest], str, grpc.StatusCode, str]] = {
    "data before a push": ([pb.ExchangeRequest(data=b"data")], "InvalidInputError", INVALID, "before any payload"),
    "an empty message": ([pb.ExchangeRequest()], "InvalidInputError", INVALID, "before any payload"),
    "another size than the codec's": ([pushed(num_bytes=1020)], "CodecError", INVALID, "1020 bytes was announced"),
    "an enormous size": ([pushed(num_bytes=BIGGEST)], "CodecError", INVALID, "elements in fp32 are 1024 bytes"),
    "no bytes": ([pushed(num_bytes=0, data=b"")], "CodecError", INVALID, "0 bytes was announced"),
    "more bytes than announced": ([pushed(data=ONES + b"\0")], "InvalidInputError", INVALID, "1025 bytes came"),
    "more bytes, later": (
        [pushed(data=ONES[:1000]), pb.ExchangeRequest(data=ONES)],
        "InvalidInputError",
        INVALID,
        "bytes came for a payload",
    ),
    "a push inside a push": ([pushed(data=ONES[:9]), pushed()], "InvalidInputError", INVALID, "before the one before"),
    "a damaged payload": ([pushed(crc32=5)], "DamagedPayloadError", grpc.StatusCode.DATA_LOSS, "CRC-32"),
    "an unknown fragment": ([pushed(fragment=2)], "InvalidInputError", INVALID, "fragment 2 does not live on shard 0"),
    "the last fragment number": ([pushed(fragment=(1 << 32) - 1)], "InvalidInputError", INVALID, "does not live"),
    "an unknown codec": ([pushed(codec=77)], "CodecError", INVALID, "unknown codec number 77"),
    "no codec": ([pushed(codec=0)], "CodecError", INVALID, "does not say its codec"),
    "a gap in the sequence": ([pushed(seq=2)], "InvalidInputError", INVALID, "push 2 .* where push 1 was due"),
    "the number 0": ([pushed(seq=0)], "InvalidInputError", INVALID, "push 0 .* where push 1 was due"),
    "the last number": ([pushed(seq=BIGGEST)], "InvalidInputError", INVALID, "send them in order"),
    "a speed of nothing": ([pushed(inner_step_us=0)], "InvalidInputError", INVALID, "must be positive"),
}


@pytest.mark.parametrize("kind", STREAMS)
def test_a_stream_that_breaks_the_rules_ends_with_a_named_error(hostile: RawWorker, kind: str) -> None:
    """The stream ends with the error's name, its one status, and a sentence."""
    messages, error, code, sentence = STREAMS[kind]
    with hostile.exchange() as stream:
        for message in messages:
            stream.send(message)
        expect(stream.end(), error, code, sentence)


def expect(end: Ended, error: str, code: grpc.StatusCode, sentence: str) -> None:
    """The call ended as said."""
    assert (end.error, end.code) == (error, code)
    assert re.search(sentence, end.details), end.details


@pytest.mark.parametrize("base_bin", [1, BIGGEST])
def test_a_base_from_the_future_is_refused(address: str, base_bin: int) -> None:
    """A push from a bin that has not begun is answered with a refusal; the stream goes on."""
    with RawWorker(address, "prophet") as raw:
        raw.join()
        newest, before = raw.fetch(1)
        with raw.exchange() as stream:
            stream.push(1, 1, max(base_bin, newest + 1), torch.ones(FRAGMENT))
            update, values = stream.update()
            assert "has not begun" in update.refusal
            assert torch.equal(values, before)
            stream.push(1, 2, update.bin, torch.zeros(FRAGMENT))
            assert not stream.update()[0].HasField("refusal")


def test_a_stream_begins_with_open_and_is_opened_once(hostile: RawWorker) -> None:
    """Nothing, or anything else, instead of `open` ends the stream, and so does a second `open`."""
    opening = pb.ExchangeRequest(open=pb.ExchangeOpen(worker=hostile.worker))
    for messages in ([], [pushed()], [pb.ExchangeRequest(data=b"data")]):
        with pytest.raises(grpc.RpcError) as refused:
            list(hostile.stub.Exchange(iter(messages), timeout=PATIENCE_S))
        expect(ended(refused.value), "InvalidInputError", INVALID, "begins with `open`")
    with hostile.exchange() as stream:
        stream.send(opening)
        expect(stream.end(), "InvalidInputError", INVALID, "opened once")


@pytest.mark.parametrize("downlink", [pb.CODEC_TOPK, pb.CODEC_FP4, 99])
def test_updates_come_in_no_other_codec(hostile: RawWorker, downlink: int) -> None:
    """A downlink that this version does not write, or that does not exist, is refused when the stream is opened."""
    with hostile.exchange(opened=False) as stream:
        opening = pb.ExchangeOpen(worker=hostile.worker)
        opening.downlink = downlink  # type: ignore[assignment]  # numbers outside the enum are the point
        stream.send(pb.ExchangeRequest(open=opening))
        assert stream.end().code is INVALID
    with pytest.raises(grpc.RpcError) as refused:
        list(hostile.stub.Fetch(pb.FetchRequest(codec=opening.downlink), timeout=PATIENCE_S))
    assert ended(refused.value).code is INVALID


def test_only_members_push(address: str, hostile: RawWorker) -> None:
    """Who has not joined is told to join, and who has left that it is over."""
    precondition = grpc.StatusCode.FAILED_PRECONDITION
    with RawWorker(address, "nobody") as nobody, nobody.exchange() as stream:
        expect(stream.end(), "NotAMemberError", precondition, "join again")
        with pytest.raises(grpc.RpcError) as refused:
            nobody.heartbeat()
        expect(ended(refused.value), "NotAMemberError", precondition, "join again")
        nobody.leave()
    hostile.leave()
    with hostile.exchange() as stream:
        expect(stream.end(), "SupersededError", grpc.StatusCode.ABORTED, "has left with this incarnation")
    with pytest.raises(grpc.RpcError) as refused:
        hostile.join()
    expect(ended(refused.value), "SupersededError", grpc.StatusCode.ABORTED, "join as a newer one")


def test_a_membership_that_ends_ends_the_stream(address: str) -> None:
    """A push on a stream that was opened as a member is refused once the worker has left."""
    with RawWorker(address, "leaver") as raw:
        raw.join()
        with raw.exchange() as stream:
            stream.push(0, 1, 0, torch.zeros(FRAGMENT))
            stream.update()
            raw.leave()
            stream.push(0, 2, 0, torch.ones(FRAGMENT))
            expect(stream.end(), "SupersededError", grpc.StatusCode.ABORTED, "has left with this incarnation")


def test_a_superseded_incarnation_must_stop(address: str) -> None:
    """Once a newer start of the same worker has joined, the older one gets nowhere, on no call."""
    with RawWorker(address, "again") as old, RawWorker(address, "again") as new:
        old.join()
        with old.exchange() as stream:
            stream.push(0, 1, 0, torch.zeros(FRAGMENT))
            stream.update()
            new.join()
            stream.push(0, 2, 0, torch.ones(FRAGMENT))
            expect(stream.end(), "SupersededError", grpc.StatusCode.ABORTED, "newer incarnation")
        for call in (old.join, old.heartbeat):
            with pytest.raises(grpc.RpcError) as refused:
                call()
            expect(ended(refused.value), "SupersededError", grpc.StatusCode.ABORTED, "must stop")
        with old.exchange() as stream:
            expect(stream.end(), "SupersededError", grpc.StatusCode.ABORTED, "must stop")
        old.leave()
        assert new.heartbeat().active_workers > 0
        with new.exchange() as stream:
            stream.push(0, 1, 0, torch.zeros(FRAGMENT))
            assert stream.update()[0].seq == 1


@pytest.mark.parametrize("worker_id", ["", "a" * 129, "a b", "a/b", "ä", "a\n"])
def test_names_are_checked(address: str, worker_id: str) -> None:
    """A worker's name that could confuse a log or a file is refused with what is allowed."""
    with RawWorker(address, worker_id) as raw:
        with pytest.raises(grpc.RpcError) as refused:
            raw.join()
        expect(ended(refused.value), "InvalidInputError", INVALID, "use 1 to 128 letters")


def test_an_incarnation_is_positive(address: str) -> None:
    """Incarnation 0, which is how an absent one looks, is refused."""
    with RawWorker(address, "zero") as raw:
        raw.worker.incarnation = 0
        with pytest.raises(grpc.RpcError) as refused:
            raw.join()
        expect(ended(refused.value), "InvalidInputError", INVALID, "must be positive")


def test_an_oversized_message_ends_its_stream_only(address: str, hostile: RawWorker) -> None:
    """A message above the limit is refused by gRPC before it is read whole."""
    with RawWorker(address, "bystander") as bystander:
        bystander.join()
        with hostile.exchange() as stream, bystander.exchange() as other:
            stream.send(pushed(data=bytes(17 << 20)))
            assert stream.end().code is grpc.StatusCode.RESOURCE_EXHAUSTED
            other.send(pb.ExchangeRequest(data=b"data"))
            expect(other.end(), "InvalidInputError", INVALID, "before any payload")


def test_a_push_that_is_cut_off_changes_nothing(address: str) -> None:
    """A stream that ends, or is abandoned, in the middle of a payload leaves no trace; the push may be sent again."""
    with RawWorker(address, "cut") as raw:
        raw.join()
        base_bin, before = raw.fetch(0)
        opening = pb.ExchangeRequest(open=pb.ExchangeOpen(worker=raw.worker))
        cut_off = raw.stub.Exchange(iter([opening, pushed(data=ONES[:-1])]), timeout=PATIENCE_S)
        assert list(cut_off) == []
        with raw.exchange() as stream:
            stream.send(pushed(data=ONES[:-1]))
        with raw.exchange() as stream:
            newest, values = raw.fetch(0)
            assert newest == base_bin
            assert torch.equal(values, before)
            stream.push(0, 1, base_bin, torch.zeros(FRAGMENT))
            assert not stream.update()[0].HasField("refusal")


def test_a_damaged_push_counts_once_when_it_is_sent_again(address: str) -> None:
    """Damage ends the stream and decides nothing: the same push, whole, is applied on the next one."""
    with RawWorker(address, "noisy") as raw:
        raw.join()
        base_bin, before = raw.fetch(1)
        with raw.exchange() as stream:
            stream.send(pushed(fragment=1, base_bin=base_bin, data=ONES[:-1] + b"!"))
            expect(stream.end(), "DamagedPayloadError", grpc.StatusCode.DATA_LOSS, "damaged on the way")
        assert torch.equal(raw.fetch(1)[1], before)
        applied = raw.status().pushes_applied
        with raw.exchange() as stream:
            stream.push(1, 1, base_bin, torch.zeros(FRAGMENT))
            assert not stream.update()[0].HasField("refusal")
        assert raw.status().pushes_applied == applied + 1


def test_a_number_that_was_decided_is_not_decided_again(address: str) -> None:
    """A push that goes back in the sequence is answered again, whatever it now contains, and changes nothing."""
    with RawWorker(address, "regressive") as raw:
        raw.join()
        base_bin, _ = raw.fetch(1)
        with raw.exchange() as stream:
            for seq in (1, 2, 3):
                stream.push(1, seq, base_bin, torch.zeros(FRAGMENT))
                base_bin = stream.update()[0].bin
            decided, before = raw.fetch(1)
            duplicates = raw.status().pushes_duplicate
            for seq in (3, 1, 2):
                stream.push(1, seq, base_bin, torch.full((FRAGMENT,), 1e3))
                update, values = stream.update()
                assert update.seq == seq
                assert torch.equal(values, before)
            assert raw.status().pushes_duplicate == duplicates + 3
            assert raw.fetch(1)[0] == decided
            assert torch.equal(raw.fetch(1)[1], before)
            stream.push(1, 4, base_bin, torch.zeros(FRAGMENT))
            assert not stream.update()[0].HasField("refusal")


@pytest.mark.parametrize("fragment", [2, (1 << 32) - 1])
def test_a_fetch_of_what_is_not_there_is_refused(hostile: RawWorker, fragment: int) -> None:
    """An unknown fragment ends the call with its number, also behind known ones."""
    request = pb.FetchRequest(fragments=[0, fragment], codec=pb.CODEC_FP32)
    with pytest.raises(grpc.RpcError) as refused:
        list(hostile.stub.Fetch(request, timeout=PATIENCE_S))
    expect(ended(refused.value), "InvalidInputError", INVALID, f"fragment {fragment} does not live on shard 0")


def test_a_truncated_message_ends_its_stream_only(address: str, hostile: RawWorker) -> None:
    """A protobuf message without its last bytes is no message: its stream ends with that, and nothing else."""
    opening = pb.ExchangeRequest(open=pb.ExchangeOpen(worker=hostile.worker)).SerializeToString()
    whole = pushed().SerializeToString()
    with grpc.insecure_channel(address) as channel, RawWorker(address, "beside") as beside:
        beside.join()
        path = "/paceline_wire.v1.ParameterServerService/Exchange"
        method: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(path)
        with beside.exchange() as other:
            for cut in (1, 500, len(whole) - 1):
                with pytest.raises(grpc.RpcError) as refused:
                    list(method(iter([opening, whole[:-cut]]), timeout=PATIENCE_S))
                expect(ended(refused.value), "InvalidInputError", INVALID, "a message is truncated, or no message")
            other.send(pb.ExchangeRequest(data=b"data"))
            expect(other.end(), "InvalidInputError", INVALID, "before any payload")


def test_bytes_that_are_no_protocol_do_no_harm(address: str, hostile: RawWorker) -> None:
    """Garbage instead of HTTP/2, and garbage instead of messages, end at their own connection or call."""
    host, _, port = address.rpartition(":")
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    for garbage in (b"GET / HTTP/1.1\r\n\r\n", bytes(range(256)) * 64, preface + b"\xff" * 999):
        # The server may hang up at any moment.
        with (
            contextlib.suppress(OSError),
            socket.create_connection((host, int(port)), timeout=PATIENCE_S) as connection,
        ):
            connection.sendall(garbage)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(4096):
                pass
    with grpc.insecure_channel(address) as channel:
        path = "/paceline_wire.v1.ParameterServerService/Exchange"
        method: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(path)
        with pytest.raises(grpc.RpcError) as refused:
            list(method(iter([b"\xff" * 100]), timeout=PATIENCE_S))
        expect(ended(refused.value), "InvalidInputError", INVALID, "no message of the protocol")


numbers = st.one_of(st.integers(0, 3), st.sampled_from([255, 256, 1 << 31, (1 << 32) - 1]))
long_numbers = st.one_of(numbers, st.sampled_from([1 << 32, 1 << 63, BIGGEST]))
payloads = st.builds(
    pb.Payload,
    codec=st.sampled_from([0, 1, 2, 3, 4, 5, 6]),
    num_bytes=st.one_of(long_numbers, st.sampled_from([512, 260, 132, 1024])),
    crc32=st.one_of(st.none(), st.integers(0, (1 << 32) - 1)),
)
pushes = st.builds(
    pb.Push,
    fragment=numbers,
    seq=long_numbers,
    base_bin=long_numbers,
    payload=st.one_of(st.none(), payloads),
    inner_step_us=st.one_of(st.none(), long_numbers),
)
data = st.binary(max_size=100)
requests = st.one_of(
    st.builds(pb.ExchangeRequest, push=pushes, data=data),
    st.builds(pb.ExchangeRequest, data=data),
)


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(messages=st.lists(requests, max_size=5))
def test_whatever_is_sent_no_end_is_an_accident(hostile: RawWorker, messages: list[pb.ExchangeRequest]) -> None:
    """A stream of any messages ends in order or with a named error; an accident of the server's would have no name."""
    opening = pb.ExchangeRequest(open=pb.ExchangeOpen(worker=hostile.worker))
    call = hostile.stub.Exchange(iter([opening, *messages]), timeout=PATIENCE_S)
    with contextlib.suppress(grpc.RpcError):
        list(call)
    assert call.code() is grpc.StatusCode.OK or ended(call).error


UNARY = {
    "ParameterServerService": ("Describe", "Join", "Heartbeat", "Leave", "Fetch"),
    "AdminService": ("Status",),
}


@pytest.mark.parametrize("path", [f"{service}/{name}" for service, names in UNARY.items() for name in names])
def test_a_single_request_that_is_no_message_is_the_callers_error(hostile: RawWorker, address: str, path: str) -> None:
    """It is refused by name, as in a stream, and is not called an accident of the server."""
    with grpc.insecure_channel(address) as channel:
        method: grpc.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(f"/paceline_wire.v1.{path}")
        with pytest.raises(grpc.RpcError) as refused:
            list(method(b"\xff" * 9, timeout=PATIENCE_S))
    expect(ended(refused.value), "InvalidInputError", INVALID, "no message of the protocol")


def test_unreadable_requests_do_not_fill_the_log(tmp_path: Path) -> None:
    """Health checks need no token: what is no request there leaves no traceback behind."""
    command = [sys.executable, "-m", "paceline", "serve", "--json", "--listen", "127.0.0.1:0"]
    with (tmp_path / "log").open("wb") as log, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log) as process:
        assert process.stdout is not None
        shard = json.loads(process.stdout.readline())["shards"][0]
        for service in ("grpc.health.v1.Health/Check", "paceline_wire.v1.ParameterServerService/Join"):
            with grpc.insecure_channel(shard) as channel:
                method: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(f"/{service}")
                with pytest.raises(grpc.RpcError):
                    method(b"\xff" * 9, timeout=PATIENCE_S, wait_for_ready=True)
        process.terminate()
        process.wait(PATIENCE_S)
    assert b"Traceback" not in (tmp_path / "log").read_bytes()


def test_a_speed_that_nobody_has_is_refused(hostile: RawWorker) -> None:
    """Steps of more than a week are refused; the longest that are taken fit into the status."""
    hostile.heartbeat(7 * 24 * 3600 * 1_000_000)
    assert any(member.inner_step_us == 7 * 24 * 3600 * 1_000_000 for member in hostile.status().members)
    with pytest.raises(grpc.RpcError) as refused:
        hostile.heartbeat(BIGGEST)
    expect(ended(refused.value), "InvalidInputError", INVALID, "604800 at most")
    assert any(member.worker_id == "hostile" for member in hostile.status().members)


def test_a_method_whose_name_is_no_text_does_not_end_the_server(address: str, hostile: RawWorker) -> None:
    """Some versions of gRPC end their server then; the shard serves on, at its port and with its state."""
    host, _, port = address.rpartition(":")
    headers = {":method": b"POST", ":scheme": b"http", ":path": b"/a\xff/b", "content-type": b"application/grpc"}
    fields = [
        b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value for name, value in headers.items()
    ]
    block = b"".join(fields)
    settings_frame, headers_frame = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]), bytes([0, 0, len(block), 1, 5, 0, 0, 0, 1])
    for _ in range(3):
        with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as connection:
            connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + settings_frame + headers_frame + block)
            connection.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionError):
                while connection.recv(4096):
                    pass
        request = pb.HeartbeatRequest(worker=hostile.worker)
        assert hostile.stub.Heartbeat(request, timeout=PATIENCE_S, wait_for_ready=True).active_workers > 0
