"""The part of the configuration about workers whose pushes cannot be used."""

from pydantic import Field

from paceline_server.config_base import Section

MAX_QUARANTINE_S = 7 * 24 * 3600.0
"""A week."""


class GuardConfig(Section):
    """How the run is guarded against pushes that would hurt it. What is not finite is always refused."""

    refuse_outliers: bool = Field(
        default=True,
        description="Refuse a push whose norm is out of all proportion to those of the fragment's last 64 pushes.",
    )
    outlier_factor: float = Field(
        default=20.0,
        gt=1,
        allow_inf_nan=False,
        description="How many times the median of the recent norms a push's norm may be. Where these differ widely "
        "among themselves, more is allowed.",
    )
    quarantine_rounds: int = Field(
        default=3,
        ge=1,
        le=1000,
        description="Rounds in a row, refused for what they contained, after which a worker is put in quarantine: "
        "nobody waits for it, and it is turned away. Outliers lead there only while at most half of the workers send "
        "them.",
    )
    quarantine_s: float = Field(
        default=600.0,
        ge=0,
        le=MAX_QUARANTINE_S,
        allow_inf_nan=False,
        description="Seconds that a quarantine lasts; 0: nobody is put there.",
    )
