"""The demo's corpus: whole files held out, the same ones everywhere."""

from pathlib import Path

import pytest
import torch

from paceline.demo.data import (
    held_out_batch,
    is_held_out,
    library_files,
    load_corpus,
    sample_batch,
)

HELD_OUT_OF_A_HUNDRED = [f"module_{index}.py" for index in (5, 30, 38, 58, 60, 63, 68, 73)]
"""What SHA-256 says of module_0.py to module_99.py."""


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A folder of forty modules with distinct contents, and what must be left out."""
    for index in range(40):
        (tmp_path / f"module_{index}.py").write_text(f"# this is module {index}\nvalue = {index}\n")
    for left_out in ("site-packages/theirs.py", "email/tests/test_it.py", "encodings/table.py", "notes.txt"):
        path = tmp_path / left_out
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("not to be read\n")
    (tmp_path / "email" / "encodings.py").write_text("# a module, not the package of tables\n")
    return tmp_path


def test_files_are_the_librarys_own(library: Path) -> None:
    """Packages of others, tests, tables and other kinds of files are left out, and nothing else."""
    expected = sorted([*(f"module_{index}.py" for index in range(40)), "email/encodings.py"])
    assert expected == library_files(library)


def test_split_is_disjoint_and_complete(library: Path) -> None:
    """Every file is on exactly one side, and its bytes with it."""
    corpus = load_corpus(library)
    assert library_files(library) == sorted(corpus.train_files + corpus.held_out_files)
    assert set(corpus.train_files).isdisjoint(corpus.held_out_files)
    assert bytes(corpus.held_out.tolist()) == b"".join((library / path).read_bytes() for path in corpus.held_out_files)
    assert bytes(corpus.train.tolist()) == b"".join((library / path).read_bytes() for path in corpus.train_files)


def test_split_depends_on_the_path_alone() -> None:
    """The choice is a fixed function of the path: stored results, so that no machine or version differs."""
    held_out = [f"module_{index}.py" for index in range(100) if is_held_out(f"module_{index}.py")]
    assert held_out == HELD_OUT_OF_A_HUNDRED


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    """A folder without Python source cannot be trained on, and the message names it."""
    with pytest.raises(FileNotFoundError, match="no Python source"):
        load_corpus(tmp_path)


def test_targets_are_the_next_bytes() -> None:
    """A batch's targets are its inputs shifted by one, and the generator alone decides what is drawn."""
    data = torch.arange(200, dtype=torch.uint8)
    inputs, targets = sample_batch(data, 3, 16, torch.Generator().manual_seed(5))
    assert (3, 16) == inputs.shape == targets.shape
    assert torch.equal(inputs + 1, targets)
    again, _ = sample_batch(data, 3, 16, torch.Generator().manual_seed(5))
    assert torch.equal(inputs, again)


def test_every_evaluation_sees_the_same_held_out_text(library: Path) -> None:
    """Evaluation sequences are fixed, from the held-out files only, and reach from their start to their end."""
    corpus = load_corpus(library)
    inputs, targets = held_out_batch(corpus, 5, 8)
    again, _ = held_out_batch(load_corpus(library), 5, 8)
    assert torch.equal(inputs, again)
    assert torch.equal(corpus.held_out[:8].long(), inputs[0])
    assert torch.equal(corpus.held_out[-8:].long(), targets[-1])
