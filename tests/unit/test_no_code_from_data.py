"""No module runs code that came as data: no pickle, marshal, shelve, eval, exec or unsafe loading anywhere."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("client/paceline", "server/paceline_server", "proto/paceline_wire", "simulator/paceline_simulator")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py") if "_pb2" not in path.name)
IMPORTS = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
CALLS = {"eval", "exec", "compile", "__import__"}


def offences(source: str) -> list[str]:
    """What a module has that may run data."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.partition(".")[0] in IMPORTS]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in IMPORTS:
            found.append(str(node.module))
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called == "torch.load" and _loads_only_weights(node):
                continue
            if called in CALLS or called in ("torch.load", "yaml.load", "np.load", "numpy.load"):
                found.append(called)
    return found


def _loads_only_weights(call: ast.Call) -> bool:
    """Whether torch.load is told to take tensors, numbers and text alone: a worker's own checkpoint on Ray."""
    return any(each.arg == "weights_only" and ast.unparse(each.value) == "True" for each in call.keywords)


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_runs_no_data(module: Path) -> None:
    """None of what loads objects or runs text is used."""
    assert not offences(module.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "eval('1')",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
    ],
)
def test_it_would_be_seen(source: str) -> None:
    """The look finds what it is for."""
    assert offences(source)
