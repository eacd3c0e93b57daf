"""Whether a worker's pushes are usable round after round. Pure.

A round is one seq of one incarnation: its pushes go to many fragments, and it counts once. It was refused if any of
them was refused for what it contained.
"""

from dataclasses import dataclass, replace

Round = tuple[int, int]
"""An incarnation and a seq: ordered as the worker sent them."""


@dataclass(frozen=True, kw_only=True)
class Conduct:
    """The latest rounds of a worker that were refused in a row.

    Attributes:
        refused: Those rounds, ascending.
        accepted: The earliest round after them of which a push was accepted; None: none yet. Should a push of the same
            round be refused too, the row goes on; should one of a later round, it begins anew.
    """

    refused: tuple[Round, ...] = ()
    accepted: Round | None = None

    def after_acceptance(self, accepted: Round) -> "Conduct":
        """The conduct once a push of a round was accepted."""
        if not self.refused or accepted <= self.refused[-1]:
            return self
        return replace(self, accepted=accepted if self.accepted is None else min(self.accepted, accepted))

    def after_refusal(self, refused: Round) -> "Conduct":
        """The conduct once a push of a round was refused for what it contained."""
        if self.refused and refused <= self.refused[-1]:
            return self
        if self.accepted is not None and self.accepted < refused:
            return Conduct(refused=(refused,))
        return Conduct(refused=(*self.refused, refused))

    @property
    def rounds_refused(self) -> int:
        """Rounds refused in a row; 0 once a later one was accepted whole so far."""
        return len(self.refused) if self.accepted is None else 0
