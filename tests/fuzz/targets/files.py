"""Files and texts that a server, a worker or the simulator reads: configuration, tokens, arrivals, saved states."""

import asyncio
import json
import logging
import random
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from fuzz.mutation import FLOATS, INTEGERS, TEXTS, mutated_bytes, mutated_json
from fuzz.target import Target, ViolationError
from paceline.worker_state import Progress, SavedFragment, SavedPush, SavedWorker, staleness
from paceline_server.audit import AuditEntry, AuditLog, utc_now
from paceline_server.config import ServerConfig
from paceline_server.config_fields import config_fields
from paceline_server.settings import config_from_mapping, config_to_mapping, load_config
from paceline_simulator.arrivals import RecordedOrder, read_arrivals
from paceline_wire import codecs
from paceline_wire.errors import ConfigurationError, InvalidInputError
from paceline_wire.manifest import Manifest, TensorSpec
from paceline_wire.v1 import admin_pb2

_WORDS = re.compile(rb"[\w.]+|\"[^\"]*\"|\S")


def memory_folder() -> "tempfile.TemporaryDirectory[str]":
    """A temporary folder, in memory where the system has a place for that."""
    memory = Path("/dev/shm")  # noqa: S108  # tempfile makes a folder of its own in it
    return tempfile.TemporaryDirectory(prefix="paceline-fuzz-", dir=memory if memory.is_dir() else None)


