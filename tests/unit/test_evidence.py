"""Refused pushes that are kept aside: real files with all that is known, bounded, and harmless when the disk is not."""

import asyncio
import logging
from pathlib import Path

import pytest
import safetensors
import torch

from paceline_server.evidence import Evidence, EvidenceDirectory
from paceline_wire import codecs
from support_core import normal

VALUES = normal(600, 1)


def evidence(seq: int, worker: str = "a", norm: float | None = 41.5) -> Evidence:
    """A refused push in int8."""
    codec = codecs.codec("int8")
    return Evidence(
        worker=worker,
        incarnation=9,
        fragment=3,
        seq=seq,
        problem="its norm is too large",
        codec=codec.name,
        payload=codecs.encode(codec, VALUES),
        norm=norm,
        median=None if norm is None else 2.5,
    )


def keep(keeper: EvidenceDirectory, refused: Evidence) -> None:
    """Let evidence be kept."""
    asyncio.run(keeper.keep(refused))


def read(path: Path) -> tuple[dict[str, str], torch.Tensor]:
    """What a file says, and the payload in it."""
    with safetensors.safe_open(path, framework="pt") as file:
        return file.metadata(), file.get_tensor("payload")


def test_a_file_says_all_that_is_known(tmp_path: Path) -> None:
    """The payload can be decoded again, and the metadata tells whose push it was and why it was refused."""
    keeper = EvidenceDirectory(tmp_path / "shard-0" / "evidence")
    keep(keeper, evidence(5))
    (path,) = (tmp_path / "shard-0" / "evidence").iterdir()
    metadata, payload = read(path)
    assert metadata == {
        "worker": "a",
        "incarnation": "9",
        "fragment": "3",
        "seq": "5",
        "problem": "its norm is too large",
        "codec": "int8",
        "norm": "41.5",
        "median": "2.5",
    }
    codec = codecs.codec("int8")
    assert torch.equal(codecs.decode(codec, payload, 600), codecs.decode(codec, evidence(5).payload, 600))


def test_the_latest_are_kept(tmp_path: Path) -> None:
    """So many files and no more, in order, also after a restart; what somebody else put there stays."""
    (tmp_path / "notes.txt").write_text("mine")
    for first in (1, 5):
        keeper = EvidenceDirectory(tmp_path, most=3)
        for seq in range(first, first + 4):
            keep(keeper, evidence(seq, norm=None))
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [path.name for path in files] == [f"push-{number:08d}.safetensors" for number in (6, 7, 8)]
    assert [read(path)[0]["seq"] for path in files] == ["6", "7", "8"]
    assert "norm" not in read(files[0])[0]
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt", *(path.name for path in files)}


def test_a_workers_name_is_no_path(tmp_path: Path) -> None:
    """A name full of dots and separators ends in the metadata and nowhere else."""
    name = "../../etc:passwd"
    keep(EvidenceDirectory(tmp_path / "evidence"), evidence(1, worker=name))
    assert [path.name for path in tmp_path.iterdir()] == ["evidence"]
    (path,) = (tmp_path / "evidence").iterdir()
    assert read(path)[0]["worker"] == name


def test_a_disk_that_fails_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is raised, one line is logged, and when the disk is well again files are kept again."""
    place = tmp_path / "evidence"
    place.write_text("a file where the directory should be")
    keeper = EvidenceDirectory(place)
    with caplog.at_level(logging.ERROR):
        for seq in (1, 2, 3):
            keep(keeper, evidence(seq))
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "cannot be kept" in caplog.text
    place.unlink()
    keep(keeper, evidence(4))
    assert len(list(place.iterdir())) == 1
