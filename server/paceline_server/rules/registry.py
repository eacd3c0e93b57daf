"""From a configured name to an outer rule: ours, an installed package's (entry point), or any "module:attribute"."""

import sys
from contextlib import redirect_stdout
from functools import reduce
from importlib import import_module
from importlib.metadata import entry_points

from paceline_server.config_outer import RULE_ENTRY_POINTS
from paceline_server.rules.base import OuterRule, RuleSettings
from paceline_server.rules.delayed_nesterov import DelayedNesterov
from paceline_server.rules.momentum_look_ahead import MomentumLookAhead
from paceline_server.rules.naive_momentum import NaiveMomentum, NaiveNesterov
from paceline_server.rules.ordered_momentum import OrderedMomentum
from paceline_server.rules.orlomo import OrderedLocalMomentum
from paceline_server.rules.sgd import AsynchronousSGD
from paceline_server.rules.smega2 import Smega2
from paceline_wire.errors import ConfigurationError

RULES: dict[str, type[OuterRule]] = {
    "ormo": OrderedMomentum,
    "ormo-da": OrderedMomentum,
    "orlomo": OrderedLocalMomentum,
    "sgd": AsynchronousSGD,
    "momentum": NaiveMomentum,
    "nesterov": NaiveNesterov,
    "delayed-nesterov": DelayedNesterov,
    "mla": MomentumLookAhead,
    "smega2": Smega2,
}
"""Our own rules by name."""


def outer_rule(name: str, settings: RuleSettings) -> OuterRule:
    """Return the rule of that name.

    Raises:
        ConfigurationError: There is none, it cannot be imported, or it is no outer rule; the text says which.
    """
    # stdout belongs to the server's own announcements, whatever somebody else's module prints.
    with redirect_stdout(sys.stderr):
        rule = RULES.get(name) or _foreign(name)
        return _made(name, rule, settings)


def _made(name: str, rule: object, settings: RuleSettings) -> OuterRule:
    if not (isinstance(rule, type) and issubclass(rule, OuterRule)):
        raise ConfigurationError(
            f"outer.rule = {name!r} is {rule!r}, not a subclass of paceline_server.rules.OuterRule"
        )
    if rule.momentum_vector is not None and rule.momentum_vector not in rule.state:
        raise ConfigurationError(
            f"outer.rule = {name!r} names {rule.momentum_vector!r} as its momentum_vector, which is not in its state "
            f"{rule.state!r}"
        )
    try:
        return rule.of(settings)
    except Exception as error:  # whatever somebody else's class raises
        raise ConfigurationError(
            f"outer.rule = {name!r} cannot be made from the configuration: {type(error).__name__}: {error}"
        ) from error


def _foreign(name: str) -> object:
    found = list(entry_points(group=RULE_ENTRY_POINTS, name=name))
    module, _, attribute = (found[0].value if found else name).partition(":")
    try:
        return reduce(getattr, attribute.split("."), import_module(module))
    except (Exception, SystemExit) as error:  # whatever somebody else's module raises while it is imported
        hint = "; is its folder in PYTHONPATH?" if isinstance(error, ModuleNotFoundError) else ""
        raise ConfigurationError(
            f"outer.rule = {name!r} cannot be imported from {module!r}: {type(error).__name__}: {error}{hint}"
        ) from error
