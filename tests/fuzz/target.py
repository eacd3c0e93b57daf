"""What is fuzzed: a target takes bytes, does with them what the product does, and says what came of it."""

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from fuzz.mutation import mutated_bytes
from paceline_wire.errors import PacelineError


class ViolationError(Exception):
    """The product accepted or refused an input, and something that must hold of it does not."""


class Target(ABC):
    """One reader of foreign bytes.

    Attributes:
        name: What the command line and the corpus call it.
        inputs: How many inputs a whole run gives it.
        errors: What it may raise; anything else is a finding.
    """

    name: ClassVar[str]
    inputs: ClassVar[int]
    errors: ClassVar[tuple[type[Exception], ...]] = (PacelineError,)

    @abstractmethod
    def seeds(self) -> Sequence[bytes]:
        """Valid inputs to begin from."""

    @abstractmethod
    def run(self, data: bytes) -> str:
        """Do with an input what the product does; returns what came of it, in words that tell apart what matters.

        Raises:
            ViolationError: Something does not hold that must.
        """

    def mutated(self, rng: random.Random, data: bytes, other: bytes) -> bytes:
        """A changed copy of an input; other is one to take pieces from."""
        return mutated_bytes(rng, data, other)

    def finish(self) -> None:  # noqa: B027  # most have nothing to finish
        """Check what can only be checked at the end, and let go of everything.

        Raises:
            ViolationError: Something does not hold that must.
        """
