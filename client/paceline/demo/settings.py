"""What a demo run is made of: everything that the command and its processes must agree on, and where it comes from."""

import json
from dataclasses import asdict, dataclass, field
from typing import Self

from paceline.demo.model import ModelConfig

SLOWNESS = (1.0, 1.0, 1.0, 4.0)
"""How many times slower than the fastest each of four workers is; more workers go on from the start of the list."""


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """One run of the demo.

    The rates were tuned in a simulation of this very run and confirmed with real processes. Both sides use the peak
    that was best for the lone worker: over two seeds it ended at 2.22, 2.22 and 2.26 nats per byte with 0.003, 0.004
    and 0.006, and without the falling rate never below 2.24.
    """

    workers: int = 4
    """Worker processes that train together."""
    seconds: float = 50.0
    """Training time of the four, and of the lone worker."""
    seed: int = 0
    """Decides the first parameters and which bytes each worker sees."""
    delay_ms: float = 50.0
    """One-way delay of every worker's link."""
    rate_mbit: float = 20.0
    """Rate of every worker's link in each direction, Mbit/s."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The model that is trained."""
    batch_size: int = 2
    """Sequences per inner step: few, so that gradients are noisy and averaging over workers has something to do."""
    learning_rate: float = 0.004
    """Peak of the inner AdamW's rate, together and alone."""
    step_s: float = 0.025
    """What an inner step of a fast worker lasts; computing it takes a fifth of that or so."""
    inner_steps: int = 16
    """Inner steps per round of the fastest worker; a slower one is given fewer by the server."""
    outer_lr: float = 0.7
    """The server's rate."""
    outer_momentum: float = 0.6
    """The server's momentum."""
    uplink: str = "int4"
    """Codec of what workers send."""
    downlink: str = "bf16"
    """Codec of what workers receive."""
    evaluation_interval_s: float = 2.5
    """Training time between two points of a loss curve."""
    evaluation_sequences: int = 384
    """Held-out sequences of one evaluation (25 kB of text), the same each time."""

    def slowness(self, index: int) -> float:
        """Return how many times slower than the fastest worker `index` is."""
        return SLOWNESS[index % len(SLOWNESS)]

    def to_json(self) -> str:
        """Write the settings as one line, the way child processes are given them."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote."""
        fields = json.loads(text)
        return cls(**{**fields, "model": ModelConfig(**fields["model"])})
