"""A shard that speaks an earlier version's messages and nothing newer: plain descent, in memory.

What a newer client says beyond those messages it does not see.
"""

import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import grpc
import torch

from compatibility.earlier_version import SERVICE, EarlierVersion
from paceline_wire.manifest import Manifest
from paceline_wire.v1 import parameter_server_pb2 as pb

FP32 = 1
LR = 0.5


class OldServer:
    """The shard; a context manager that serves it.

    Args:
        version: Whose messages it speaks.
    """

    def __init__(self, version: EarlierVersion) -> None:
        self._version = version
        self._lock = threading.Lock()
        self.values: dict[int, torch.Tensor] = {}
        self.bins: dict[int, int] = {}
        self.pushes = 0
        self.left = False
        self._manifest: Any = None
        self._initialization_id = 0
        self._server = grpc.server(ThreadPoolExecutor(max_workers=16))
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, self._handlers()),))
        self._port = self._server.add_insecure_port("127.0.0.1:0")

    @property
    def address(self) -> str:
        """Where it listens."""
        return f"127.0.0.1:{self._port}"

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.stop(None).wait()

    def _handlers(self) -> "dict[str, grpc.RpcMethodHandler[Any, Any]]":
        make: dict[str, Any] = {
            "Describe": grpc.unary_unary_rpc_method_handler,
            "Initialize": grpc.stream_unary_rpc_method_handler,
            "Join": grpc.unary_unary_rpc_method_handler,
            "Heartbeat": grpc.unary_unary_rpc_method_handler,
            "Leave": grpc.unary_unary_rpc_method_handler,
            "Fetch": grpc.unary_stream_rpc_method_handler,
            "Exchange": grpc.stream_stream_rpc_method_handler,
        }
        handlers = {}
        for name, maker in make.items():
            request, answer = self._version.types_of(name)
            handlers[name] = maker(
                getattr(self, f"_{name.lower()}"),
                request_deserializer=request.FromString,
                response_serializer=answer.SerializeToString,
            )
        return handlers

    def _describe(self, request: Any, _context: Any) -> Any:
        """As the old server described itself, with a rule that needs no state."""
        first = next(call for call in self._version.calls if call.method == "Describe")
        answer = self._version.message("DescribeResponse").FromString(first.messages[1][1])
        assert request.protocol_version in (0, answer.protocol_version)
        outer = answer.configuration.outer
        outer.rule, outer.lr, outer.momentum, outer.look_ahead = "sgd", LR, 0.0, False
        del answer.shards[:]
        answer.shards.add(port=self._port)
        if self._manifest is not None:
            answer.manifest.CopyFrom(self._manifest)
            if "initialization_id" in answer.DESCRIPTOR.fields_by_name:
                answer.initialization_id = self._initialization_id
        return answer

    def _initialize(self, requests: Iterator[Any], _context: Any) -> Any:
        start = next(requests).start
        manifest = Manifest.from_wire(pb.Manifest.FromString(start.manifest.SerializeToString()))
        parts: dict[int, bytes] = {}
        index = 0
        for message in requests:
            index = message.fragment.fragment if message.HasField("fragment") else index
            parts[index] = parts.get(index, b"") + message.data
        self.values = {index: _values(data) for index, data in parts.items()}
        assert [vector.numel() for vector in self.values.values()] == [each.num_elements for each in manifest.fragments]
        self.bins = dict.fromkeys(self.values, 0)
        self._manifest, self._initialization_id = start.manifest, start.initialization_id
        return self._version.message("InitializeResponse")(initialization_id=start.initialization_id)

    def _join(self, request: Any, _context: Any) -> Any:
        assert request.worker.worker_id
        return self._version.message("JoinResponse")(lease_ms=30_000, inner_steps=2, active_workers=1)

    def _heartbeat(self, _request: Any, _context: Any) -> Any:
        return self._version.message("HeartbeatResponse")(inner_steps=2, active_workers=1)

    def _leave(self, _request: Any, _context: Any) -> Any:
        self.left = True
        return self._version.message("LeaveResponse")()

    def _fetch(self, request: Any, _context: Any) -> Iterator[Any]:
        for index in request.fragments or sorted(self.values):
            with self._lock:
                data, newest_bin = self.values[index].numpy().tobytes(), self.bins[index]
            answer = self._version.message("FetchResponse")(data=data)
            answer.fragment.fragment, answer.fragment.bin = index, newest_bin
            answer.fragment.payload.CopyFrom(self._payload(data))
            yield answer

    def _exchange(self, requests: Iterator[Any], context: Any) -> Iterator[Any]:
        context.send_initial_metadata(())
        assert next(requests).HasField("open")
        announced, data = None, b""
        for message in requests:
            announced, data = (message.push, b"") if message.HasField("push") else (announced, data)
            data += message.data
            if announced is not None and len(data) == announced.payload.num_bytes:
                yield self._answer(announced, data)
                announced = None

    def _answer(self, push: Any, data: bytes) -> Any:
        assert push.payload.codec == FP32
        assert push.payload.crc32 == zlib.crc32(data)
        with self._lock:
            self.values[push.fragment] = self.values[push.fragment] - LR * _values(data)
            self.bins[push.fragment] += 1
            self.pushes += 1
            values, newest_bin = self.values[push.fragment].numpy().tobytes(), self.bins[push.fragment]
        answer = self._version.message("ExchangeResponse")(data=values)
        answer.update.fragment, answer.update.seq, answer.update.bin = push.fragment, push.seq, newest_bin
        answer.update.inner_steps, answer.update.quota = 2, 1
        answer.update.payload.CopyFrom(self._payload(values))
        return answer

    def _payload(self, data: bytes) -> Any:
        return self._version.message("Payload")(codec=FP32, num_bytes=len(data), crc32=zlib.crc32(data))


def _values(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.float32)
