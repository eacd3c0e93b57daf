"""Outer rules: how a push changes a fragment's parameters. One rule a module; base.py says what a rule is."""

from paceline_server.rules.base import Contribution, Numbers, OuterRule, RuleSettings
from paceline_server.rules.rates import Rates

__all__ = ["Contribution", "Numbers", "OuterRule", "Rates", "RuleSettings"]
