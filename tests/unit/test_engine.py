"""The engine keeps what takes long away from the event loop."""

import threading

import pytest

from paceline_server.config import ServerConfig
from paceline_server.construction import build_shard
from paceline_server.engine import Engine
from paceline_server.journal import NoJournal
from paceline_wire import manifest as manifests
from paceline_wire.errors import InvalidInputError
from paceline_wire.manifest import MAX_FRAGMENTS, Manifest, TensorSpec
from paceline_wire.v1 import parameter_server_pb2 as pb


async def test_a_manifest_is_read_and_planned_beside_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have a million tensors, and a plan of more fragments than anybody wants to wait for."""
    engine = Engine(build_shard(ServerConfig(), 0), NoJournal())
    readers = []
    read = manifests._tensor_from_wire

    def noted(message: pb.Tensor) -> TensorSpec:
        readers.append(threading.current_thread())
        return read(message)

    monkeypatch.setattr(manifests, "_tensor_from_wire", noted)
    written = Manifest.of([TensorSpec(name="x", shape=(600,), dtype="float32", role="parameter")], 256).to_wire()
    manifest = await engine.read_manifest(written)
    assert len(vars(manifest)["fragments"]) == 3
    assert readers
    assert threading.main_thread() not in readers
    await engine.finish()


def test_a_manifest_cannot_ask_for_endless_fragments() -> None:
    """A line of a message is refused that would cut the run into more than a shard can plan in a moment."""
    most = TensorSpec(name="x", shape=(MAX_FRAGMENTS * 256,), dtype="float32", role="parameter")
    Manifest.of([most], 256)
    with pytest.raises(InvalidInputError, match=r"raise exchange\.fragment_elements"):
        Manifest.of([TensorSpec(name="x", shape=(MAX_FRAGMENTS * 256 + 1,), dtype="float32", role="parameter")], 256)
