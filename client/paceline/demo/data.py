"""What the demo learns from: the source of Python's own standard library, as bytes, with whole files held out."""

import hashlib
import os
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

EXCLUDED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})
"""Folders that are not the library: other people's packages, and tests (not every system installs them)."""
EXCLUDED_PACKAGES = frozenset({"encodings", "pydoc_data"})
"""Packages that are tables and prose in the form of Python; a model would learn them instead of code."""
HELD_OUT_SHARE = 1 / 16
"""Share of the files that no worker trains on."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """All bytes there are, split by file."""

    train: Tensor
    """uint8 [bytes]: the training files, one after the other in the order of their paths."""
    held_out: Tensor
    """uint8 [bytes]: the files that are only evaluated on, likewise."""
    train_files: tuple[str, ...]
    """Paths relative to the library's root, with forward slashes, sorted."""
    held_out_files: tuple[str, ...]
    """Likewise, of the files held out."""


def is_held_out(relative_path: str) -> bool:
    """Decide by the path alone, so that every process on every machine splits the same files alike."""
    digest = hashlib.sha256(relative_path.encode()).digest()
    return int.from_bytes(digest[:8], "big") < HELD_OUT_SHARE * 2**64


def library_files(root: Path) -> list[str]:
    """List the library's own `*.py` files below `root` as relative paths with forward slashes, sorted."""
    found = []
    for folder, subfolders, names in os.walk(root):
        at_root = Path(folder) == root
        excluded = EXCLUDED_FOLDERS | EXCLUDED_PACKAGES if at_root else EXCLUDED_FOLDERS
        subfolders[:] = set(subfolders) - excluded  # not entered at all: site-packages may be huge
        found += [(Path(folder) / name).relative_to(root).as_posix() for name in names if name.endswith(".py")]
    return sorted(found)


def load_corpus(root: Path | None = None) -> Corpus:
    """Read the corpus.

    Args:
        root: The folder to read; left out, the standard library of the Python that runs this.

    Returns:
        The corpus; both sides of the split hold at least one byte.

    Raises:
        FileNotFoundError: `root` holds too little Python source to train on.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    files = library_files(root)
    held_out_files = tuple(path for path in files if is_held_out(path))
    train_files = tuple(path for path in files if not is_held_out(path))
    train, held_out = _read(root, train_files), _read(root, held_out_files)
    if not len(train) or not len(held_out):
        raise FileNotFoundError(f"{root} holds no Python source to train on: {len(files)} files")
    return Corpus(train=train, held_out=held_out, train_files=train_files, held_out_files=held_out_files)


def sample_batch(data: Tensor, batch_size: int, context: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw sequences from anywhere in `data`.

    Args:
        data: uint8 [bytes].
        batch_size: Sequences to draw.
        context: Bytes per sequence.
        generator: The source of chance; the only one.

    Returns:
        Inputs and targets, int64 [batch_size, context]; a target is the byte after its input.
    """
    starts = torch.randint(len(data) - context, (batch_size, 1), generator=generator)
    windows = data[starts + torch.arange(context + 1)].long()
    return windows[:, :-1], windows[:, 1:]


def held_out_batch(corpus: Corpus, num_sequences: int, context: int) -> tuple[Tensor, Tensor]:
    """Cut the fixed sequences that every evaluation uses, evenly spread over the held-out files.

    Args:
        corpus: The corpus.
        num_sequences: Sequences to cut.
        context: Bytes per sequence.

    Returns:
        Inputs and targets as `sample_batch` returns them; the same ones whenever it is called.
    """
    last_start = len(corpus.held_out) - context - 1
    starts = torch.linspace(0, last_start, num_sequences).long()[:, None]
    windows = corpus.held_out[starts + torch.arange(context + 1)].long()
    return windows[:, :-1], windows[:, 1:]


def _read(root: Path, relative_paths: tuple[str, ...]) -> Tensor:
    content = b"".join((root / path).read_bytes() for path in relative_paths)
    return torch.from_numpy(np.frombuffer(content, dtype=np.uint8).copy())
