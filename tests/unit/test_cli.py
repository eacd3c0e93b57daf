"""The command line: commands from entry points, errors as exit codes, and log lines on request."""

import logging
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from paceline import cli as cli_module
from paceline.admin_commands import admin
from paceline.cli import EXIT_CODES, ExitCode, cli, main
from paceline_wire import errors

COMMANDS = '''
import logging
import click
from paceline_wire import errors

@click.command()
@click.option("--raise", "name")
@click.option("--message", default="It is so.")
def work(name, message):
    """Do the work."""
    logging.getLogger("paceline.test").info("working")
    if name == "KeyboardInterrupt":
        raise KeyboardInterrupt
    if name is not None:
        raise {**errors.ERRORS_BY_NAME, "ZeroDivisionError": ZeroDivisionError}[name](message)
    click.echo("worked")

@click.command()
@click.pass_context
def check(ctx):
    """Check something, and find that it is not so."""
    ctx.exit(1)

not_a_command = 3
'''


@pytest.fixture(autouse=True)
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Install a distribution with good and bad commands beside the real one, and show `paceline` only those."""
    (tmp_path / "thing_commands.py").write_text(COMMANDS)
    (tmp_path / "thing_extra.py").write_text("import not_installed.part\n")
    (tmp_path / "thing_broken.py").write_text("raise RuntimeError('it is broken')\n")
    dist_info = tmp_path / "thing-1.0.dist-info"
    dist_info.mkdir()
    (dist_info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: thing\nVersion: 1.0\nRequires-Dist: not-installed-either; extra == 'wrong'\n"
        "Requires-Dist: Not-Installed[part]>=3; extra == 'fancy'\nRequires-Dist: not-installed; extra == 'later'\n"
    )
    (dist_info / "entry_points.txt").write_text(
        "[thing.commands]\nwork = thing_commands:work\ncheck = thing_commands:check\n"
        "number = thing_commands:not_a_command\nextra = thing_extra:extra\nbroken = thing_broken:broken\n"
        "missing = thing_missing:missing\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(cli_module, "ENTRY_POINT_GROUP", "thing.commands")
    for module in ("thing_commands", "thing_extra", "thing_broken"):
        monkeypatch.delitem(sys.modules, module, raising=False)


@pytest.fixture(autouse=True)
def log_levels() -> Iterator[None]:
    """Put the levels of the loggers back."""
    loggers = [logging.getLogger(name) for name in ("paceline", "paceline_server", "paceline_wire")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture
def call_main(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Return a function that runs main() with arguments and returns its exit code."""

    def call(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["paceline", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        assert isinstance(ended.value.code, int)
        return ended.value.code

    return call


def run(*arguments: str) -> Result:
    """Run `paceline` with arguments."""
    return CliRunner().invoke(cli, arguments)


class TestCommands:
    """Commands from entry points."""

    def test_a_command_runs(self) -> None:
        """A command is found by its entry point and ends with 0."""
        result = run("work")
        assert (result.exit_code, result.output) == (0, "worked\n")

    def test_only_the_asked_command_is_imported(self) -> None:
        """Running one command imports no other."""
        run("work")
        assert "thing_commands" in sys.modules
        assert "thing_broken" not in sys.modules

    def test_help_lists_all(self) -> None:
        """The help lists every command, with the reason where one cannot be used, and the exit codes."""
        result = run("--help")
        assert result.exit_code == 0
        text = " ".join(result.output.split())
        assert "work Do the work." in text
        assert "extra (not available) It needs an extra: pip install 'thing[fancy]'." in text
        assert "broken (not available)" in text
        for code in ExitCode:
            assert f"{code.value} {code.meaning}" in text

    @pytest.mark.parametrize("arguments", [("extra",), ("extra", "--help"), ("extra", "some", "--thing=3")])
    def test_missing_extra(self, arguments: tuple[str, ...]) -> None:
        """A command whose dependency is missing names the extra to install, whatever it is asked."""
        result = run(*arguments)
        assert result.exit_code == ExitCode.USAGE
        message = "Error: The command 'extra' is not available. It needs an extra: pip install 'thing[fancy]'.\n"
        assert message == result.stderr

    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            ("broken", "RuntimeError: it is broken"),
            ("missing", "No module named 'thing_missing'"),
            ("number", "thing_commands:not_a_command is not a click command"),
        ],
    )
    def test_broken_command(self, name: str, reason: str) -> None:
        """A command that cannot be imported says why."""
        result = run(name)
        assert result.exit_code == ExitCode.INTERNAL
        assert reason in result.stderr

    def test_unknown_command(self) -> None:
        """An unknown command is refused with the nearest one."""
        result = run("wrok")
        assert result.exit_code == ExitCode.USAGE
        assert "No such command 'wrok'. Did you mean 'work'?" in result.stderr


