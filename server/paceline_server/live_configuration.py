"""The configuration that counts now: as the server was started, and what operators changed since.

What is changed while the run goes on holds across restarts, until it is changed again or the server is started with
another value for it: the newest word counts.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from paceline_server.config import ServerConfig
from paceline_server.construction import run_configuration
from paceline_server.settings import config_from_mapping
from paceline_wire.errors import ConfigurationError, InvalidInputError

Value: TypeAlias = float | int | None

CHANGEABLE = ("outer.lr", "exchange.inner_steps", "schedule.quota")
"""The keys of the configuration that can change while a run goes on."""


@dataclass(frozen=True, kw_only=True)
class Override:
    """What an operator set in the place of a configured value.

    Attributes:
        configured: What the server was started with then.
        value: What counts instead.
    """

    configured: Value
    value: Value


class LiveConfiguration:
    """The configuration of a shard in operation. Belongs to one event loop.

    Attributes:
        config: What counts now.
        overrides: What operators set and still counts, by key.
        notes: What of it no longer counts since the server was started, in sentences.
        for_workers: What workers are told of it when they join.
        changing: Held while it changes, so that whoever notes it beside other things notes what belongs together.

    Args:
        started: What the server was started with.
        overrides: What operators had set before.

    Raises:
        ConfigurationError: What was set does not fit what the server was started with.
    """

    def __init__(self, started: ServerConfig, overrides: Mapping[str, Override] | None = None) -> None:
        self.notes: list[str] = []
        self.overrides: dict[str, Override] = {}
        for key, override in (overrides or {}).items():
            configured = value_of(started, key)
            if configured == override.configured:
                self.overrides[key] = override
            else:
                self.notes.append(
                    f"{key} is {shown(configured)}, as the server is started with now; that it was set to "
                    f"{shown(override.value)} in place of {shown(override.configured)} counts no more"
                )
        self._started = started
        self.config = changed(started, {key: override.value for key, override in self.overrides.items()})
        self.for_workers = run_configuration(self.config)
        self.changing = asyncio.Lock()

    def take(self, config: ServerConfig) -> None:
        """Let another configuration count, which differs in changeable keys only."""
        for key in CHANGEABLE:
            value, configured = value_of(config, key), value_of(self._started, key)
            if value == configured:
                self.overrides.pop(key, None)
            elif value != value_of(self.config, key):
                self.overrides[key] = Override(configured=configured, value=value)
        self.config = config
        self.for_workers = run_configuration(config)


def value_of(config: ServerConfig, key: str) -> Value:
    """The value of a key such as "outer.lr"."""
    section, _, name = key.partition(".")
    value: Value = getattr(getattr(config, section), name)
    return value


def shown(value: Value) -> str:
    """A value as an operator reads it."""
    return "left out" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def changed(config: ServerConfig, values: Mapping[str, Value]) -> ServerConfig:
    """A configuration with other values for some keys.

    Raises:
        ConfigurationError: A value is not allowed, or does not fit the others; the text says which and why.
    """
    if not values:
        return config
    mapping = shaping(config)
    for key, value in values.items():
        section, _, name = key.partition(".")
        mapping[section].pop(name, None)
        if value is not None:
            mapping[section][name] = value
    other = config_from_mapping(mapping)
    return config.model_copy(update={"outer": other.outer, "schedule": other.schedule, "exchange": other.exchange})


def changed_by_operator(config: ServerConfig, values: Mapping[str, Value], *, local_momentum: bool) -> ServerConfig:
    """As `changed`, for what an operator asks while the run goes on.

    Args:
        config: What counts now.
        values: By key.
        local_momentum: Whether the outer rule orders the workers' momentum, which decays by H.

    Raises:
        InvalidInputError: A value is not allowed, does not fit the others, or cannot change now.
    """
    inner_steps = values.get("exchange.inner_steps", config.exchange.inner_steps)
    if local_momentum and inner_steps != config.exchange.inner_steps:
        raise InvalidInputError(
            f"exchange.inner_steps cannot change while a run with outer.rule = '{config.outer.rule}' goes on: its "
            "momentum decays by the inner steps of a round, and pushes of rounds of both lengths are under way"
        )
    try:
        return changed(config, values)
    except ConfigurationError as error:
        raise InvalidInputError(str(error).replace(" (given mapping)", "")) from error


_OF_THE_HOST = {"listen", "advertise_host", "shard_addresses", "shard_index", "storage", "security", "limits"}
"""Parts of the configuration that say where and for whom a shard is, not what the run is."""


def shaping(config: ServerConfig) -> dict[str, Any]:
    """The part of a configuration that shapes a run, as JSON has it."""
    return config.model_dump(mode="json", exclude_none=True, exclude=_OF_THE_HOST)
