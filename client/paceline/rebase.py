"""The start of a round, handed between the training thread and the exchange thread.

The exchange thread proposes new starts whenever it learns something; the training thread takes the newest proposal at
its next optimizer-step boundary and shifts model and start by the same amount, so the outer gradient, start minus end,
is untouched. A proposal is computed against the start of that moment, without a lock; if the training thread has moved
the start meanwhile, the proposal is computed again. At the end of a round it is dropped, even if it is still being
computed: it knows nothing of the push that the round becomes, and whoever hands that over proposes anew.
"""

import threading
from dataclasses import dataclass

import torch

from paceline.model_state import FragmentState
from paceline.place import Handed


@dataclass(frozen=True, eq=False)
class _Proposal:
    start: Handed
    shift: Handed | None


class RoundStart:
    """One fragment's start of the current round.

    Args:
        state: The fragment of the live model.
        start: The values that the model has now, float32 [n] at the fragment's place.
    """

    def __init__(self, state: FragmentState, start: Handed) -> None:
        self._state = state
        self._lock = threading.Lock()
        self._start = start
        self._moves = 0
        self._rounds = 0
        self._proposal: _Proposal | None = None
        self._is_lent = False

    @property
    def current(self) -> Handed:
        """Where the current round started."""
        with self._lock:
            return self._start

    def restore(self, start: torch.Tensor, values: torch.Tensor) -> None:
        """Set the model to values, in a round that began at start (float32 [n] each, on the host or at the place).

        Called on the training thread.
        """
        place = self._state.place
        with self._lock:
            self._state.write(values)
            self._start = place.hand_over(place.from_host(start))
            self._moves += 1
            self._proposal = None

    def propose(self, start: torch.Tensor, *, replace: bool = False) -> None:
        """Propose a new start (float32 [n] at the place). Called on the exchange thread, within the place's stream.

        Args:
            start: The new start.
            replace: Set the model to the start instead of shifting it: for a model whose own values are unusable.
        """
        place, proposed = self._state.place, self._state.place.hand_over(start)
        with self._lock:
            current, moves, rounds = self._start, self._moves, self._rounds
        while True:
            shift = None if replace else place.to_model(start - current.take())
            with self._lock:
                if self._rounds != rounds:
                    return
                if self._moves == moves:
                    self._proposal = _Proposal(proposed, shift)
                    return
                current, moves = self._start, self._moves

    def adopt(self, *, untouched: bool) -> None:
        """Take the newest proposal, if there is one. Called on the training thread.

        The lock is held while the model changes: only the exchange thread can wait for it, and a proposal computed
        against the old start in between would be wrong.

        Args:
            untouched: No inner step has changed the model since its start: then it becomes the new start exactly,
                without the rounding of a shift.
        """
        with self._lock:
            proposal, self._proposal = self._proposal, None
            if proposal is None:
                return
            self._moves += 1
            if proposal.shift is None or untouched:
                self._start = self._state.write(proposal.start.take())
            elif self._state.is_full_precision:
                self._state.add(proposal.shift)
                self._start = proposal.start
            else:
                # A 16-bit model takes only part of a small shift. The start must move by just what the model moved,
                # or the difference would be taken for the work of inner steps.
                before = self._state.read().take()
                self._state.add(proposal.shift)
                moved = self._state.read().take() - before
                self._start = self._state.place.hand_over(self._start.take() + moved)

    def lend(self) -> Handed:
        """Let the exchange set the model to the next start; returns the start of the round that ends.

        Called on the training thread, which must not use the model until `take_back`.
        """
        with self._lock:
            self._is_lent = True
            return self._start

    def answer(self, start: torch.Tensor, *, replace: bool) -> None:
        """Set a model that is lent to a new start (float32 [n] at the place), or propose it, see `propose`.

        Of a tensor that is scattered in memory each write rewrites the whole, so only the training thread may do that.
        """
        with self._lock:
            is_lent = self._is_lent
            if is_lent and self._state.is_contiguous:
                self._start = self._state.write(start)
                self._moves += 1
                self._proposal = None
                self._is_lent = False
                return
        self.propose(start, replace=replace or is_lent)

    def take_back(self) -> None:
        """Lend the model no longer; if it was not set, it goes on where it is. Called on the training thread."""
        with self._lock:
            if not self._is_lent:
                return
            self._is_lent = False
            self._start = self._state.read()
            self._moves += 1

    def end_round(self, end: Handed) -> Handed:
        """Begin the next round at the model's present values; returns the start of the round that ends."""
        with self._lock:
            start, self._start = self._start, end
            self._rounds += 1
            self._proposal = None
        return start
