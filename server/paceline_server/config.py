"""The configuration of a run: one frozen model, whose descriptions are also the flags' help and docs/configuration.md.

Nothing here reads the command line or the environment; `paceline_server.settings` builds a `ServerConfig` from them and
turns what is wrong into sentences. A relation between two fields is checked at the later one, so that the sentence
names a field and every problem is found at once.
"""

from pathlib import Path
from typing import Literal

from fsspec import available_protocols
from pydantic import Field, ValidationInfo, field_validator

from paceline_server.config_base import MAX_PORT, Section, check_host, split_address
from paceline_server.config_guard import GuardConfig
from paceline_server.config_limits import LimitsConfig
from paceline_server.config_outer import OuterConfig
from paceline_server.config_security import SecurityConfig

BLOCK_ELEMENTS = 256
"""Fragments are cut at multiples of the codecs' block (paceline_wire.codecs.base, which would import torch here)."""

MAX_FRAGMENT_ELEMENTS = 1 << 24
"""64 MiB as float32: a fragment is held whole several times over while it is received, applied and sent."""

DEFAULT_BUFFER_MIB = 512
"""Good for 40 streams; with 32 of them, 11 updates of the default fragment in bf16 and 42 pushes in int4 at once."""

DEFAULT_REFERENCE_MIB = 4096
"""What 10 workers hold of 100 million parameters."""

MAX_BUFFER_MIB = 1 << 20
"""A TiB."""

MAX_COUNT = (1 << 32) - 1
"""Counts travel as uint32."""

MAX_LEASE_S = 7 * 24 * 3600.0
"""A week. Leases travel as uint32 milliseconds, which end at seven of them."""


class ScheduleConfig(Section):
    """When bins close and when workers are answered."""

    kind: Literal["async", "participation", "quorum", "barrier"] = Field(
        default="async",
        description="async answers every push at once and closes a bin by quota; participation answers at once and "
        "closes a bin when all active workers have pushed; quorum answers when enough workers have contributed and a "
        "grace window has passed; barrier answers when all active workers have.",
    )
    quota: int | None = Field(
        default=None,
        ge=1,
        le=MAX_COUNT,
        description="Pushes in a bin. Left out: as many as there are active workers when the bin begins, or more if "
        "others join during it.",
    )
    quorum: int | None = Field(
        default=None,
        ge=1,
        le=MAX_COUNT,
        validate_default=True,
        description="Contributions that let a bin close; needed with the quorum schedule, and only there.",
    )
    lease_s: float = Field(
        default=30.0,
        gt=0,
        le=MAX_LEASE_S,
        allow_inf_nan=False,
        description="Longest silence, in seconds, before a worker stops counting as active. An upper bound: as soon as "
        "a worker's heartbeats show how regular they are, it is given up earlier, and no other time is to be set.",
    )

    @field_validator("quorum")
    @classmethod
    def _quorum_fits(cls, quorum: int | None, info: ValidationInfo) -> int | None:
        kind, quota = info.data.get("kind"), info.data.get("quota")
        if kind == "quorum" and quorum is None:
            raise ValueError("is needed with schedule.kind = 'quorum'")
        if quorum is not None and kind not in ("quorum", None):
            raise ValueError(f"has a meaning only with schedule.kind = 'quorum', which is {kind!r}; leave it out")
        if quorum is not None and quota is not None and quorum > quota:
            raise ValueError(f"should not be larger than schedule.quota, which is {quota}")
        return quorum


