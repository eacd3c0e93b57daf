"""A worker without the client: the protocol's own messages over a synchronous stub, to send what no client would."""

import itertools
import queue
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import grpc
import torch

from integration.patience import PATIENCE_S
from paceline_wire import PROTOCOL_VERSION, codecs
from paceline_wire.errors import ERROR_METADATA_KEY
from paceline_wire.v1 import admin_pb2, admin_pb2_grpc
from paceline_wire.v1 import parameter_server_pb2 as pb
from paceline_wire.v1 import parameter_server_pb2_grpc as pb_grpc

_incarnations = itertools.count(1)


@dataclass(frozen=True)
class Ended:
    """How a call ended.

    Attributes:
        code: gRPC's status.
        error: The name of the error in the trailing metadata; "" if there is none.
        details: The sentence.
    """

    code: grpc.StatusCode
    error: str
    details: str


def ended(call: grpc.Call | grpc.RpcError) -> Ended:
    """How a call of a synchronous stub ended; its error says the same."""
    assert isinstance(call, grpc.Call)
    metadata = {key: value for key, value in call.trailing_metadata() or ()}  # noqa: C416  # dict() drops its types
    return Ended(call.code(), str(metadata.get(ERROR_METADATA_KEY, "")), call.details() or "")


def payload_of(data: bytes, codec: pb.Codec.ValueType = pb.CODEC_FP32) -> pb.Payload:
    """An honest announcement of data."""
    return pb.Payload(codec=codec, num_bytes=len(data), crc32=zlib.crc32(data))


def fp32_bytes(values: torch.Tensor) -> bytes:
    """The bytes of values in the codec fp32."""
    return values.detach().float().contiguous().numpy().tobytes()


class RawWorker:
    """A channel to one shard, and a worker's name; a context manager that closes the channel."""

    def __init__(self, address: str, worker_id: str = "raw", *, token: str | None = None) -> None:
        self.worker = pb.Worker(worker_id=worker_id, incarnation=next(_incarnations))
        self.metadata = (("authorization", f"Bearer {token}"),) if token is not None else ()
        self._channel = grpc.insecure_channel(address, options=[("grpc.max_send_message_length", -1)])
        self.stub = pb_grpc.ParameterServerServiceStub(self._channel)
        self.admin = admin_pb2_grpc.AdminServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._channel.close()

    def join(self, *, version: int = PROTOCOL_VERSION, previous: int | None = None) -> pb.JoinResponse:
        """Become a member; go on from a previous incarnation, if one is given."""
        request = pb.JoinRequest(protocol_version=version, worker=self.worker, previous_incarnation=previous)
        return self.stub.Join(request, timeout=PATIENCE_S, metadata=self.metadata)

    def leave(self) -> None:
        """End the membership."""
        self.stub.Leave(pb.LeaveRequest(worker=self.worker), timeout=PATIENCE_S, metadata=self.metadata)

    def heartbeat(self, inner_step_us: int | None = None) -> pb.HeartbeatResponse:
        """Report a speed."""
        request = pb.HeartbeatRequest(worker=self.worker, inner_step_us=inner_step_us)
        return self.stub.Heartbeat(request, timeout=PATIENCE_S, metadata=self.metadata)

    def describe(self, *, version: int = PROTOCOL_VERSION) -> pb.DescribeResponse:
        """Ask what the shard hosts."""
        request = pb.DescribeRequest(protocol_version=version)
        return self.stub.Describe(request, timeout=PATIENCE_S, metadata=self.metadata)

    def status(self) -> admin_pb2.StatusResponse:
        """Ask for the shard's counters."""
        return self.admin.Status(admin_pb2.StatusRequest(), timeout=PATIENCE_S, metadata=self.metadata)

    def fetch(self, fragment: int) -> tuple[int, torch.Tensor]:
        """A fragment's bin and values, float32 [n]."""
        request = pb.FetchRequest(fragments=[fragment], codec=pb.CODEC_FP32)
        messages = list(self.stub.Fetch(request, timeout=PATIENCE_S, metadata=self.metadata))
        data = b"".join(message.data for message in messages)
        return messages[0].fragment.bin, torch.frombuffer(bytearray(data), dtype=torch.float32)

    def initialize(self, manifest: pb.Manifest, values: dict[int, torch.Tensor]) -> pb.InitializeResponse:
        """Upload first parameters, fragment by fragment."""
        messages = [pb.InitializeRequest(start=self.initialize_start(manifest))]
        messages += [initialize_fragment(fragment, data) for fragment, data in values.items()]
        return self.stub.Initialize(iter(messages), timeout=PATIENCE_S, metadata=self.metadata)

    def initialize_start(self, manifest: pb.Manifest, *, version: int = PROTOCOL_VERSION) -> pb.InitializeStart:
        """The first message of an upload."""
        return pb.InitializeStart(protocol_version=version, manifest=manifest, initialization_id=7)

    def exchange(self, *, opened: bool = True, longest_s: float = PATIENCE_S) -> "RawStream":
        """An exchange stream that ends by itself after so many seconds; opened: its first message is sent already."""
        stream = RawStream(self, longest_s)
        if opened:
            stream.open()
        return stream


