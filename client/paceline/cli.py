"""The command `paceline`: finds its commands among the installed entry points, and turns errors into exit codes.

A command is a click command under an entry point of the group `paceline.commands`, in this distribution or another.
It is imported when it is asked for; one that cannot be imported says why and leaves the others as they are.
"""

import difflib
import enum
import logging
import re
import sys
from importlib.metadata import EntryPoint, entry_points
from typing import Any, NoReturn

import click

from paceline_wire import errors

ENTRY_POINT_GROUP = "paceline.commands"

logger = logging.getLogger(__name__)


class ExitCode(enum.IntEnum):
    """How a command ended. Scripts hold on to these numbers: a meaning may be added, none changed."""

    meaning: str

    def __new__(cls, code: int, meaning: str) -> "ExitCode":
        """Make a member from its number and its meaning."""
        member = int.__new__(cls, code)
        member._value_ = code
        member.meaning = meaning
        return member

    OK = 0, "done"
    NEGATIVE = 1, "the command's own negative answer, such as a check that failed"
    USAGE = 2, "wrong usage or configuration"
    UNREACHABLE = 3, "no server could be reached, or it is starting or stopping; try again"
    REFUSED = 4, "the server refused: token, certificate, protocol version, or another model"
    STORAGE = 5, "a data directory is damaged, in use, of another run, or cannot be read or written"
    INTERNAL = 70, "a fault in Paceline or its installation"
    INTERRUPTED = 130, "interrupted from the keyboard"


EXIT_CODES: dict[type[errors.PacelineError], ExitCode] = {
    errors.PacelineError: ExitCode.INTERNAL,
    errors.ConfigurationError: ExitCode.USAGE,
    errors.InvalidInputError: ExitCode.USAGE,
    errors.CodecError: ExitCode.INTERNAL,
    errors.UnavailableError: ExitCode.UNREACHABLE,
    errors.UnauthenticatedError: ExitCode.REFUSED,
    errors.PermissionDeniedError: ExitCode.REFUSED,
    errors.LimitExceededError: ExitCode.REFUSED,
    errors.ProtocolVersionError: ExitCode.REFUSED,
    errors.ManifestMismatchError: ExitCode.REFUSED,
    errors.NotInitializedError: ExitCode.REFUSED,
    errors.NotAMemberError: ExitCode.REFUSED,
    errors.SupersededError: ExitCode.REFUSED,
    errors.PushRefusedError: ExitCode.REFUSED,
    errors.QuarantinedError: ExitCode.REFUSED,
    errors.EvictedError: ExitCode.REFUSED,
    errors.StorageError: ExitCode.STORAGE,
}
"""The exit code of each error; the nearest class counts."""


def exit_code_of(error: errors.PacelineError) -> ExitCode:
    """With which code a command ends that an error has ended."""
    return next(EXIT_CODES[cls] for cls in type(error).__mro__ if cls in EXIT_CODES)


class EntryPointGroup(click.Group):
    """A group whose commands are the entry points, imported one by one as they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands, without importing any."""
        return sorted(entry_points(group=ENTRY_POINT_GROUP).names)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command; one that cannot be imported is replaced by one that says why."""
        found = list(entry_points(group=ENTRY_POINT_GROUP, name=cmd_name))
        if not found:
            return None
        try:
            command = found[0].load()
        except Exception as error:  # whatever a module raises while it is imported
            logger.debug("Importing the command %s failed.", cmd_name, exc_info=True)
            return _unavailable(cmd_name, found[0], error)
        return command if isinstance(command, click.Command) else _unavailable(cmd_name, found[0], None)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that the arguments name, or say which one was probably meant."""
        names = self.list_commands(ctx)
        if args[0] not in names:
            nearest = difflib.get_close_matches(args[0], names, n=1)
            ctx.fail(f"No such command '{args[0]}'." + "".join(f" Did you mean '{name}'?" for name in nearest))
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command, and end with the exit code of the error that it raised."""
        try:
            return super().invoke(ctx)
        except errors.PacelineError as error:
            logger.debug("The command failed.", exc_info=True)
            _end(str(error), exit_code_of(error))
        except KeyboardInterrupt:
            _end("Interrupted.", ExitCode.INTERRUPTED)


def _end(message: str, code: ExitCode) -> NoReturn:
    click.echo(f"Error: {message}", err=True)
    raise click.exceptions.Exit(code)


def _unavailable(name: str, entry_point: EntryPoint, error: Exception | None) -> click.Command:
    extra = _extra_with(entry_point, error.name) if isinstance(error, ModuleNotFoundError) else None
    if extra is not None:
        reason, code = f"It needs an extra: pip install '{extra}'", ExitCode.USAGE
    elif error is not None:
        reason, code = f"It cannot be imported: {type(error).__name__}: {error}", ExitCode.INTERNAL
    else:
        reason, code = f"{entry_point.value} is not a click command", ExitCode.INTERNAL

    def fail() -> None:
        _end(f"The command '{name}' is not available. {reason}.", code)

    anything = {"ignore_unknown_options": True, "allow_extra_args": True}
    return click.Command(
        name, callback=fail, short_help=f"(not available) {reason}.", add_help_option=False, context_settings=anything
    )


def _extra_with(entry_point: EntryPoint, module: str | None) -> str | None:
    """Return the extra that brings a module, such as "paceline[demo]", going by the distribution's own metadata.

    The module must have the name of its package, up to case, hyphens and underscores.
    """
    package = (module or "").partition(".")[0]
    if entry_point.dist is None or package in ("", entry_point.dist.name):
        return None
    name = re.escape(package).replace("_", "[-_.]")
    pattern = re.compile(rf"{name}(?![\w.-])[^;]*;.*extra == ['\"](?P<extra>[^'\"]+)", re.IGNORECASE)
    matches = map(pattern.match, entry_point.dist.requires or ())
    return next((f"{entry_point.dist.name}[{match['extra']}]" for match in matches if match), None)


def _configure_logging(_ctx: click.Context, _parameter: click.Parameter, verbosity: int) -> None:
    """Send log lines to stderr: warnings, and with -v and -vv also what Paceline's own loggers tell."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    level = {0: logging.WARNING, 1: logging.INFO}.get(verbosity, logging.DEBUG)
    for name in ("paceline", "paceline_server", "paceline_wire"):
        logging.getLogger(name).setLevel(level)


def _epilog() -> str:
    lines = [f"  {code.value:>3}  {code.meaning}" for code in ExitCode]
    # "\b" keeps click from joining the lines of the table.
    return "\n".join(["\b", "Exit codes:", *lines])


@click.group(cls=EntryPointGroup, name="paceline", epilog=_epilog(), context_settings={"max_content_width": 100})
@click.version_option(package_name="paceline", message="%(prog)s %(version)s")
@click.option(
    "-v",
    "--verbose",
    count=True,
    is_eager=True,
    expose_value=False,
    callback=_configure_logging,
    help="Log more to stderr: -v what happens, -vv all that helps to find a fault.",
)
def cli() -> None:
    """Train one torch model from many places at once, over ordinary internet links."""


def main() -> None:
    """Run the command line and exit."""
    try:
        cli(prog_name="paceline")
    except Exception:
        logger.exception("This is a fault in Paceline; please report it.")
        sys.exit(ExitCode.INTERNAL)