class TestExitCodes:
    """Errors and their exit codes."""

    @pytest.mark.parametrize(
        ("name", "code"),
        [
            ("ConfigurationError", 2),
            ("InvalidInputError", 2),
            ("UnavailableError", 3),
            ("UnauthenticatedError", 4),
            ("ProtocolVersionError", 4),
            ("ManifestMismatchError", 4),
            ("NotInitializedError", 4),
            ("PushRefusedError", 4),
            ("CodecError", 70),
            ("PacelineError", 70),
            ("KeyboardInterrupt", 130),
        ],
    )
    def test_code(self, name: str, code: int) -> None:
        """Each kind of error ends the command with its documented code and a sentence on stderr."""
        result = run("work", "--raise", name)
        assert code == result.exit_code
        assert result.stdout == ""
        assert ("Error: Interrupted.\n" if code == 130 else "Error: It is so.\n") == result.stderr

    def test_every_error_has_a_code(self) -> None:
        """No error of the family means success or a negative answer."""
        for cls in errors.ERRORS_BY_NAME.values():
            nearest = next(base for base in cls.__mro__ if base in EXIT_CODES)
            assert EXIT_CODES[nearest] not in (ExitCode.OK, ExitCode.NEGATIVE)

    def test_negative_answer(self) -> None:
        """A command's own answer passes through."""
        assert run("check").exit_code == ExitCode.NEGATIVE

    def test_wrong_usage(self) -> None:
        """A wrong option is wrong usage."""
        result = run("work", "--rise", "x")
        assert result.exit_code == ExitCode.USAGE
        assert "--raise" in result.stderr

    def test_fault(self, call_main: Callable[..., int], caplog: pytest.LogCaptureFixture) -> None:
        """An exception that is no error of the family is a fault, and its traceback is logged."""
        assert call_main("work", "--raise", "ZeroDivisionError") == ExitCode.INTERNAL
        assert "ZeroDivisionError: It is so." in caplog.text


class TestMain:
    """The entry point itself."""

    def test_version(self, call_main: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
        """--version prints the version of the distribution."""
        assert call_main("--version") == 0
        assert capsys.readouterr().out.startswith("paceline 0.")

    def test_module(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        """`python -m paceline` is the command."""
        monkeypatch.setattr(sys, "argv", ["paceline", "--version"])
        with pytest.raises(SystemExit) as ended:
            runpy.run_module("paceline", run_name="__main__")
        assert ended.value.code == 0
        assert capsys.readouterr().out.startswith("paceline 0.")

    @pytest.mark.parametrize(("flags", "logged"), [((), False), (("-v",), True), (("-vv",), True)])
    def test_verbose(self, flags: tuple[str, ...], logged: bool, caplog: pytest.LogCaptureFixture) -> None:
        """Paceline's loggers tell what happens when asked to, and only then."""
        run(*flags, "work")
        assert logged is ("working" in caplog.messages)


@pytest.mark.parametrize("duration", ["0", "0s", "soon", "-1h", "101000000000000000d"])
def test_what_is_no_duration_is_wrong_usage(duration: str) -> None:
    """Nothing, words, and more than the message could hold: code 2, before anybody is called."""
    result = CliRunner().invoke(admin, ["evict", "127.0.0.1:1", "w", f"--for={duration}"])
    assert result.exit_code == ExitCode.USAGE, result.output
    assert "is no duration" in result.output
