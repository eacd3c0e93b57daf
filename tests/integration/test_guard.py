"""Pushes out of all proportion, and workers that send unusable ones round after round, over real sockets."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import safetensors
import torch

import paceline_server
from integration.patience import PATIENCE_S, wait_until
from integration.raw import RawStream, RawWorker, ended
from paceline_wire.v1 import parameter_server_pb2 as pb

FRAGMENT = 256
ENOUGH = 8
"""Pushes after which outliers are known as such."""


def config(kind: str = "async", rule: str = "ormo", **guard: float) -> dict[str, Any]:
    """A run of fragments of 256 elements."""
    return {
        "outer": {"rule": rule},
        "schedule": {"kind": kind, "lease_s": 3600},
        "exchange": {
            "uplink": "fp32",
            "downlink": "fp32",
            "fragment_elements": FRAGMENT,
            "dynamic_inner_steps": False,
        },
        "guard": guard,
    }


def initialize(raw: RawWorker) -> None:
    """Give the run a fragment of parameters, and one of buffers."""
    tensors = [
        pb.Tensor(name=name, shape=[FRAGMENT], dtype=pb.DTYPE_FLOAT32, role=role)
        for name, role in (("a", pb.ROLE_PARAMETER), ("b", pb.ROLE_AVERAGED))
    ]
    manifest = pb.Manifest(tensors=tensors, fragment_elements=FRAGMENT)
    raw.initialize(manifest, {index: torch.linspace(-1, 1, FRAGMENT) for index in (0, 1)})


def push_rounds(stream: RawStream, values: torch.Tensor, fragment: int, first: int, last: int) -> int:
    """Push the rounds first to last, each based on the answer before; returns the newest bin."""
    base_bin = 0
    for seq in range(first, last + 1):
        stream.push(fragment, seq, base_bin, values)
        update, _ = stream.update()
        assert not update.HasField("refusal"), update.refusal
        base_bin = update.bin
    return base_bin


# --- Outliers.


@pytest.mark.parametrize(("rule", "fragment", "elements"), [("ormo", 0, 256), ("ormo", 1, 256), ("orlomo", 0, 512)])
def test_an_outlier_is_refused_and_changes_nothing(rule: str, fragment: int, elements: int) -> None:
    """A push of a parameter, a buffer, or with its momentum behind, is refused by its norm; all others go on."""
    usual, large = torch.full((elements,), 0.01), torch.full((elements,), 0.01)
    large[-1] = 1e6
    with (
        paceline_server.local(config(rule=rule)) as address,
        RawWorker(address, "sound") as sound,
        RawWorker(address, "odd") as odd,
    ):
        initialize(sound)
        sound.join()
        odd.join()
        with sound.exchange() as stream, odd.exchange() as odd_stream:
            base_bin = push_rounds(stream, usual, fragment, 1, ENOUGH)
            before = sound.fetch(fragment)
            odd_stream.push(fragment, 1, base_bin, large)
            update, values = odd_stream.update()
            pattern = rf"fragment {fragment} .* norm 1e\+06 .* last 8 pushes .* 20 times .* go on from the parameters"
            assert re.search(pattern, update.refusal)
            assert torch.equal(values, before[1])
            assert torch.equal(sound.fetch(fragment)[1], before[1])
            odd_stream.push(fragment, 2, update.bin, usual)
            assert not odd_stream.update()[0].HasField("refusal")
            push_rounds(stream, usual, fragment, ENOUGH + 1, ENOUGH + 1)
            status = sound.status()
        assert (status.pushes_applied, status.pushes_refused, status.pushes_outlying) == (ENOUGH + 2, 1, 1)
        assert {member.worker_id: member.pushes_refused for member in status.members} == {"sound": 0, "odd": 1}


def test_with_the_guard_off_an_outlier_is_applied() -> None:
    """guard.refuse_outliers = false takes whatever is finite."""
    with (
        paceline_server.local(config(refuse_outliers=False)) as address,
        RawWorker(address) as raw,
    ):
        initialize(raw)
        raw.join()
        with raw.exchange() as stream:
            push_rounds(stream, torch.full((FRAGMENT,), 0.01), 0, 1, ENOUGH)
            push_rounds(stream, torch.full((FRAGMENT,), 1e6), 0, ENOUGH + 1, ENOUGH + 1)


# --- Quarantine.


@pytest.fixture
def address() -> Iterator[str]:
    """A barrier, which waits for every member."""
    with paceline_server.local(config("barrier", quarantine_s=3600)) as found:
        with RawWorker(found) as raw:
            initialize(raw)
        yield found


DENIED = grpc.StatusCode.PERMISSION_DENIED


def test_a_worker_whose_rounds_are_unusable_is_put_in_quarantine(address: str) -> None:
    """Its stream ends, it is turned away under any incarnation, and the barrier no longer waits for it."""
    with (
        RawWorker(address, "sound") as sound,
        RawWorker(address, "broken") as broken,
        RawWorker(address, "broken") as restarted,
    ):
        sound.join()
        broken.join()
        bad, good = torch.full((FRAGMENT,), torch.nan), torch.full((FRAGMENT,), 0.01)
        with sound.exchange() as stream, broken.exchange() as broken_stream:
            base_bin = 0
            for seq in (1, 2):
                broken_stream.push(0, seq, base_bin, bad)
                stream.push(0, seq, base_bin, good)
                update, values = stream.update()
                assert update.quota == 2
                assert torch.isfinite(values).all()
                assert "infinite or NaN" in broken_stream.update()[0].refusal
                base_bin = update.bin
            stream.push(0, 3, base_bin, good)
            broken_stream.push(0, 3, base_bin, bad)
            end = broken_stream.last()
            assert (end.error, end.code) == ("QuarantinedError", DENIED)
            sentence = r"'broken' is in quarantine for 3[56]\d\d s more: .* not finite in 3 rounds in a row\. .* anew"
            assert re.search(sentence, end.details), end.details
            update, _ = stream.update()
            assert update.quota == 1
            for seq in (4, 5):
                stream.push(0, seq, update.bin, good)
                update, _ = stream.update()
                assert not update.HasField("refusal")
        for raw in (broken, restarted):
            for call in (raw.join, raw.heartbeat):
                with pytest.raises(grpc.RpcError) as refused:
                    call()
                assert ended(refused.value).error == "QuarantinedError"
            with raw.exchange() as refused_stream:
                assert refused_stream.end().code is DENIED
        status = sound.status()
        assert [member.worker_id for member in status.members] == ["sound"]
        (held,) = status.quarantined
        assert held.worker_id == "broken"
        assert 3000_000 < held.remaining_ms <= 3600_000
        command = [sys.executable, "-m", "paceline", "status", address]
        shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=PATIENCE_S).stdout
        assert re.search(r"in quarantine for \d+ s more: worker broken: .* in 3 rounds in a row", shown)
        assert re.search(r"worker 0 sound: .* 0 refused, silent for .* of 3600.0 s", shown)


def test_a_quarantine_ends_by_itself() -> None:
    """When its time has passed, the worker may join again, and its pushes count."""
    with paceline_server.local(config(quarantine_s=0.5, quarantine_rounds=1)) as address, RawWorker(address) as raw:
        initialize(raw)
        raw.join()
        with raw.exchange() as stream:
            stream.push(0, 1, 0, torch.full((FRAGMENT,), torch.nan))
            assert stream.last().error == "QuarantinedError"

        def joined() -> bool:
            try:
                raw.join()
            except grpc.RpcError as error:
                if ended(error).error != "QuarantinedError":
                    raise
                return False
            return True

        assert not joined()
        wait_until(joined)
        with raw.exchange() as stream:
            stream.push(0, 1, 0, torch.full((FRAGMENT,), torch.nan))
            assert "infinite or NaN" in stream.update()[0].refusal, "what was decided stays decided"
            stream.push(0, 2, 0, torch.ones(FRAGMENT))
            assert not stream.update()[0].HasField("refusal")
        assert not raw.status().quarantined


# --- What is kept.


def metadata_of(path: Path) -> dict[str, str]:
    """What a safetensors file says of itself."""
    opened: Any = safetensors.safe_open(path, framework="pt")
    found: dict[str, str] = opened.metadata()
    return found


def test_the_measure_the_evidence_and_a_quarantine_outlive_the_server(tmp_path: Path) -> None:
    """After each restart outliers are known as before, refused pushes are there, and a quarantine goes on."""
    durable = {**config(quarantine_s=3600), "storage": {"data_dir": str(tmp_path)}}
    usual, large, bad = (torch.full((FRAGMENT,), value) for value in (0.01, 1e6, torch.nan))
    with paceline_server.local(durable) as address, RawWorker(address, "a") as raw:
        initialize(raw)
        raw.join()
        with raw.exchange() as stream:
            push_rounds(stream, usual, 0, 1, ENOUGH)
    with paceline_server.local(durable) as address, RawWorker(address, "a") as raw:
        raw.join()
        with raw.exchange() as stream:
            stream.push(0, 1, 0, large)
            assert "out of all proportion" in stream.update()[0].refusal
            for seq in (2, 3):
                stream.push(0, seq, 0, bad)
            assert stream.last().error == "QuarantinedError"
    files = sorted((tmp_path / "shard-0" / "evidence").iterdir())
    metadata = [metadata_of(path) for path in files]
    assert [(one["worker"], one["seq"], one["codec"], "norm" in one) for one in metadata] == [
        ("a", "1", "fp32", True),
        ("a", "2", "fp32", False),
        ("a", "3", "fp32", False),
    ]
    assert float(metadata[0]["norm"]) == pytest.approx(16e6)
    assert float(metadata[0]["median"]) == pytest.approx(0.16)
    with paceline_server.local(durable) as address, RawWorker(address, "a") as raw:
        with pytest.raises(grpc.RpcError) as refused:
            raw.join()
        assert ended(refused.value).error == "QuarantinedError"
        (held,) = raw.status().quarantined
        assert held.worker_id == "a"
        assert "3 rounds in a row" in held.reason
