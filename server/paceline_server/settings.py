"""From a file, the environment and flags to one ServerConfig, or to a sentence for everything that is wrong with them.

Each source is flattened to dotted names, the later one wins field by field (file, then environment, then flags), and
what won is validated as a whole. Every value remembers where it came from, so that an error can say it.
"""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from paceline_server.config import ServerConfig
from paceline_server.config_fields import (
    ENVIRONMENT_PREFIX,
    ConfigField,
    config_fields,
    config_sections,
    flag_name,
    nearest_name,
    variable_name,
)
from paceline_wire.errors import ConfigurationError

OTHER_VARIABLES = frozenset({"PACELINE_CONFIG", "PACELINE_TOKEN", "PACELINE_TOKEN_FILE"})
"""Variables with the prefix that are no fields: the configuration file of `serve`, and the token of a worker."""

_KUBERNETES_VARIABLE = re.compile(
    r"PACELINE_(\w+_)?(SERVICE_HOST=|SERVICE_PORT(_\w+)?=|PORT_\d+_\w+=|PORT=\w+://)",
)
"""What Kubernetes puts into every pod beside a service named paceline or paceline-something, as NAME=VALUE."""


@dataclass(frozen=True, kw_only=True)
class _Setting:
    value: object
    source: str


@dataclass(kw_only=True)
class _Settings:
    """What the sources said: the values by dotted name, and a sentence for each name that does not exist."""

    values: dict[str, _Setting] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def read_mapping(self, mapping: Mapping[str, object], source: str, prefix: str = "") -> None:
        for key, value in mapping.items():
            path = f"{prefix}{key}"
            if path in config_fields():
                self.values[path] = _Setting(value=value, source=source)
            elif path not in config_sections():
                names = [*config_fields(), *config_sections()]
                self.problems.append(_unknown(f"{source}: the key '{path}'", nearest_name(path, names)))
            elif isinstance(value, Mapping):
                self.read_mapping(value, source, f"{path}.")
            else:
                self.problems.append(f"{source}: '{path}' should be a table of keys.")

    def read_environment(self, environ: Mapping[str, str]) -> None:
        fields = {field.variable: field for field in config_fields().values()}
        for name, text in sorted(environ.items()):
            if not text or not name.startswith(ENVIRONMENT_PREFIX) or _is_for_others(name, text):
                continue
            if name in fields:
                source = f"variable {name}"
                self.values[fields[name].path] = _Setting(value=_from_text(fields[name], text), source=source)
            else:
                path = name.removeprefix(ENVIRONMENT_PREFIX).lower().replace("__", ".")
                nearest = nearest_name(path, config_fields())
                self.problems.append(_unknown(f"The variable {name}", nearest and variable_name(nearest)))

    def read_flags(self, flags: Mapping[str, object]) -> None:
        for name, value in flags.items():
            path = name.removeprefix("--").replace("-", "_")
            if path not in config_fields():
                nearest = nearest_name(path, config_fields())
                self.problems.append(_unknown(f"The flag {flag_name(path)}", nearest and flag_name(nearest)))
            elif value is not None:
                source = f"flag {flag_name(path)}"
                self.values[path] = _Setting(value=_from_text(config_fields()[path], value), source=source)

    def build(self) -> ServerConfig:
        tree: dict[str, Any] = {}
        for path, setting in self.values.items():
            section, _, name = path.rpartition(".")
            (tree.setdefault(section, {}) if section else tree)[name] = setting.value
        try:
            config = ServerConfig.model_validate(tree)
        except ValidationError as error:
            problems = self.problems + [self._sentence(detail) for detail in error.errors()]
        else:
            problems = self.problems
        if len(problems) > 1:
            lines = "".join(f"\n  - {problem}" for problem in problems)
            raise ConfigurationError(f"The configuration has {len(problems)} problems:{lines}")
        if problems:
            raise ConfigurationError(problems[0])
        return config

    def _sentence(self, detail: ErrorDetails) -> str:
        path = ".".join(part for part in detail["loc"] if isinstance(part, str))
        item = "".join(f"[{part}]" for part in detail["loc"] if isinstance(part, int))
        reason = detail["msg"].removeprefix("Value error, ").removeprefix("Input ").replace("valid tuple", "list")
        setting = self.values.get(path)
        if setting is None:
            return f"{path}: {reason}."
        value = "" if config_fields()[path].is_secret else f" = {setting.value!r}"
        return f"{path}{item}{value} ({setting.source}): {reason}."


def load_config(file: Path | None, environ: Mapping[str, str], flags: Mapping[str, object]) -> ServerConfig:
    """Build the configuration of a shard from all of its sources, in rising precedence.

    Args:
        file: A TOML file; None: no file.
        environ: The environment. A variable that is empty counts as not set; lists are separated by commas.
        flags: Values or their text by dotted name, such as {"outer.lr": "0.7"}. A flag that is None was not given.

    Raises:
        ConfigurationError: A key is unknown or a value is wrong; the message lists all of them.
    """
    settings = _Settings()
    if file is not None:
        settings.read_mapping(_read_toml(file), f"file {file}")
    settings.read_environment(environ)
    settings.read_flags(flags)
    return settings.build()


def config_from_mapping(mapping: Mapping[str, object]) -> ServerConfig:
    """Build the configuration from a nested mapping of the same form as the file, and from nothing else.

    Raises:
        ConfigurationError: A key is unknown or a value is wrong; the message lists all of them.
    """
    settings = _Settings()
    settings.read_mapping(mapping, "given mapping")
    return settings.build()


def config_to_mapping(config: ServerConfig) -> dict[str, Any]:
    """Return what `config_from_mapping` turns into an equal configuration, of values that JSON has.

    It holds the tokens in clear: pass it to a process of the run, and never show or store it.
    """
    mapping = config.model_dump(mode="json", exclude_none=True)
    mapping["security"]["tokens"] = [token.get_secret_value() for token in config.security.tokens]
    return mapping


def _read_toml(file: Path) -> dict[str, object]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"The configuration file {file} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise ConfigurationError(f"The configuration file {file} is not valid TOML: {error}.") from error


def _from_text(field: ConfigField, value: object) -> object:
    """Split the text of a list; pydantic reads all the others."""
    if field.is_list and isinstance(value, str):
        return [item.strip() for item in value.split(",")] if value else []
    return value


def _is_for_others(name: str, text: str) -> bool:
    return name in OTHER_VARIABLES or _KUBERNETES_VARIABLE.match(f"{name}={text}") is not None


def _unknown(what: str, nearest: str | None) -> str:
    if nearest is None:
        return f"{what} does not exist; `paceline serve --help` lists all names."
    return f"{what} does not exist; did you mean '{nearest}'?"
