"""What the repository says of itself is true: paths exist, tables agree with the code, files have their form."""

import importlib
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from paceline_server.config_fields import config_fields
from paceline_server.settings import OTHER_VARIABLES
from paceline_wire.errors import ERRORS_BY_NAME

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
COMPOSE = ROOT / "docker-compose.yml"
DOCKERFILES = sorted((ROOT / "deploy").glob("Dockerfile.*"))


def name_of(path: Path) -> str:
    """Return a path as the repository knows it."""
    return path.relative_to(ROOT).as_posix()


def rows(page: str, heading: str) -> list[list[str]]:
    """Return the cells of the table under a heading of a page, without the backticks and the table's head."""
    section = (ROOT / page).read_text(encoding="utf-8").partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines[2:]]


def anchors(page: Path) -> set[str]:
    """What links to a page's headings are made of: small letters and digits, spaces as hyphens."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_to_headings_lead_to_them(page: Path) -> None:
    """Every link to a part of a page of this repository names one of its headings."""
    for target, anchor in re.findall(r"\]\(([^)\s#:]*)#([^)\s]+)\)", page.read_text(encoding="utf-8")):
        assert anchor in anchors(page.parent / target if target else page), (target, anchor)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files(page: Path) -> None:
    """Every relative link of a page names a file or folder that exists."""
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    local = [link.partition("#")[0] for link in links if "://" not in link and not link.startswith("#")]
    missing = [link for link in local if not (page.parent / link).exists()]
    assert not missing


def test_the_tour_names_what_exists() -> None:
    """Every path, module and script in backticks in the README's tour and commands exists where it says."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tour = rows("README.md", "Tour")
    assert len(tour) >= 8
    for first, text in tour:
        folders = [ROOT / link for link in re.findall(r"\]\(([^)]+)\)", first)]
        for module in re.findall(r"`(\w+\.py)`", text):
            assert any((folder / module).is_file() for folder in folders), f"{module} of {first}"
    for script in re.findall(r"python ((?:examples|benchmarks)/[a-z_]+\.py)", readme):
        assert (ROOT / script).is_file()
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    named = re.findall(r"(?:^ {4}|`)make ([a-z-]+)", readme, re.MULTILINE)
    assert len(named) >= 4
    assert set(named) <= set(targets)


def test_every_folder_is_in_the_tour() -> None:
    """Every top-level folder is named in the tour, so that a reader finds all there is."""
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and path.name[0] != "."} - {"build", "dist"}
    links = re.findall(r"\]\((\w+)", "".join(row[0] for row in rows("README.md", "Tour")))
    assert folders <= set(links)


def test_the_readmes_python_compiles() -> None:
    """The three lines of the README are Python."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 1
    for block in blocks:
        compile(block, "README.md", "exec")


def test_the_error_table_is_the_family() -> None:
    """docs/protocol.md lists every error class once, with its gRPC code and whether trying again can help."""
    table = {name: (code, retryable) for name, code, retryable, _ in rows("docs/protocol.md", "Errors")}
    family = {name: (cls.grpc_code, "yes" if cls.retryable else "no") for name, cls in ERRORS_BY_NAME.items()}
    assert family == table
    assert len(family) == len(rows("docs/protocol.md", "Errors"))


@pytest.mark.parametrize(("limit", "constant"), [row[1:] for row in rows("docs/protocol.md", "Limits")])
def test_the_limits_are_the_codes(limit: str, constant: str) -> None:
    """Every limit in docs/protocol.md is the value of the constant beside it."""
    module, _, name = constant.rpartition(".")
    assert float(limit) == getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("example", EXAMPLES, ids=name_of)
def test_examples_are_short_and_compile(example: Path) -> None:
    """An example is Python, says at its top how to run it, and is short enough to be read at once."""
    source = example.read_text(encoding="utf-8")
    compile(source, str(example), "exec")
    assert f"python {name_of(example)} --address" in source or "paceline serve" in source
    assert len(source.splitlines()) < 100


def test_the_changelog_has_an_unreleased_section() -> None:
    """CHANGELOG.md keeps a section for what is to come, first among its versions."""
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0] == "[Unreleased]"


@pytest.mark.parametrize(("imported", "other"), [("paceline", "paceline_server"), ("paceline_server", "paceline")])
def test_client_and_server_do_not_import_each_other(imported: str, other: str) -> None:
    """Importing one side and what it exports loads no module of the other."""
    script = (
        f"import sys, {imported} as side\n"
        "for name in side.__all__: getattr(side, name)\n"
        f"print([name for name in sys.modules if name.partition('.')[0] == {other!r}])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_compose_and_dockerfiles_name_what_exists() -> None:
    """The compose file's Dockerfiles and scripts, the Dockerfiles' sources and all variables of Paceline's exist."""
    compose = COMPOSE.read_text(encoding="utf-8")
    assert {name_of(path) for path in DOCKERFILES} == set(re.findall(r"dockerfile: (\S+)", compose))
    for script in re.findall(r"/opt/paceline/(\w[\w/]*\.(?:py|sh))", compose):
        assert any((ROOT / folder / script).is_file() for folder in (".", "deploy")), script
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]["targets"][
        "wheel"
    ]
    for dockerfile in DOCKERFILES:
        copied = re.findall(r"^COPY ((?!--).*) \S+$", dockerfile.read_text(encoding="utf-8"), re.MULTILINE)
        missing = [source for sources in copied for source in sources.split() if not (ROOT / source).exists()]
        assert not missing
        assert {package.partition("/")[0] for package in wheel["packages"]} <= set(copied)
    variables = {field.variable for field in config_fields().values()} | OTHER_VARIABLES
    texts = [path.read_text(encoding="utf-8") for path in (COMPOSE, *DOCKERFILES, *PAGES)]
    assert set() == {name for text in texts for name in re.findall(r"PACELINE_[A-Z_]*[A-Z]", text)} - variables


@pytest.mark.skipif(shutil.which("docker-compose") is None, reason="Debian's docker-compose is not installed")
def test_docker_compose_accepts_the_file(tmp_path: Path) -> None:
    """Debian's docker-compose parses the file, and needs nothing to be prepared for it."""
    (tmp_path / "env").touch()
    command = ["docker-compose", "--file", str(COMPOSE), "--env-file", str(tmp_path / "env"), "config", "--quiet"]
    accepted = subprocess.run(command, capture_output=True, text=True, check=False)
    assert accepted.returncode == 0, accepted.stderr
    assert accepted.stderr == ""


def test_hadolint_accepts_the_dockerfiles() -> None:
    """The linter of Dockerfiles finds nothing, at any level."""
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([str(hadolint), *map(str, DOCKERFILES)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
