"""How pushes become parameters: the outer rule, its coefficients, and what becomes of late pushes."""

import difflib
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from paceline_server.config_base import Section

OUTER_RULES = (
    "ormo",
    "ormo-da",
    "orlomo",
    "sgd",
    "momentum",
    "nesterov",
    "delayed-nesterov",
    "mla",
    "smega2",
)
"""Our own outer rules (paceline_server.rules.registry, which would import torch here)."""

RULE_ENTRY_POINTS = "paceline.outer_rules"
"""Installed packages offer rules of their own under this entry-point group."""

ADAPTIVE_LATE_BINS = 2
"""Where "ormo-da" begins to take late pushes in part: its step is min(1, 2 K / tau) for a push tau pushes late."""

MAX_BINS = 1 << 48


class OuterConfig(Section):
    """How pushes become parameters."""

    rule: str = Field(
        default="ormo",
        description="Outer rule: ormo (ordered momentum), ormo-da (delay-adaptive), orlomo (orders local momentum), "
        "sgd, momentum, nesterov, delayed-nesterov, mla (momentum look-ahead), smega2; or one of your own, as "
        "module:attribute or by the name of its entry point.",
    )
    lr: float = Field(
        default=0.7,
        gt=0,
        allow_inf_nan=False,
        description="Outer learning rate of the mean outer gradient of a full bin; each push enters with lr / quota, "
        "or its share of the tokens.",
    )
    momentum: float = Field(
        default=0.5,
        ge=0,
        lt=1,
        allow_inf_nan=False,
        description="Momentum coefficient of the outer rule.",
    )
    publish: Literal["polyak", "look-ahead"] | None = Field(
        default=None,
        description="What workers are sent: the parameters as they stand (polyak), or a step ahead along the momentum "
        "(look-ahead, Nesterov). Left out: polyak under the async and participation schedules, look-ahead under "
        "barrier and quorum.",
    )
    correction: Literal["heloco"] | None = Field(
        default=None,
        description="What is done to pushes before the rule. heloco turns them towards the momentum, tensor by tensor, "
        "where they point elsewhere. Left out: nothing.",
    )
    lr_decay: Literal["constant", "linear", "cosine", "step"] = Field(
        default="constant",
        description="How lr falls after its warm-up, until bin total_bins; step divides it by ten at 60 % and at 85 %.",
    )
    lr_warmup_bins: int = Field(
        default=0, ge=0, le=MAX_BINS, description="Bins over which lr rises linearly to its value."
    )
    momentum_warmup_bins: int = Field(
        default=0, ge=0, le=MAX_BINS, description="Bins over which momentum rises linearly from 0."
    )
    total_bins: int | None = Field(
        default=None, ge=1, le=MAX_BINS, validate_default=True, description="The bin in which lr_decay ends."
    )
    final_lr_share: float = Field(default=0.1, ge=0, le=1, description="What is left of lr then (linear, cosine).")
    late_bins: int = Field(
        default=16,
        ge=1,
        le=MAX_BINS,
        description="Lateness, in bins, up to which a push enters whole; of a later one only the part "
        "late_bins / lateness does, so that a worker that comes back after an hour cannot hurt the run.",
    )

    @model_validator(mode="before")
    @classmethod
    def _rules_bring_defaults(cls, data: object) -> object:
        if isinstance(data, Mapping) and data.get("rule") == "sgd":
            return {"momentum": 0.0, **data}
        if isinstance(data, Mapping) and data.get("rule") == "ormo-da":
            return {"late_bins": ADAPTIVE_LATE_BINS, **data}
        return data

    @field_validator("rule")
    @classmethod
    def _rule_is_known(cls, rule: str) -> str:
        module, _, attribute = rule.partition(":")
        foreign = entry_points(group=RULE_ENTRY_POINTS).names
        if rule in OUTER_RULES or rule in foreign or (module and attribute):
            return rule
        nearest = difflib.get_close_matches(rule, [*OUTER_RULES, *foreign], n=1)
        raise ValueError(
            "is no outer rule; the valid ones are "
            f"{', '.join([*OUTER_RULES, *sorted(foreign)])}, and module:attribute"
            + "".join(f". Did you mean {name}?" for name in nearest)
        )

    @field_validator("momentum")
    @classmethod
    def _sgd_takes_no_momentum(cls, momentum: float, info: ValidationInfo) -> float:
        if momentum and info.data.get("rule") == "sgd":
            raise ValueError("the rule sgd has no momentum; leave outer.momentum out, or choose the rule ormo")
        return momentum

    @field_validator("correction")
    @classmethod
    def _correction_fits_the_rule(cls, correction: str | None, info: ValidationInfo) -> str | None:
        if correction is not None and info.data.get("rule") == "orlomo":
            raise ValueError(
                "does not fit outer.rule = 'orlomo': it would turn the outer gradient without the momentum beside it"
            )
        return correction

    @field_validator("momentum_warmup_bins")
    @classmethod
    def _local_momentum_is_constant(cls, bins: int, info: ValidationInfo) -> int:
        if bins and info.data.get("rule") == "orlomo":
            raise ValueError("has no meaning with the rule orlomo, whose momentum is the workers' own; leave it out")
        return bins

    @field_validator("total_bins")
    @classmethod
    def _decay_has_an_end(cls, total_bins: int | None, info: ValidationInfo) -> int | None:
        if total_bins is None and info.data.get("lr_decay", "constant") != "constant":
            raise ValueError(f"is needed with outer.lr_decay = '{info.data['lr_decay']}'")
        return total_bins
