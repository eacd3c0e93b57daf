"""A run's parameters out of its data directory, for `paceline export`."""

from contextlib import ExitStack
from pathlib import Path

import torch

from paceline_server.storage.directory import shard_directories
from paceline_server.storage.recovery import recover
from paceline_wire.errors import NotInitializedError
from paceline_wire.manifest import Manifest


def read_parameters(data_dir: Path) -> tuple[Manifest, dict[str, torch.Tensor]]:
    """Read what workers would be sent, as the journal has it; the directory is not changed.

    Args:
        data_dir: The data directory of all shards of the run.

    Returns:
        The run's manifest, and every tensor by name, float32.

    Raises:
        StorageError: The directory is damaged or in use by a server; the text says what can be done.
        NotInitializedError: The run has no parameters yet.
    """
    with ExitStack() as held:
        directories = shard_directories(data_dir)
        for directory in directories:
            held.enter_context(directory.locked())
        shards = [recover(directory).shard for directory in directories]
    manifest = shards[0].manifest
    if manifest is None or not all(shard.initialized for shard in shards):
        raise NotInitializedError(f"the run in {data_dir} has no parameters yet")
    tensors = {spec.name: torch.empty(spec.shape) for spec in manifest.tensors}
    for plan in manifest.fragments:
        _, values = shards[plan.index % len(shards)].hosted(plan.index)
        published = values.published()
        for part in plan.segments:
            flat = tensors[part.tensor].view(-1)
            piece = published[part.fragment_start : part.fragment_start + part.length]
            flat[part.tensor_start : part.tensor_start + part.length] = piece
    return manifest, tensors
