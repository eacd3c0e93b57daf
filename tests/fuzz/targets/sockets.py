"""A real server over real sockets: calls with any bytes for messages, and connections with any bytes for HTTP/2.

The server runs in a process of its own, on a data directory. An honest worker exchanges beside the inputs. At the end
the journal is played again without them: every value that the worker was sent must come out of it, bit for bit.
"""

import contextlib
import random
import socket
import struct
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import grpc
import torch

from fuzz.mutation import framed, frames, mutated_bytes
from fuzz.resources import open_files, resident_bytes
from fuzz.target import Target, ViolationError
from fuzz.targets.calls import (
    FRAGMENT,
    HOSTILE,
    MANIFEST,
    METHODS,
    SIZES,
    Method,
    conversations,
    follow,
    mutated_conversation,
)
from fuzz.targets.files import memory_folder
from integration.killable import KillableServer
from integration.raw import RawWorker
from paceline_server.construction import build_shard
from paceline_server.journal import Decided, FragmentInitialized, Initialized, MembershipChanged
from paceline_server.settings import config_from_mapping
from paceline_server.storage.directory import ShardDirectory
from paceline_server.storage.recovery import read_records
from paceline_wire import PROTOCOL_VERSION, codecs
from paceline_wire.errors import ERROR_METADATA_KEY
from paceline_wire.v1 import parameter_server_pb2 as pb

CALL_S = 4.0
LONGEST_S = 3600.0
"""As long as all inputs may take; a server that hangs is found by calls of their own."""

HONEST_EVERY = 50
"""Inputs between two pushes of the honest worker."""

NEW_MEMBER_EVERY = 25
"""Inputs for which a hostile worker has one name: sooner or later it leaves, or joins as a newer one."""

MOST_GROWTH_BYTES = 96 << 20
"""What the server may take more than after its first inputs: gRPC keeps what its largest messages took."""

MOST_MORE_FILES = 16
_CONFIG = {
    "schedule": {"quota": 1, "lease_s": 3600},
    # What a valid worker may push decides what is out of proportion, also for others.
    "guard": {"refuse_outliers": False},
    "exchange": {"downlink": "fp32", "fragment_elements": FRAGMENT, "dynamic_inner_steps": False},
}
_FLAGS = (
    *("--schedule.quota", "1", "--schedule.lease-s", "3600", "--exchange.downlink", "fp32"),
    *(
        "--exchange.fragment-elements",
        str(FRAGMENT),
        "--no-exchange.dynamic-inner-steps",
        "--no-guard.refuse-outliers",
        "--storage.sync",
        "never",
    ),
    *("--storage.keep-snapshots", "1000000"),
)
_NOT_HERE = ("Drain", "Configure")
"""What would end the server, or change what the honest worker's pushes do, as it is meant to; `calls` has them."""

_OTHER_METHODS = (
    Method(name="Check", request=METHODS[0].request, service="grpc.health.v1.Health"),
    Method(name="Watch", request=METHODS[0].request, service="grpc.health.v1.Health", streams_out=True),
    Method(
        name="ServerReflectionInfo",
        request=METHODS[0].request,
        service="grpc.reflection.v1alpha.ServerReflection",
        streams_in=True,
        streams_out=True,
    ),
    Method(name="Nothing", request=METHODS[0].request),
)


