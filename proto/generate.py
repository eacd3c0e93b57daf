"""Regenerate the protobuf code in paceline_wire/v1, or with --check say whether the committed code is current."""

import argparse
import filecmp
import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent
PACKAGE = Path("paceline_wire/v1")


def generate(destination: Path) -> None:
    """Write the generated modules and stubs of every .proto file below destination."""
    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / PACKAGE).glob("*.proto"))
    kinds = ("python_out", "grpc_python_out", "mypy_out", "mypy_grpc_out")
    # The plugins lie beside this interpreter, which need not be on PATH.
    scripts = Path(sys.executable).parent
    plugins = [f"--plugin={name}={scripts / name}" for name in ("protoc-gen-mypy", "protoc-gen-mypy_grpc")]
    outputs = [f"--{kind}={destination}" for kind in kinds]
    arguments = [f"--proto_path={ROOT}", *plugins, *outputs, *sources]
    if protoc.main(["protoc", *arguments]) != 0:
        sys.exit("protoc failed; its message above names the file and line")


def generated_names(folder: Path) -> set[str]:
    """Names of the generated files in folder."""
    return {path.name for pattern in ("*_pb2*.py", "*_pb2*.pyi") for path in folder.glob(pattern)}


def stale_names(fresh: Path, committed: Path) -> list[str]:
    """Names that are edited, missing or left over in committed."""
    names = generated_names(fresh) | generated_names(committed)
    _, mismatch, errors = filecmp.cmpfiles(fresh, committed, names, shallow=False)
    return sorted(mismatch + errors)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 when the code is not current")
    if not parser.parse_args().check:
        generate(ROOT)
        return
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        stale = stale_names(Path(folder) / PACKAGE, ROOT / PACKAGE)
    if stale:
        sys.exit(f"generated code is not current ({', '.join(stale)}): run `make proto` and commit the result")


if __name__ == "__main__":
    main()
