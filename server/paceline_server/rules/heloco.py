"""HeLoCo's correction of direction (outer.correction = "heloco"): turns a push towards the momentum before it enters.

For each tensor, with D its part of the push, m the rule's momentum, c their cosine, and
conf = |D| / (|D| + kappa |m|):

    c >= keep:       D stays
    0 <= c < keep:   D turns towards m and keeps its length: |D| normalized((1 - l) D/|D| + l m/|m|),
                     l = min(1, turn (keep - c) conf)
    c < 0:           D loses part of what opposes m: D - s c |D| m/|m|,  s = min(shrink (-c) conf, most)

It composes with every rule that has a momentum; of OrLoMo's two vectors it turns q alone. A tensor that is divided
among fragments is corrected part by part. m is the momentum as the newest push left it.

Source: Al Asif et al., HeLoCo <arXiv 2606.00271>. The three cases and the confidence are the paper's; its formula for l
and its constants could not be obtained, so l and the four constants are ours.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class DirectionCorrection:
    """The correction's constants.

    Attributes:
        keep: Cosine from which a push stays as it is.
        turn: How strongly a weakly aligned push turns towards the momentum.
        shrink: How strongly a push loses what opposes the momentum.
        most: The largest part of it that is taken away.
        kappa: Weight of the momentum's length in the confidence.
    """

    keep: float = 0.5
    turn: float = 1.0
    shrink: float = 1.0
    most: float = 1.0
    kappa: float = 1.0

    def correct(self, g: torch.Tensor, momentum: torch.Tensor, bounds: Sequence[tuple[int, int]]) -> None:
        """Correct a push (float32 [n]) in place; bounds are the (start, end) of each tensor in the fragment."""
        for start, end in bounds:
            self._correct_tensor(g[start:end], momentum[start:end])

    def _correct_tensor(self, g: torch.Tensor, momentum: torch.Tensor) -> None:
        length, reference = float(torch.linalg.vector_norm(g)), float(torch.linalg.vector_norm(momentum))
        if not (0 < length < math.inf and 0 < reference < math.inf):
            return  # nothing to turn, nowhere to turn to, or numbers so large that their squares overflow
        cosine = float(torch.dot(g, momentum)) / (length * reference)
        confidence = length / (length + self.kappa * reference)
        if cosine < 0:
            part = min(self.shrink * -cosine * confidence, self.most)
            g.sub_(momentum * (part * cosine * length / reference))
        elif cosine < self.keep:
            turned = min(1.0, self.turn * (self.keep - cosine) * confidence)
            g.mul_(1 - turned).add_(momentum * (turned * length / reference))
            g.mul_(length / max(float(torch.linalg.vector_norm(g)), 1e-30))
