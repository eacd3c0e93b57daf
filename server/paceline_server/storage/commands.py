"""The commands that work on a stopped server's data directory: repair, reshard.

torch is imported by the functions that need it: `paceline --help` loads this module too.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from paceline_server.storage.repair import Examination, Part

_DATA_DIR = click.Path(exists=True, file_okay=False, path_type=Path)


@click.command()
@click.argument("data_dir", type=_DATA_DIR)
@click.option("--restore", "restores", is_flag=True, help="Go back to the last good point.")
@click.option("as_json", "--json", is_flag=True, help="Print one JSON object.")
def repair(data_dir: Path, restores: bool, as_json: bool) -> None:
    """Show what is wrong with the run in DATA_DIR, and with --restore go back to its last good point.

    The server must be stopped. Without --restore nothing is changed, and exit code 1 means that something is wrong.
    With it, what does not fit any more is set aside in the folder `damaged`; nothing is deleted.
    """
    from paceline_server.storage.directory import shard_directories
    from paceline_server.storage.repair import examine, restore

    examinations = []
    for directory in shard_directories(data_dir):
        with directory.locked():
            found = examine(directory)
            examinations.append(found)
            if not as_json:
                click.echo(_examination_text(directory.index, found))
            if restores and found.problem is not None:
                recovered = restore(directory, found)
                if not as_json:
                    click.echo(
                        f"  restored to record {recovered.newest_record}; everything else is in {directory.damaged}"
                    )
    if as_json:
        click.echo(json.dumps({"restored": restores, "shards": [_as_mapping(found) for found in examinations]}))
    if not restores and any(found.problem for found in examinations):
        sys.exit(1)


@click.command()
@click.argument("source", type=_DATA_DIR)
@click.argument("target", type=click.Path(file_okay=False, path_type=Path))
@click.option("--shards", type=click.IntRange(min=1), required=True, help="Shards that the run will have.")
@click.option("as_json", "--json", is_flag=True, help="Print one JSON object.")
def reshard(source: Path, target: Path, shards: int, as_json: bool) -> None:
    """Divide the stopped run in SOURCE among another number of shards, in the new directory TARGET.

    Parameters, momentum, bins and sequence numbers move as they are; workers go on where they were. SOURCE stays
    as it is.
    """
    from paceline_server.storage.reshard import reshard as divide

    counts = divide(source, target, shards)
    if as_json:
        click.echo(json.dumps({"target": str(target), "fragments": counts}))
        return
    click.echo(f"wrote {len(counts)} shards with {', '.join(map(str, counts))} fragments to {target}")
    click.echo(f"start with: paceline serve --shards {shards} --storage.data-dir {target} ...")
    click.echo("or, where every shard has a data directory of its own, move its folder shard-N into that")


def _examination_text(index: int, found: "Examination") -> str:
    lines = [f"shard {index}:"]
    lines += [f"  snapshot at record {part.first}: {_state(part)}" for part in found.snapshots]
    lines += [f"  journal, records {part.first} to {part.last}: {_state(part)}" for part in found.segments]
    lines += [f"  {note}" for note in found.notes]
    if found.problem is None:
        return "\n".join([*lines, f"  all is well; the state is at record {found.good}"])
    lines.append(f"  {found.problem}")
    if found.good is None:
        return "\n".join([*lines, "  nothing can be brought back from here: copy a mirrored snapshot to this place"])
    lines.append(
        f"  --restore goes back to record {found.good}; {found.lost} later records were found, which it gives up"
    )
    return "\n".join(lines)


def _state(part: "Part") -> str:
    return part.problem or "whole"


def _as_mapping(found: "Examination") -> dict[str, Any]:
    return {**json.loads(json.dumps(dataclasses.asdict(found), default=str)), "lost": found.lost}
