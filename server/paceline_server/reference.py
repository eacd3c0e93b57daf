"""Writes docs/configuration.md from the model: `python -m paceline_server.reference > docs/configuration.md`."""

import inspect
import sys
from collections.abc import Iterable

from paceline_server.config import ServerConfig
from paceline_server.config_fields import ConfigField, config_fields, config_sections

_INTRODUCTION = """\
# Configuration

<!-- Generated: python -m paceline_server.reference > docs/configuration.md -->

A shard reads its configuration when it starts, from three places. Field by field, a later one
overrides an earlier one:

1. a TOML file: `paceline serve --config run.toml`, or the variable `PACELINE_CONFIG`;
2. the environment: one variable for each field, and an empty one counts as not set;
3. flags. Each may also be written with underscores, as the file spells it.

A list is written as a TOML list in the file and with commas elsewhere. Relative paths start at the working directory.
`paceline_server.local(config)` takes a mapping of the same form as the file, and reads no environment.

What is unknown or wrong is an error that says where it was found and what is allowed; all of it is listed at once.
Every variable that begins with `PACELINE_` must be a field, except `PACELINE_CONFIG`, `PACELINE_TOKEN` and
`PACELINE_TOKEN_FILE` (a worker's token) and what Kubernetes sets for services named `paceline` or `paceline-...`.

    listen = "0.0.0.0:7070"

    [outer]
    lr = 0.7

    [schedule]
    kind = "quorum"
    quota = 4
    quorum = 3

`outer.lr`, `exchange.inner_steps` and `schedule.quota` can change while a run goes on: `paceline admin set`
([operation.md](operation.md)). What was set there counts after a restart, too, until it is set again or the server is
started with another value for the key than before.

The same with flags: `paceline serve --listen 0.0.0.0:7070 --outer.lr 0.7 --schedule.kind quorum --schedule.quota 4
--schedule.quorum 3`.
"""


def configuration_reference() -> str:
    """Return the page as Markdown."""
    fields = config_fields()
    top_level = [field for path, field in fields.items() if "." not in path]
    parts = [_INTRODUCTION, _table("Top level", inspect.getdoc(ServerConfig), top_level)]
    for name, section in config_sections().items():
        members = [field for path, field in fields.items() if path.startswith(f"{name}.")]
        parts.append(_table(f"`[{name}]`", inspect.getdoc(section), members))
    return "\n".join(parts)


def _table(title: str, summary: str | None, fields: Iterable[ConfigField]) -> str:
    head = "| key | flag | variable | type | default | meaning |\n|---|---|---|---|---|---|\n"
    return f"## {title}\n\n{summary}\n\n{head}" + "".join(map(_row, fields))


def _row(field: ConfigField) -> str:
    flags = field.flags if field.annotation is not bool else (*field.flags, field.flag.replace("--", "--no-"))
    default = "left out" if field.default is None else f"`{field.default}`"
    cells = [
        f"`{field.path}`",
        ", ".join(f"`{flag}`" for flag in flags),
        f"`{field.variable}`",
        _type(field),
        default,
        field.description,
    ]
    return "| " + " | ".join(cells) + " |\n"


def _type(field: ConfigField) -> str:
    if field.choices:
        return ", ".join(f"`{choice}`" for choice in field.choices)
    return ", ".join([field.type_name, *field.limits])


if __name__ == "__main__":
    sys.stdout.write(configuration_reference())