class _Server:
    """The server, and the honest worker beside the inputs."""

    def __init__(self) -> None:
        self._folder = memory_folder()
        self.data_dir = Path(self._folder.name)
        self.process = KillableServer(self.data_dir, *_FLAGS)
        self._honest = RawWorker(self.process.address, "honest")
        values = {index: torch.linspace(-1, 1, size) for index, size in enumerate(SIZES)}
        self._honest.initialize(MANIFEST, values)
        self._honest.join()
        self._stream = self._honest.exchange(longest_s=LONGEST_S)
        self._seq = 0
        self.sent: dict[int, int] = {}
        self._bytes = self._files = 0

    @property
    def address(self) -> str:
        """Where it listens."""
        return self.process.address

    def exchange(self) -> None:
        """One honest push, which must be answered, and a look at what the server holds."""
        self._seq += 1
        bin_, _ = self._honest.fetch(2)
        self._stream.push(2, self._seq, bin_, torch.full((SIZES[2],), 1e-3 * self._seq))
        update, values = self._stream.update()
        if update.HasField("refusal") or update.seq != self._seq:
            raise ViolationError(f"an honest push is refused: {update}")
        self.sent[self._seq] = zlib.crc32(values.numpy().tobytes())
        if self._seq == 10:
            self._bytes, self._files = self._held()

    def join(self, worker: str) -> None:
        """Make the hostile worker a member under a name of as many letters."""
        request = pb.JoinRequest(protocol_version=PROTOCOL_VERSION, worker=HOSTILE)
        request.worker.worker_id = worker
        self._honest.stub.Join(request, timeout=CALL_S)

    def _held(self) -> tuple[int, int]:
        pids = _family(self.process.process.pid)
        return sum(map(resident_bytes, pids)), sum(map(open_files, pids))

    def require_bounded(self) -> None:
        """The server holds no more than after its first inputs, once it had time to notice that everybody has gone."""
        if not self._bytes:
            return
        deadline_s = time.monotonic() + 10.0
        while True:
            resident, files = self._held()
            fits = resident <= self._bytes + MOST_GROWTH_BYTES and files <= self._files + MOST_MORE_FILES
            if fits or time.monotonic() > deadline_s:
                break
            time.sleep(0.1)
        if not fits:
            raise ViolationError(
                f"the server held {self._bytes >> 20} MiB and {self._files} files, and now {resident >> 20} and {files}"
            )

    def require_undisturbed(self) -> None:
        """What the honest worker was sent is what a shard has that was told of the accepted pushes alone."""
        shard = build_shard(config_from_mapping(_CONFIG), 0)
        for _, record in read_records(ShardDirectory(self.data_dir, 0)):
            if isinstance(record, Initialized):
                shard.take_manifest(record.manifest, record.initialization_id)
            elif isinstance(record, FragmentInitialized):
                size = shard.plan_of(record.fragment).num_elements
                shard.initialize_fragment(record.fragment, codecs.decode(codecs.codec("fp32"), record.payload, size))
            elif isinstance(record, MembershipChanged):
                shard.membership.restore(record.membership, record.time_s)
            elif isinstance(record, Decided):
                follow(shard, record)
                if record.push is None or record.push.worker != "honest" or record.fragment != 2:
                    continue
                values = shard.hosted(2)[1].published()
                if zlib.crc32(values.numpy().tobytes()) != self.sent.get(record.push.seq):
                    raise ViolationError(f"push {record.push.seq} of the honest worker was answered with other values")

    def close(self) -> None:
        """End the worker and the server, which must end in order."""
        self._stream.__exit__(None, None, None)
        self._honest.__exit__(None, None, None)
        if self.process.stop() != 0:
            raise ViolationError("the server does not end in order")

    def remove(self) -> None:
        """Remove its files."""
        self._folder.cleanup()


