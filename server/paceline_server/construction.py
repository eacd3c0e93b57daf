"""From a configuration to the empty state of a shard, and to what workers are told of it."""

from paceline_server.config import ServerConfig
from paceline_server.guard import Guard
from paceline_server.ledger import Schedule, ScheduleKind
from paceline_server.membership import Membership
from paceline_server.quarantine import Quarantine
from paceline_server.rules.base import OuterRule, RuleSettings
from paceline_server.rules.heloco import DirectionCorrection
from paceline_server.rules.rates import Decay, Rates
from paceline_server.rules.registry import outer_rule
from paceline_server.shard import Shard
from paceline_wire import codecs
from paceline_wire.v1 import parameter_server_pb2 as pb


def build_shard(config: ServerConfig, index: int) -> Shard:
    """Return the empty state of one of the configuration's shards.

    Raises:
        ConfigurationError: The outer rule cannot be had; the text says why.
    """
    rule, correction = rule_of(config)
    return Shard(
        index=index,
        num_shards=config.shards,
        rule=rule,
        schedule=schedule_of(config),
        membership=Membership(
            lease_s=config.schedule.lease_s,
            inner_steps=config.exchange.inner_steps,
            dynamic_inner_steps=config.exchange.dynamic_inner_steps,
            quarantine=Quarantine(rounds=config.guard.quarantine_rounds, duration_s=config.guard.quarantine_s),
        ),
        guard=Guard(outlier_factor=config.guard.outlier_factor) if config.guard.refuse_outliers else None,
        correction=correction,
    )


def schedule_of(config: ServerConfig) -> Schedule:
    """Return when bins close and workers are answered."""
    return Schedule(
        kind=ScheduleKind(config.schedule.kind),
        quota=config.schedule.quota,
        quorum=config.schedule.quorum,
        look_ahead=config.look_ahead,
        late_bins=config.outer.late_bins,
    )


def rule_of(config: ServerConfig) -> tuple[OuterRule, DirectionCorrection | None]:
    """Return the outer rule, and what is done to pushes before it.

    Raises:
        ConfigurationError: The outer rule cannot be had; the text says why.
    """
    settings = RuleSettings(rates=rates_of(config), inner_steps=config.exchange.inner_steps)
    correction = DirectionCorrection() if config.outer.correction == "heloco" else None
    return outer_rule(config.outer.rule, settings), correction


def rates_of(config: ServerConfig) -> Rates:
    """Return the outer learning rate and momentum coefficient by bin."""
    outer = config.outer
    return Rates(
        peak_lr=outer.lr,
        full_momentum=outer.momentum,
        decay=Decay(outer.lr_decay),
        warmup_bins=outer.lr_warmup_bins,
        momentum_warmup_bins=outer.momentum_warmup_bins,
        total_bins=outer.total_bins or 1,
        final_share=outer.final_lr_share,
    )


def run_configuration(config: ServerConfig) -> pb.RunConfiguration:
    """What workers are told of the configuration."""
    exchange = config.exchange
    return pb.RunConfiguration(
        outer=pb.OuterConfiguration(
            rule=config.outer.rule,
            lr=config.outer.lr,
            momentum=config.outer.momentum,
            look_ahead=config.look_ahead,
            local_momentum=rule_of(config)[0].local_momentum,
        ),
        schedule=pb.ScheduleConfiguration(
            kind=pb.ScheduleKind.Value(f"SCHEDULE_KIND_{config.schedule.kind.upper()}"),
            quota=config.schedule.quota,
            quorum=config.schedule.quorum,
        ),
        exchange=pb.ExchangeConfiguration(
            uplink=codecs.wire_value(codecs.codec(exchange.uplink)),
            downlink=codecs.wire_value(codecs.codec(exchange.downlink)),
            inner_steps=exchange.inner_steps,
            dynamic_inner_steps=exchange.dynamic_inner_steps,
            own_weight=exchange.own_weight,
            window=exchange.window,
            connections=0 if exchange.connections == "auto" else int(exchange.connections),
            max_uplink_mbit=exchange.max_uplink_mbit,
            spread=exchange.spread,
        ),
    )