def mutated_text(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """Text with some words changed for others, or changed as bytes."""
    words = list(_WORDS.finditer(data))
    if not words or rng.random() < 0.3:
        return mutated_bytes(rng, data, other)
    word = rng.choice(words)
    donors = _WORDS.findall(other)
    new = rng.choice(
        (
            str(rng.choice((*INTEGERS, *FLOATS))).encode(),
            f'"{rng.choice(TEXTS)}"'.encode(),
            rng.choice(donors) if donors else b"",
            rng.choice((b"true", b"[]", b"{}", b"[[1]]", b"", b"=", b"1979-05-27", b"-1", b"inf", b"nan")),
            rng.choice(list(config_fields())).encode(),
        )
    )
    return data[: word.start()] + new + data[word.end() :]


class ConfigTarget(Target):
    """`load_config` from a file, from the environment, from flags: one configuration, or sentences."""

    name: ClassVar[str] = "config"
    inputs: ClassVar[int] = 40_000
    errors = (ConfigurationError,)

    def __init__(self) -> None:
        self._folder = memory_folder()
        self._file = Path(self._folder.name) / "run.toml"

    def seeds(self) -> Sequence[bytes]:
        """A file, variables and flags that set most fields."""
        fields = [field for field in config_fields().values() if field.default is not None and not field.is_secret]
        file = ['listen = "0.0.0.0:7070"', "shards = 2"]
        for section in ("outer", "schedule", "exchange", "guard", "storage"):
            inside = [field for field in fields if field.path.startswith(f"{section}.")]
            file += [f"[{section}]", *(f"{field.path.partition('.')[2]} = {field.default}" for field in inside)]
        variables = [f"{field.variable}={(field.default or '').strip(chr(34))}" for field in fields]
        flags = [f"{field.path}={(field.default or '').strip(chr(34))}" for field in fields]
        texts = ("\n".join(file), "\n".join(variables), "\n".join(flags), "[outer]\nlr = 0.7\n[schedule]\nquota = 4")
        return [bytes([number % 3]) + text.encode() for number, text in enumerate(texts)]

    def mutated(self, rng: random.Random, data: bytes, other: bytes) -> bytes:
        """Word by word."""
        return data[:1] + mutated_text(rng, data[1:], other[1:])

    def run(self, data: bytes) -> str:
        """Read it, and read again what it says."""
        kind, text = (data[0] if data else 0) % 3, data[1:]
        if kind == 0:
            self._file.write_bytes(text)
            config = load_config(self._file, {}, {})
        else:
            pairs = (line.partition("=") for line in text.decode(errors="replace").splitlines())
            given = {name: value for name, _, value in pairs}
            config = load_config(None, given, {}) if kind == 1 else load_config(None, {}, given)
        if config_from_mapping(config_to_mapping(config)) != config:
            raise ViolationError("written and read, the configuration is another")
        return f"{('file', 'variables', 'flags')[kind]}: {_changed(config)}"

    def finish(self) -> None:
        """Remove the file."""
        self._folder.cleanup()


def _changed(config: ServerConfig) -> str:
    return " ".join(sorted(name for name in ServerConfig.model_fields if name in config.model_fields_set))


class TokensTarget(Target):
    """A token file: every token can travel in a header, or the server does not start."""

    name: ClassVar[str] = "tokens"
    inputs: ClassVar[int] = 40_000
    errors = (ConfigurationError,)

    def __init__(self) -> None:
        self._folder = memory_folder()
        self._file = Path(self._folder.name) / "tokens"

    def seeds(self) -> Sequence[bytes]:
        """Files of a few lines."""
        return [b"secret\n", b"# comment\n\none\r\ntwo\n", "ä\n".encode(), b"\xff\xfe\x00", b"one two\n", b""]

    def run(self, data: bytes) -> str:
        """Start with it."""
        self._file.write_bytes(data)
        config = config_from_mapping({"security": {"token_file": str(self._file)}})
        tokens = config.security.accepted_tokens()
        if not tokens or not all(token and all("!" <= letter <= "~" for letter in token) for token in tokens):
            raise ViolationError("a token is accepted that cannot be one")
        return f"{min(len(tokens), 3)} tokens"

    def finish(self) -> None:
        """Remove the file."""
        self._folder.cleanup()


class ArrivalsTarget(Target):
    """A file of arrivals, as the simulator replays it."""

    name: ClassVar[str] = "arrivals"
    inputs: ClassVar[int] = 40_000
    errors = (InvalidInputError,)

    def __init__(self) -> None:
        self._folder = memory_folder()
        self._file = Path(self._folder.name) / "arrivals.jsonl"

    def seeds(self) -> Sequence[bytes]:
        """Two lines."""
        line = {"time_s": 1.5, "fragment": 0, "worker": "a", "incarnation": 7, "seq": 1, "base_bin": 0}
        return [
            b"".join(json.dumps({**line, "outcome": outcome}).encode() + b"\n" for outcome in ("applied", "duplicate"))
        ]

    def mutated(self, rng: random.Random, data: bytes, other: bytes) -> bytes:
        """A line's values, or its bytes."""
        lines = data.split(b"\n")
        at = rng.randrange(len(lines))
        lines[at] = mutated_json(rng, lines[at], other.split(b"\n")[0])
        return b"\n".join(lines)

    def run(self, data: bytes) -> str:
        """Read it, and ask whose turn it is."""
        self._file.write_bytes(data)
        arrivals = read_arrivals(self._file)
        order = RecordedOrder(arrivals)
        return f"{min(len(arrivals), 3)} arrivals, {order.turn(0) is not None}"

    def finish(self) -> None:
        """Remove the file."""
        self._folder.cleanup()


class AuditTarget(Target):
    """An audit log: damaged lines are left out, and what is read can be sent."""

    name: ClassVar[str] = "audit"
    inputs: ClassVar[int] = 20_000

    def __init__(self) -> None:
        self._folder = memory_folder()
        self._file = Path(self._folder.name) / "audit.jsonl"
        self._loop = asyncio.new_event_loop()
        logging.getLogger("paceline_server.audit").addFilter(_silent)

    def seeds(self) -> Sequence[bytes]:
        """Two entries."""
        entry = AuditEntry(time=utc_now(), shard=0, who="a", peer="ipv4:192.0.2.7:1", act="evict", result="done")
        return [2 * (json.dumps(vars(entry)).encode() + b"\n")]

    def mutated(self, rng: random.Random, data: bytes, other: bytes) -> bytes:
        """A line's values, or its bytes."""
        lines = data.split(b"\n")
        at = rng.randrange(len(lines))
        lines[at] = mutated_json(rng, lines[at], other.split(b"\n")[0])
        return b"\n".join(lines)

    def run(self, data: bytes) -> str:
        """Read it, and write what was read into messages."""
        self._file.write_bytes(data)
        entries = self._loop.run_until_complete(AuditLog(self._file).newest(9))
        for entry in entries:
            said = {name: value for name, value in vars(entry).items() if name not in ("time", "shard")}
            admin_pb2.AuditEntry(time_us=entry.time_us, **said).SerializeToString()
        return " ".join(sorted({entry.act if entry.act.isalpha() else "other" for entry in entries})) or "none"

    def finish(self) -> None:
        """Remove the file."""
        logging.getLogger("paceline_server.audit").removeFilter(_silent)
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()
        self._folder.cleanup()


def _silent(_record: logging.LogRecord) -> bool:
    return False


_MANIFEST = Manifest.of([TensorSpec(name="x", shape=(300,), dtype="float32", role="parameter")], 256)
_MOST = (1 << 64) - 1


class WorkerStateTarget(Target):
    """A worker's saved state: what is taken fits the run, so that nothing breaks later in the middle of training."""

    name: ClassVar[str] = "worker-state"
    inputs: ClassVar[int] = 60_000
    errors = (InvalidInputError,)

    def seeds(self) -> Sequence[bytes]:
        """States with pushes in flight and without; a tensor is {"tensor": [dtype, shape]}."""
        return [json.dumps(_as_json(_saved(pushes).to_dict())).encode() for pushes in (0, 2)]

    def mutated(self, rng: random.Random, data: bytes, other: bytes) -> bytes:
        """Node by node."""
        return mutated_json(rng, data, other)

    def run(self, data: bytes) -> str:
        """Take it up, as a worker of the run would."""
        try:
            state = _from_json(json.loads(data))
        except (ValueError, RecursionError):
            return "no JSON"
        if not isinstance(state, Mapping):
            return "no mapping"
        saved = SavedWorker.from_dict(state)
        saved.require(worker_id="a", manifest=_MANIFEST, initialization_id=7)
        stale = staleness(saved, [Progress(seq=2), Progress(seq=2)])
        for fragment, plan in zip(saved.fragments, _MANIFEST.fragments, strict=True):
            _require_fits(saved, fragment, plan.num_elements)
        return f"taken, stale: {stale}"


def _require_fits(saved: SavedWorker, fragment: SavedFragment, num_elements: int) -> None:
    sizes = (num_elements, 2 * num_elements)
    vectors = [fragment.residual, *(push.residual for push in fragment.pushes)]
    if any(vector is not None and vector.numel() not in sizes for vector in vectors):
        raise ViolationError("a residual of another size is taken")
    vectors = [fragment.velocity, *(push.expected for push in fragment.pushes)]
    if any(vector is not None and vector.numel() != num_elements for vector in vectors):
        raise ViolationError("a velocity or expectation of another size is taken")
    payload_sizes = [codecs.codec(saved.uplink).encoded_bytes(size) for size in sizes]
    if any(push.payload.numel() not in payload_sizes for push in fragment.pushes):
        raise ViolationError("a payload of another size is taken")
    numbers = [saved.incarnation, *(number for push in fragment.pushes for number in (push.seq, push.base_bin))]
    if not all(0 <= number <= _MOST for number in (*numbers, fragment.seq)):
        raise ViolationError("a number is taken that cannot travel")


def _saved(num_pushes: int) -> SavedWorker:
    codec = codecs.codec("int4")
    fragments = [
        SavedFragment(
            start=torch.zeros(plan.num_elements),
            values=torch.zeros(plan.num_elements),
            seq=num_pushes,
            residual=torch.zeros(plan.num_elements) if num_pushes else None,
            velocity=torch.zeros(plan.num_elements) if num_pushes else None,
            pushes=[
                SavedPush(
                    seq=number + 1,
                    base_bin=0,
                    tokens=None,
                    payload=torch.zeros(codec.encoded_bytes(plan.num_elements), dtype=torch.uint8),
                    residual=torch.zeros(plan.num_elements),
                    expected=None,
                )
                for number in range(num_pushes)
            ],
        )
        for plan in _MANIFEST.fragments
    ]
    return SavedWorker(
        worker_id="a",
        incarnation=1,
        manifest=_MANIFEST.digest,
        initialization_id=7,
        uplink="int4",
        round=3,
        steps_in_round=1,
        tokens=None,
        fragments=fragments,
    )


def _as_json(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return {"tensor": [str(value.dtype).removeprefix("torch."), list(value.shape)]}
    if isinstance(value, Mapping):
        return {key: _as_json(inner) for key, inner in value.items()}
    return [_as_json(inner) for inner in value] if isinstance(value, list) else value


def _from_json(value: Any) -> Any:
    if isinstance(value, dict) and set(value) == {"tensor"}:
        return _tensor(value["tensor"])
    if isinstance(value, dict):
        return {key: _from_json(inner) for key, inner in value.items()}
    return [_from_json(inner) for inner in value] if isinstance(value, list) else value


def _tensor(said: Any) -> Any:
    """A tensor of a type and shape, if they are such; else what is there instead."""
    dtypes = {"float32": torch.float32, "uint8": torch.uint8, "int64": torch.int64, "float64": torch.float64}
    if not isinstance(said, list) or len(said) != 2 or not isinstance(said[0], str) or not isinstance(said[1], list):
        return said
    shape = [extent for extent in said[1] if type(extent) is int and 0 <= extent < 1000][:3]
    return torch.zeros(shape, dtype=dtypes.get(said[0], torch.float16))
