"""Every field of the configuration as an option of a command.

Options carry text only: `paceline_server.settings` validates it together with the file and the environment, so that all
three are judged by the same rules and in the same words.
"""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from paceline_server.config_fields import ConfigField, config_fields
from paceline_server.settings import load_config

_Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class ConfigOption(click.Option):
    """A flag that is also accepted with underscores, as the file spells it; the help shows it once."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Return the names and the help without the spellings that have underscores."""
        record = super().get_help_record(ctx)
        if record is None:
            return None
        names, text = record
        for name in (*self.opts, *self.secondary_opts):
            if "_" in name:
                names = names.replace(f", {name}", "").replace(f" / {name}", "")
        return names, text


def server_config_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command all fields as options, besides `--config FILE`, and call it with `config=ServerConfig`.

        @click.command()
        @server_config_options
        def serve(config: ServerConfig) -> None: ...

    The command may have options of its own, on either side of this decorator.
    """
    parameters = {path.replace(".", "__"): path for path in config_fields()}

    @functools.wraps(command)
    def with_config(*args: Any, config_file: Path | None, **arguments: Any) -> Any:
        flags = {path: arguments.pop(parameter) for parameter, path in parameters.items()}
        return command(*args, config=load_config(config_file, os.environ, flags), **arguments)

    # click lists options in the order of their decorators, and decorators apply from the last to the first.
    options = [_option(parameter, config_fields()[path]) for parameter, path in parameters.items()]
    options.insert(0, _config_file_option())
    decorated: Callable[..., Any] = with_config
    for option in reversed(options):
        decorated = option(decorated)
    return decorated


def _config_file_option() -> _Decorator:
    return click.option(
        "config_file",
        "--config",
        metavar="FILE",
        type=click.Path(dir_okay=False, path_type=Path),
        envvar="PACELINE_CONFIG",
        show_envvar=True,
        help="TOML file with the configuration. Variables (PACELINE_OUTER__LR for --outer.lr) override it, and flags "
        "override both.",
    )


def _option(parameter: str, field: ConfigField) -> _Decorator:
    flags = dict.fromkeys([*field.flags, f"--{field.path}"])
    default = (field.default or "").strip('"')
    text = f"{field.description}  [default: {default}]" if default not in ("", "[]") else field.description
    if field.annotation is bool:
        switches = [f"{flag}/--no-{flag.removeprefix('--')}" for flag in flags]
        return click.option(parameter, *switches, cls=ConfigOption, default=None, help=text)
    metavar = f"[{'|'.join(field.choices)}]" if field.choices else field.type_name.upper()
    return click.option(parameter, *flags, cls=ConfigOption, default=None, type=str, metavar=metavar, help=text)