def initialize_fragment(fragment: int, values: torch.Tensor) -> pb.InitializeRequest:
    """One fragment's first values in one message."""
    data = fp32_bytes(values)
    return pb.InitializeRequest(fragment=pb.InitializeFragment(fragment=fragment, payload=payload_of(data)), data=data)


class RawStream:
    """One exchange stream, driven message by message; a context manager that ends it."""

    def __init__(self, worker: RawWorker, longest_s: float = PATIENCE_S) -> None:
        self._worker = worker.worker
        self._requests: queue.SimpleQueue[pb.ExchangeRequest | None] = queue.SimpleQueue()
        requests: Iterator[pb.ExchangeRequest] = iter(self._requests.get, None)
        self._call = worker.stub.Exchange(requests, timeout=longest_s, metadata=worker.metadata)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._requests.put(None)
        self._call.cancel()

    def send(self, message: pb.ExchangeRequest) -> None:
        """Send any message."""
        self._requests.put(message)

    def open(self) -> None:
        """Send `open`."""
        opening = pb.ExchangeOpen(worker=self._worker, downlink=pb.CODEC_FP32)
        self.send(pb.ExchangeRequest(open=opening))

    def push(self, fragment: int, seq: int, base_bin: int, values: torch.Tensor, codec: str = "fp32") -> None:
        """Send an honest push (float32 [n]) in one message."""
        data = codecs.encode(codecs.codec(codec), values).numpy().tobytes()
        payload = payload_of(data, codecs.wire_value(codecs.codec(codec)))
        announced = pb.Push(fragment=fragment, seq=seq, base_bin=base_bin, payload=payload)
        self.send(pb.ExchangeRequest(push=announced, data=data))

    def update(self) -> tuple[pb.Update, torch.Tensor]:
        """Wait for the next whole update: its announcement and its values, float32 [n]."""
        first = next(self._call)
        assert first.HasField("update")
        data = first.data
        while len(data) < first.update.payload.num_bytes:
            data += next(self._call).data
        assert zlib.crc32(data) == first.update.payload.crc32
        return first.update, torch.frombuffer(bytearray(data), dtype=torch.float32)

    def last(self) -> Ended:
        """Wait for the server to end the stream with an error, whatever it still sends before."""
        try:
            for _ in self._call:
                pass
        except grpc.RpcError as error:
            return ended(error)
        raise AssertionError("the server ended the stream in order")

    def end(self) -> Ended:
        """Wait for the server to end the stream with an error."""
        try:
            message = next(self._call)
        except grpc.RpcError as error:
            return ended(error)
        raise AssertionError(f"the server went on with {message}")