def _family(pid: int) -> list[int]:
    """A process and all its descendants."""
    found = [pid]
    for parent in found:
        with contextlib.suppress(FileNotFoundError):
            found += [int(child) for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
    return found


class _SocketTarget(Target):
    """What both have in common: the server."""

    errors = ()

    def __init__(self) -> None:
        self.server = _Server()
        self._played = 0

    def run(self, data: bytes) -> str:
        """Send it; at times let the honest worker push."""
        if self._played % HONEST_EVERY == 0:
            self.server.exchange()
        self._played += 1
        outcome = self.send(data)
        if self.server.process.process.poll() is not None:
            raise ViolationError("the server has ended")
        return outcome

    def send(self, data: bytes) -> str:
        """Send an input; what came of it."""
        raise NotImplementedError

    def let_go(self) -> None:
        """Close what was opened to the server."""

    def finish(self) -> None:
        """Look at what the server holds, end it, and play its journal again."""
        self.server.exchange()
        self.let_go()
        try:
            self.server.require_bounded()
        finally:
            self.server.close()
        self.server.require_undisturbed()
        self.server.remove()


class GrpcTarget(_SocketTarget):
    """Calls of every method, with any bytes for messages."""

    name: ClassVar[str] = "grpc"
    inputs: ClassVar[int] = 25_000

    def __init__(self) -> None:
        super().__init__()
        self._channel = grpc.insecure_channel(self.server.address, options=[("grpc.use_local_subchannel_pool", 1)])
        self._methods = tuple(method for method in (*METHODS, *_OTHER_METHODS) if method.name not in _NOT_HERE)
        self._calls = 0
        self._name = b""

    def seeds(self) -> Sequence[bytes]:
        """Honest calls."""
        numbers = {method.name: number for number, method in enumerate(self._methods)}
        seeds = [
            bytes([numbers[name], 0]) + framed([message.SerializeToString() for message in messages])
            for name, messages in conversations()
            if name in numbers
        ]
        return [*seeds, *(bytes([numbers[method.name], 0]) + framed([b""]) for method in _OTHER_METHODS)]

    def mutated(self, rng: random.Random, data: bytes, other: bytes) -> bytes:
        """Message by message."""
        return mutated_conversation(rng, data, other)

    def send(self, data: bytes) -> str:
        """Make the call; one of ours ends in order or with one of our errors, never by an accident."""
        method = self._methods[data[:1].ljust(1, b"\0")[0] % len(self._methods)]
        if self._calls % NEW_MEMBER_EVERY == 0:
            self._name = f"h{self._calls:06d}".encode()
            self.server.join(self._name.decode())
        self._calls += 1
        messages = frames(data[2:].replace(HOSTILE.worker_id.encode(), self._name))
        path = f"/{method.service}/{method.name}"
        make = getattr(self._channel, f"{_kind(method.streams_in)}_{_kind(method.streams_out)}")
        callable_: grpc.UnaryUnaryMultiCallable[object, object] = make(path)
        request = iter(messages) if method.streams_in else b"".join(messages)
        endless = method.name == "Watch"
        try:
            answer = callable_(request, timeout=0.02 if endless else CALL_S)
            count = len(list(answer)) if method.streams_out else 1  # type: ignore[call-overload]  # a stream then
        except grpc.RpcError as error:
            return f"{method.name} {self._refusal(method, error, endless=endless)}"
        return f"{method.name} {min(count, 3)} answers"

    @staticmethod
    def _refusal(method: Method, error: grpc.RpcError, *, endless: bool) -> str:
        if not isinstance(error, grpc.Call):
            raise ViolationError(f"{method.name} ended with {error!r}")
        code, details = error.code(), error.details() or ""
        named = dict(error.trailing_metadata() or ()).get(ERROR_METADATA_KEY)
        if code is grpc.StatusCode.DEADLINE_EXCEEDED and not endless:
            raise ViolationError(f"{method.name} does not end")
        if method in METHODS and named is None:
            raise ViolationError(f"{method.name} ended by accident: {code.name} {details}")
        return f"{code.name} {named}: {details}"

    def let_go(self) -> None:
        """Close the channel."""
        self._channel.close()


def _kind(streams: bool) -> str:
    return "stream" if streams else "unary"


_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY, _WINDOW, _CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9


def http2_frame(kind: int, flags: int, stream: int, payload: bytes, *, length: int | None = None) -> bytes:
    """A frame, whose header may lie about its length."""
    size = len(payload) if length is None else length
    return struct.pack(">I", size & 0xFFFFFF)[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def _literal(name: str, value: str) -> bytes:
    """A header that is neither indexed nor compressed."""
    return b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()


def call_headers(path: str) -> bytes:
    """The headers of a gRPC call."""
    fields = {":method": "POST", ":scheme": "http", ":path": path, ":authority": "a"}
    fields |= {"content-type": "application/grpc", "te": "trailers", "grpc-timeout": "1S"}
    return b"".join(_literal(name, value) for name, value in fields.items())


class Http2Target(_SocketTarget):
    """Connections with any bytes: garbage, half messages, lengths that lie, frames in the wrong place."""

    name: ClassVar[str] = "http2"
    inputs: ClassVar[int] = 40_000

    def seeds(self) -> Sequence[bytes]:
        """Whole calls, one part a message; and what is no HTTP/2 at all."""
        parts = []
        for method_name, messages in conversations()[:20]:
            if method_name in _NOT_HERE:
                continue
            body = framed([message.SerializeToString() for message in messages])
            method = next(method for method in METHODS if method.name == method_name)
            parts.append(
                [
                    _PREFACE + http2_frame(_SETTINGS, 0, 0, b""),
                    http2_frame(_HEADERS, 4, 1, call_headers(f"/{method.service}/{method.name}")),
                    *(http2_frame(_DATA, 0, 1, body[at : at + 8192]) for at in range(0, len(body), 8192)),
                    http2_frame(_DATA, 1, 1, b""),
                ]
            )
        opening = [_PREFACE + http2_frame(_SETTINGS, 0, 0, struct.pack(">HI", 4, 0))]
        parts += [
            [b"GET / HTTP/1.1\r\n\r\n"],
            [bytes(range(256))],
            [*opening, http2_frame(_DATA, 0, 1, b"", length=0xFFFFFF)],
            [*opening, http2_frame(_PING, 0, 0, bytes(8)), http2_frame(_WINDOW, 0, 0, struct.pack(">I", 2**31 - 1))],
            [*opening, http2_frame(_GOAWAY, 0, 0, bytes(8)), http2_frame(_RST_STREAM, 0, 1, bytes(4))],
            [*opening, http2_frame(_CONTINUATION, 0, 1, bytes(99)), http2_frame(99, 255, 1, bytes(9))],
        ]
        return [framed(each) for each in parts]

    def mutated(self, rng: random.Random, data: bytes, other: bytes) -> bytes:
        """A part changed, cut, left out, repeated, moved, or the call's payload announced with another length."""
        parts = frames(data)
        if not parts:
            return mutated_bytes(rng, data, other)
        at = rng.randrange(len(parts))
        kind = rng.randrange(7)
        if kind == 0:
            del parts[at]
        elif kind == 1:
            parts.insert(at, rng.choice([*parts, *frames(other)]))
        elif kind == 2:
            parts[at] = parts[at][: rng.randrange(len(parts[at]) + 1)]
        elif kind == 3 and len(parts[at]) > 14:
            length = struct.pack(">I", rng.choice((0, 1, 2**24, 2**31 - 1, 2**32 - 1)))
            parts[at] = parts[at][:10] + length + parts[at][14:]
        elif kind == 4:
            parts[at] = rng.randbytes(9) + parts[at][9:]
        else:
            parts[at] = mutated_bytes(rng, parts[at], rng.choice([b"", *frames(other)]))
        return framed(parts[:64])

    def send(self, data: bytes) -> str:
        """Send it, hang up, and read what the server says until then."""
        host, _, port = self.server.address.rpartition(":")
        said = bytearray()
        with (
            contextlib.suppress(OSError),
            socket.create_connection((host, int(port)), timeout=CALL_S) as connection,
        ):
            connection.sendall(b"".join(frames(data)) or data)
            connection.shutdown(socket.SHUT_WR)
            while piece := connection.recv(65536):
                said += piece
        return f"frames {' '.join(_kinds(bytes(said)))}"


def _kinds(said: bytes) -> list[str]:
    """The kinds of the frames in a server's answer, each once."""
    kinds, at = [], 0
    while at + 9 <= len(said):
        kinds.append(f"k{said[at + 3]}")
        at += 9 + int.from_bytes(said[at : at + 3], "big")
    return sorted(set(kinds))
