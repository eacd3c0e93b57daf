"""What the tasks learn from: the standard library's source and Fashion-MNIST, each with validation and test parts."""

import gzip
import hashlib
import os
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from paceline.demo.data import is_held_out, library_files

Part = Literal["validation", "test"]
"""What is evaluated on: settings are chosen on the one, and results reported on the other."""

FASHION_MNIST_VARIABLE = "FASHION_MNIST_DIR"
FASHION_MNIST_FOLDER = Path("/usr/share/datasets/fashion-mnist")
NUM_VALIDATION_IMAGES = 5_000
"""The last of the 60,000 training images; they are in no order."""

_IDX_UINT8 = 0x08


@dataclass(frozen=True, kw_only=True)
class Text:
    """Source files, split by path alone, so that the same ones are on the same side everywhere."""

    train: dict[str, bytes]
    """Content by relative path, in the order of the paths: the demo's training files."""
    validation: dict[str, bytes]
    """Likewise: about half of the demo's held-out files."""
    test: dict[str, bytes]
    """Likewise: the other half."""


@dataclass(frozen=True, kw_only=True)
class Images:
    """Images and their classes; any sizes will do, Fashion-MNIST has 784 pixels and 10 classes."""

    train: Tensor
    """float32 [images, pixels], normalised: mean 0 and deviation 1 over all training pixels."""
    train_labels: Tensor
    """int64 [images], from 0."""
    validation: Tensor
    """float32 [images, pixels], normalised with the numbers of the training images."""
    validation_labels: Tensor
    """int64 [images]."""
    test: Tensor
    """float32 [images, pixels], likewise."""
    test_labels: Tensor
    """int64 [images]."""


def load_text(root: Path | None = None) -> Text:
    """Read the standard library's source.

    Args:
        root: The folder to read; left out, the standard library of the Python that runs this.

    Raises:
        FileNotFoundError: `root` holds too little Python source: one of the three sides would be empty.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    sides: dict[str, dict[str, bytes]] = {"train": {}, "validation": {}, "test": {}}
    for path in library_files(root):
        sides[_side(path)][path] = (root / path).read_bytes()
    if not all(any(files.values()) for files in sides.values()):
        raise FileNotFoundError(f"{root} holds too little Python source to train on and to evaluate")
    return Text(**sides)


def join_bytes(contents: Sequence[bytes]) -> Tensor:
    """Return the contents one after the other, uint8 [bytes]."""
    return torch.from_numpy(np.frombuffer(b"".join(contents), dtype=np.uint8).copy())


def divide_by_source(files: dict[str, bytes], num_workers: int) -> list[list[str]]:
    """Give each worker source files of its own, so that the workers' data differ in content.

    Files of one top-level package stay together, and a top-level module is a group of its own. A group with more than
    one worker's fair share of the bytes is first cut, in the order of its paths, into pieces of about that size. Then
    the groups go out, the largest first, each to the worker that has the fewest bytes so far.

    Args:
        files: Content by path.
        num_workers: Workers to divide the files among.

    Returns:
        The paths of each worker; together all paths, none twice.

    Raises:
        ValueError: There are not enough files for so many workers.
    """
    share = sum(map(len, files.values())) / num_workers
    groups: dict[str, list[list[str]]] = {}
    for path in sorted(files):
        pieces = groups.setdefault(path.partition("/")[0], [[]])
        if pieces[-1] and _num_bytes(pieces[-1], files) + len(files[path]) > share:
            pieces.append([])
        pieces[-1].append(path)
    pieces = sorted(
        (piece for group in groups.values() for piece in group), key=lambda piece: -_num_bytes(piece, files)
    )
    workers: list[list[str]] = [[] for _ in range(num_workers)]
    loads = [0] * num_workers
    for piece in pieces:
        least = loads.index(min(loads))
        workers[least] += piece
        loads[least] += _num_bytes(piece, files)
    if not min(loads):
        raise ValueError(f"{len(files)} files are not enough for {num_workers} workers with files of their own")
    return workers


def load_fashion_mnist(folder: Path | None = None) -> Images:
    """Read Fashion-MNIST: 55,000 training, 5,000 validation and 10,000 test images of 784 pixels.

    Args:
        folder: Where its four `*.gz` files are; left out, the folder that the variable FASHION_MNIST_DIR names, or
            else the one of Debian's package.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file isn't what its name says.
    """
    folder = folder or Path(os.environ.get(FASHION_MNIST_VARIABLE) or FASHION_MNIST_FOLDER)
    arrays = []
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        path = folder / f"{name}-ubyte.gz"
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing: install Debian's package dataset-fashion-mnist (apt-get install "
                f"dataset-fashion-mnist), or name the folder of its files in {FASHION_MNIST_VARIABLE}"
            )
        arrays.append(read_idx(path))
    return split_images(*arrays, num_validation=NUM_VALIDATION_IMAGES)


def split_images(
    images: np.ndarray, labels: np.ndarray, test_images: np.ndarray, test_labels: np.ndarray, *, num_validation: int
) -> Images:
    """Split off the validation part and normalise.

    Args:
        images: uint8 [images, ...] for training and validation, in no order.
        labels: uint8 [images].
        test_images: uint8 [test images, ...].
        test_labels: uint8 [test images].
        num_validation: How many of the last of `images` are for validation.
    """
    num_train = len(images) - num_validation
    pixels = torch.from_numpy(images.reshape(len(images), -1).astype(np.float32))
    test_pixels = torch.from_numpy(test_images.reshape(len(test_images), -1).astype(np.float32))
    deviation, mean = torch.std_mean(pixels[:num_train], correction=0)
    for block in (pixels, test_pixels):
        block.sub_(mean).div_(deviation)
    classes = torch.from_numpy(labels.astype(np.int64))
    return Images(
        train=pixels[:num_train],
        train_labels=classes[:num_train],
        validation=pixels[num_train:],
        validation_labels=classes[num_train:],
        test=test_pixels,
        test_labels=torch.from_numpy(test_labels.astype(np.int64)),
    )


def read_idx(path: Path) -> np.ndarray:
    """Read a gzip-compressed IDX file of bytes: uint8, of the shape that its header states.

    Raises:
        ValueError: The file is none.
    """
    content = gzip.decompress(path.read_bytes())
    num_dimensions = content[3] if len(content) > 3 else 0
    header = 4 + 4 * num_dimensions
    if content[:3] != bytes((0, 0, _IDX_UINT8)) or len(content) < header:
        raise ValueError(f"{path} is not an IDX file of bytes")
    shape = np.frombuffer(content, dtype=">u4", count=num_dimensions, offset=4).tolist()
    values = np.frombuffer(content, dtype=np.uint8, offset=header)
    if values.size != np.prod(shape):
        raise ValueError(f"{path} holds {values.size} values, and its header says {shape}")
    return values.reshape(shape)


def _side(path: str) -> str:
    if not is_held_out(path):
        return "train"
    digest = hashlib.sha256(f"validation:{path}".encode()).digest()
    return "validation" if digest[0] < 128 else "test"


def _num_bytes(paths: Sequence[str], files: dict[str, bytes]) -> int:
    return sum(len(files[path]) for path in paths)
