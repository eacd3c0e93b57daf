"""The configuration as a flat list of fields, each with its key, flag and environment variable."""

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from pydantic import SecretStr
from pydantic.fields import FieldInfo

from paceline_server.config import ServerConfig
from paceline_server.config_base import Section

ENVIRONMENT_PREFIX = "PACELINE_"

SHORT_FLAGS = {
    "security.tls_cert": "--tls-cert",
    "security.tls_key": "--tls-key",
    "security.insecure": "--insecure",
}
"""Second names of flags that are typed often."""

_TYPE_NAMES: dict[Any, str] = {bool: "boolean", int: "integer", float: "float", str: "text", Path: "path"}
_BOUNDS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most", "multiple_of": "a multiple of"}


@dataclass(frozen=True, kw_only=True)
class ConfigField:
    """One field of the configuration."""

    path: str
    """Its dotted name, such as "exchange.inner_steps"."""
    info: FieldInfo
    """Its declaration in the model."""

    @property
    def flag(self) -> str:
        """Its flag, such as "--exchange.inner-steps"."""
        return flag_name(self.path)

    @property
    def flags(self) -> tuple[str, ...]:
        """Its flag, and its short one if it has one."""
        return (self.flag, SHORT_FLAGS[self.path]) if self.path in SHORT_FLAGS else (self.flag,)

    @property
    def variable(self) -> str:
        """Its environment variable, such as "PACELINE_EXCHANGE__INNER_STEPS"."""
        return variable_name(self.path)

    @property
    def annotation(self) -> Any:
        """Its type, without the None that stands for "left out"."""
        types = [kind for kind in get_args(self.info.annotation) if kind is not NoneType]
        return types[0] if NoneType in get_args(self.info.annotation) else self.info.annotation

    @property
    def choices(self) -> tuple[str, ...]:
        """The values that it can have, if these can be listed."""
        return get_args(self.annotation) if get_origin(self.annotation) is Literal else ()

    @property
    def is_list(self) -> bool:
        """Whether it has several values, separated by commas where they are given as text."""
        return get_origin(self.annotation) is tuple

    @property
    def is_secret(self) -> bool:
        """Whether its value must never be shown."""
        return SecretStr in (self.annotation, *get_args(self.annotation))

    @property
    def type_name(self) -> str:
        """The name of its type, such as "integer"."""
        if self.choices:
            return "choice"
        return "list" if self.is_list else _TYPE_NAMES[self.annotation]

    @property
    def limits(self) -> tuple[str, ...]:
        """The bounds of its value in words, such as ("at least 1", "at most 8")."""
        return tuple(
            f"{words} {getattr(bound, name):.15g}"
            for bound in self.info.metadata
            for name, words in _BOUNDS.items()
            if hasattr(bound, name)
        )

    @property
    def default(self) -> str | None:
        """Its default as the file would say it; None: left out."""
        value = self.info.get_default(call_default_factory=True)
        return None if value is None else json.dumps(value)

    @property
    def description(self) -> str:
        """What it means."""
        return self.info.description or ""


@cache
def config_fields() -> Mapping[str, ConfigField]:
    """Return every field by its dotted name, in the order of the model."""
    return {path: ConfigField(path=path, info=info) for path, info in _walk(ServerConfig, "")}


@cache
def config_sections() -> Mapping[str, type[Section]]:
    """Return the tables of the file by name, in the order of the model."""
    members = {name: info.annotation for name, info in ServerConfig.model_fields.items()}
    return {name: kind for name, kind in members.items() if isinstance(kind, type) and issubclass(kind, Section)}


def flag_name(path: str) -> str:
    """Return the flag for a dotted name."""
    return "--" + path.replace("_", "-")


def variable_name(path: str) -> str:
    """Return the environment variable for a dotted name."""
    return ENVIRONMENT_PREFIX + path.replace(".", "__").upper()


def nearest_name(unknown: str, valid: Iterable[str]) -> str | None:
    """Return the valid dotted name that was probably meant, or None when none is near.

    A field in the wrong table counts as nearer than a similar name in the right one: with "outer.quota",
    "schedule.quota" was meant.
    """
    paths = list(valid)
    leaf = _leaf(unknown)
    same_leaf = [path for path in paths if _leaf(path) == leaf]
    if same_leaf:
        return difflib.get_close_matches(unknown, same_leaf, n=1, cutoff=0.0)[0]
    for name, candidates in ((unknown, {path: path for path in paths}), (leaf, {_leaf(path): path for path in paths})):
        close = difflib.get_close_matches(name, candidates, n=1)
        if close:
            return candidates[close[0]]
    return None


def _leaf(path: str) -> str:
    return path.rpartition(".")[2]


def _walk(section: type[Section], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    for name, info in section.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, Section):
            yield from _walk(info.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, info