class ExchangeConfig(Section):
    """How workers exchange with the server, unless their own arguments say otherwise."""

    uplink: Literal["fp32", "bf16", "int8", "int4", "fp4", "topk"] = Field(
        default="int4",
        description="Codec of pushes, worker to server; topk sends 64 of every 4096 elements in 2 bits.",
    )
    downlink: Literal["fp32", "bf16", "int8", "int4"] = Field(
        default="bf16",
        description="Codec of updates, server to worker. fp32 and bf16 send the values; int8 and int4 their difference "
        "to what the worker holds, so that nothing of them is lost in the long run. For that a shard keeps what each "
        "worker holds, 4 bytes per parameter.",
    )
    fragment_elements: int = Field(
        default=4_194_304,
        ge=BLOCK_ELEMENTS,
        le=MAX_FRAGMENT_ELEMENTS,
        multiple_of=BLOCK_ELEMENTS,
        description="Largest number of elements in a fragment, the unit of exchange. Fixed once a run is initialized.",
    )
    inner_steps: int = Field(
        default=50,
        ge=1,
        le=MAX_COUNT,
        description="Optimizer steps of the fastest worker between two exchanges (H).",
    )
    dynamic_inner_steps: bool = Field(
        default=True,
        description="Give slower workers fewer inner steps, in proportion to their speed.",
    )
    own_weight: Literal["1/M", "1", "local", "predicted"] = Field(
        default="1",
        description="How a worker estimates what its pushes in flight will do: with their share among M workers (1/M), "
        "as if they stood for everybody's (1), by going on from where it is (local), or as 1 with the server's "
        "momentum, which doubles the updates (predicted).",
    )
    window: int = Field(
        default=1,
        ge=1,
        le=8,
        description="Rounds that a worker may have in flight before it waits. Under barrier and quorum, more than one "
        "makes a worker push twice to a bin, or late to the one before.",
    )
    connections: Literal["auto", "1", "2", "3", "4", "5", "6", "7", "8"] = Field(
        default="auto",
        description="TCP connections of a worker to each shard. auto: one, and over long links as many as make the "
        "exchange faster, which is tried.",
    )
    max_uplink_mbit: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="Mbit/s that a worker's pushes may take, to all shards together. Left out: no limit.",
    )
    spread: bool = Field(
        default=False,
        description="Let workers spread a round's pushes over the inner steps of the next round, instead of sending "
        "them as fast as the link takes them.",
    )
    buffer_mib: int = Field(
        default=DEFAULT_BUFFER_MIB,
        ge=1,
        le=MAX_BUFFER_MIB,
        description="MiB that a shard may take beside its state, however slow the links: 32 for its work (144 with "
        "fragments of 65536 elements or more, for compiled loops), 6 for each connection of a worker, and the rest, "
        "but at least a quarter, for pushes and updates under way, which wait for each other's room. At least twice "
        "the largest payload.",
    )
    reference_mib: int = Field(
        default=DEFAULT_REFERENCE_MIB,
        ge=0,
        le=MAX_BUFFER_MIB,
        description="MiB that a shard may take, with downlink = 'int8' or 'int4', for what workers hold: 4 bytes per "
        "parameter of the shard and worker. Beyond that, what workers without a connection hold is dropped, and "
        "where there are none, the others' updates are sent whole, in bf16.",
    )

    @field_validator("connections", mode="before")
    @classmethod
    def _connections_may_be_a_number(cls, connections: object) -> object:
        return str(connections) if type(connections) is int else connections

    @field_validator("own_weight", mode="before")
    @classmethod
    def _own_weight_may_be_a_number(cls, own_weight: object) -> object:
        return "1" if type(own_weight) is int and own_weight == 1 else own_weight


class StorageConfig(Section):
    """Where the run's state is kept."""

    data_dir: Path | None = Field(
        default=None,
        description="Directory of the journal and the snapshots, one folder in it for each shard. Left out: the state "
        "is held in memory, and ends with the process.",
    )
    sync: Literal["commit", "interval", "never"] = Field(
        default="commit",
        description="When the journal is forced to disk. commit: before a push is acknowledged, so that not even a "
        "power failure loses one; interval: every sync_interval_s, which is what a power failure may cost; never: when "
        "the system sees fit. A killed process loses nothing under any of them.",
    )
    sync_interval_s: float = Field(
        default=1.0, gt=0, le=3600, allow_inf_nan=False, description="Seconds between that, with sync = 'interval'."
    )
    replay_s: float = Field(
        default=4.0,
        gt=0,
        le=3600,
        allow_inf_nan=False,
        description="Processor seconds that replaying the journal may take before a snapshot is written: what bounds "
        "how long a restart takes.",
    )
    keep_snapshots: int = Field(
        default=2,
        ge=1,
        le=MAX_COUNT,
        description="Snapshots that are kept, each with the journal after it, so that an older one can serve when the "
        "newest is damaged.",
    )
    mirror: str | None = Field(
        default=None,
        validate_default=True,
        description="URL of a place to which snapshots are copied, such as s3://bucket/run or file:///mnt/backup: any "
        "that fsspec knows. Left out: none.",
    )

    arrivals: Path | None = Field(
        default=None,
        description="File to which shard 0 appends every push as it arrives, one JSON object a line, for `paceline "
        "simulate --replay`; other shards append their index to the name. Left out: none.",
    )

    @field_validator("mirror")
    @classmethod
    def _mirror_can_be_reached(cls, mirror: str | None, info: ValidationInfo) -> str | None:
        if mirror is None:
            return None
        if info.data.get("data_dir", mirror) is None:
            raise ValueError("needs storage.data_dir: what is mirrored are its snapshots")
        protocol = mirror.partition("://")[0]
        if "://" not in mirror or protocol not in available_protocols():
            raise ValueError(
                f"should be a URL that fsspec knows, with one of {', '.join(sorted(available_protocols()))}"
            )
        return mirror


