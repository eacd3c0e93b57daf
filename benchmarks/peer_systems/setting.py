"""What one process of a measurement is told, as JSON on its command line."""

import json
from dataclasses import asdict, dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One process of one system in one measurement."""

    system: str
    """Name of the module in this package."""
    role: Literal["coordinator", "worker"]
    """Which of its functions to call."""
    rank: int = 0
    """Number of the worker, from 0."""
    workers: int = 2
    """How many there are."""
    parameters: int
    """Float32 parameters of the model."""
    warm_up: int
    """First rounds, which do not count; at least one."""
    rounds: int
    """Rounds that count."""
    inner_steps: int = 1
    """Inner steps in a round."""
    step_s: float = 0.0
    """Seconds that an inner step lasts; 0: as long as it takes to change every parameter once."""
    host: str
    """Address of this process."""
    coordinator_host: str
    """Address of the coordinator; of worker 0 for systems without one."""
    port: int
    """Port of the coordinator."""
    interface: str
    """Name of the network interface to use."""
    options: dict[str, str] = field(default_factory=dict)
    """What else the system is told, such as its codecs."""

    @property
    def coordinator(self) -> str:
        """The coordinator's "host:port"."""
        return f"{self.coordinator_host}:{self.port}"

    def to_json(self) -> str:
        """As text for a command line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Setting":
        """The setting that `to_json` wrote."""
        return cls(**json.loads(text))
