"""One fragment's numbers: parameters and momentum, changed as decisions say, in pieces that stay in the cache."""

import torch

from paceline_server.ledger import Decision
from paceline_server.outer import OrderedMomentum
from paceline_wire import codecs
from paceline_wire.codecs.base import Codec

PIECE_ELEMENTS = 256 * 1024
"""Elements worked on at a time: w, u and a decoded push of this size (3 MiB) stay in a core's cache."""


class FragmentValues:
    """The parameters w and the momentum u of one fragment.

    Not safe for concurrent use: the caller lets one event at a time change a fragment.

    Args:
        initial: The first parameters, float32 [n]; kept, not copied.
        rule: How pushes change them.
    """

    def __init__(self, initial: torch.Tensor, rule: OrderedMomentum) -> None:
        self.w = initial
        self.u = torch.zeros_like(initial)
        self._rule = rule

    @property
    def num_elements(self) -> int:
        """Elements in the fragment."""
        return self.w.numel()

    def follow(self, decision: Decision, codec: Codec | None = None, payload: torch.Tensor | None = None) -> None:
        """Do what a decision says.

        Args:
            decision: What happens.
            codec: How the push is written, if the decision has a contribution.
            payload: The push (uint8 [codec.encoded_bytes(n)]); it MUST have passed codec.check.
        """
        if not (decision.bins_opened_before or decision.contribution or decision.bins_opened_after):
            return
        num_elements = self.num_elements
        scratch = torch.empty(min(PIECE_ELEMENTS, num_elements))
        for start in range(0, num_elements, PIECE_ELEMENTS):
            w, u = self.w[start : start + PIECE_ELEMENTS], self.u[start : start + PIECE_ELEMENTS]
            for _ in range(decision.bins_opened_before):
                self._rule.open_bin(w, u)
            if decision.contribution is not None:
                if codec is None or payload is None:
                    raise ValueError("a decision with a contribution needs the push that contributes")
                g = scratch[: w.numel()]
                codec.decode_range(payload, num_elements, start, g)
                self._rule.apply(w, u, g, decision.contribution)
            for _ in range(decision.bins_opened_after):
                self._rule.open_bin(w, u)

    def encoded(self, codec: Codec) -> torch.Tensor:
        """The parameters as a payload (uint8 [codec.encoded_bytes(n)])."""
        return codecs.encode(codec, self.w)