class ServerConfig(Section):
    """The server processes and where they are found."""

    listen: str = Field(
        default="127.0.0.1:7070",
        description="host:port to listen on, such as 0.0.0.0:7070 or [::1]:7070; port 0 takes any free one.",
    )
    shard_addresses: tuple[str, ...] = Field(
        default=(),
        description="For shards that are started one by one, on hosts of their own: host:port of each, in order, as "
        "clients reach it. The same for all shards of a run. Left out: all shards run on this host.",
    )
    shard_index: int | None = Field(
        default=None,
        validate_default=True,
        ge=0,
        description="Which of shard_addresses this one is, from 0 on; needed with them.",
    )
    shards: int = Field(
        default=1,
        validate_default=True,
        ge=1,
        description="Server processes among which the fragments are divided; each listens one port above the one "
        "before. With shard_addresses it is their number, and need not be said.",
    )
    advertise_host: str = Field(
        default="",
        description="Host that clients are told for the other shards. Empty: the host at which they reached this one.",
    )
    outer: OuterConfig = Field(default_factory=OuterConfig)
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    exchange: ExchangeConfig = Field(default_factory=ExchangeConfig)
    guard: GuardConfig = Field(default_factory=GuardConfig)
    storage: StorageConfig = Field(default_factory=StorageConfig)
    security: SecurityConfig = Field(default_factory=SecurityConfig)
    limits: LimitsConfig = Field(default_factory=LimitsConfig)

    @field_validator("listen")
    @classmethod
    def _listen_is_an_address(cls, listen: str) -> str:
        split_address(listen)
        return listen

    @field_validator("shard_addresses")
    @classmethod
    def _shards_are_elsewhere(cls, addresses: tuple[str, ...]) -> tuple[str, ...]:
        for address in addresses:
            if split_address(address)[1] == 0:
                raise ValueError(f"should name the ports that clients reach, not the 0 of '{address}'")
            if addresses.count(address) > 1:
                raise ValueError(f"should name each shard once, not '{address}' twice")
        return addresses

    @field_validator("shard_index")
    @classmethod
    def _index_is_one_of_the_addresses(cls, index: int | None, info: ValidationInfo) -> int | None:
        if "shard_addresses" not in info.data:
            return index
        addresses = info.data["shard_addresses"]
        if addresses and index is None:
            raise ValueError(f"is needed with shard_addresses: which of the {len(addresses)} this one is, from 0 on")
        if index is not None and not addresses:
            raise ValueError("needs shard_addresses: where clients reach each of the shards, this one among them")
        if index is not None and index >= len(addresses):
            raise ValueError(f"should be less than {len(addresses)}, the number of shard_addresses")
        return index

    @field_validator("shards")
    @classmethod
    def _shards_are_as_many_as_addresses(cls, shards: int, info: ValidationInfo) -> int:
        addresses = info.data.get("shard_addresses", ())
        if addresses and shards not in (1, len(addresses)):
            raise ValueError(f"should be left out, or {len(addresses)}, the number of shard_addresses")
        return len(addresses) or shards

    @field_validator("shards")
    @classmethod
    def _shards_have_ports(cls, shards: int, info: ValidationInfo) -> int:
        if info.data.get("shard_addresses"):
            return shards
        port = split_address(info.data["listen"])[1] if "listen" in info.data else 0
        if port and port + shards - 1 > MAX_PORT:
            raise ValueError(f"should leave a port for each shard: there are {MAX_PORT - port + 1} from {port} on")
        return shards

    @field_validator("advertise_host")
    @classmethod
    def _advertised_host_is_a_host(cls, host: str, info: ValidationInfo) -> str:
        if host and info.data.get("shard_addresses"):
            raise ValueError("should be left out: shard_addresses name the hosts that clients are told")
        if host:
            check_host(host)
        return host

    @field_validator("exchange")
    @classmethod
    def _local_momentum_fits(cls, exchange: ExchangeConfig, info: ValidationInfo) -> ExchangeConfig:
        outer = info.data.get("outer")
        if outer is None:
            return exchange
        if outer.rule == "orlomo" and exchange.dynamic_inner_steps:
            raise ValueError(
                "exchange.dynamic_inner_steps = true does not fit outer.rule = 'orlomo', whose momentum decays by the "
                "inner steps of a round, equal for all: set it to false"
            )
        if outer.rule == "orlomo" and exchange.uplink == "topk":
            raise ValueError(
                "exchange.uplink = 'topk' does not fit outer.rule = 'orlomo': what it drops of a momentum cannot be "
                "sent later; use int8 or int4"
            )
        if exchange.own_weight == "predicted" and outer.rule not in ("ormo", "ormo-da"):
            raise ValueError(
                f"exchange.own_weight = 'predicted' knows the rules ormo and ormo-da only, not '{outer.rule}'"
            )
        return exchange

    @property
    def host(self) -> str:
        """The host to listen on, without brackets."""
        return split_address(self.listen)[0]

    @property
    def port(self) -> int:
        """The TCP port to listen on; 0: any free one."""
        return split_address(self.listen)[1]

    @property
    def shard_indexes(self) -> tuple[int, ...]:
        """The shards that are served here: all of them, or the one that shard_index names."""
        return tuple(range(self.shards)) if self.shard_index is None else (self.shard_index,)

    def port_of(self, index: int) -> int:
        """The TCP port on which a shard listens, if it is served here; 0: any free one."""
        return self.port + self.shard_indexes.index(index) if self.port else 0

    @property
    def look_ahead(self) -> bool:
        """Whether workers are sent the look-ahead (Nesterov) rather than the parameters as they stand (Polyak)."""
        if self.outer.publish is None:
            return self.schedule.kind in ("barrier", "quorum")
        return self.outer.publish == "look-ahead"
