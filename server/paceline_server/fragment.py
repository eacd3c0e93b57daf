"""One fragment's numbers: parameters and the rule's vectors, changed as decisions say, in pieces that fit a cache."""

from collections.abc import Iterator, Mapping, Sequence, Set

import torch

from paceline_server.ledger import Decision
from paceline_server.rules.base import Contribution, Numbers, OuterRule
from paceline_server.rules.heloco import DirectionCorrection
from paceline_server.rules.ordered_momentum import OrderedMomentum
from paceline_wire import codecs
from paceline_wire.codecs.base import Codec
from paceline_wire.codecs.compiled import CompiledCodec, MomentumStep
from paceline_wire.errors import StorageError

PIECE_ELEMENTS = 256 * 1024
"""Elements worked on at a time: w, u and a decoded push of this size (3 MiB) stay in a core's cache."""


class FragmentValues:
    """The parameters w of one fragment and the outer rule's state.

    Not safe for concurrent use: the caller lets one event at a time change a fragment.

    Args:
        initial: The first parameters, float32 [n]; kept, not copied.
        rule: How pushes change them.
        correction: What is done to a push first; None: nothing.
        tensor_bounds: The (start, end) in the fragment of each tensor's part, for the correction.
    """

    def __init__(
        self,
        initial: torch.Tensor,
        rule: OuterRule,
        *,
        correction: DirectionCorrection | None = None,
        tensor_bounds: Sequence[tuple[int, int]] = (),
    ) -> None:
        self.w = initial
        self.state = {name: torch.zeros_like(initial) for name in rule.state}
        self.open_bin = 0
        self.newest: Contribution | None = None
        self._tensor_bounds = tensor_bounds
        self._use(rule, correction)

    @property
    def num_elements(self) -> int:
        """Elements in the fragment."""
        return self.w.numel()

    @property
    def num_bytes(self) -> int:
        """Size of all numbers."""
        return 4 * self.num_elements * (1 + len(self.state))

    @property
    def push_elements(self) -> int:
        """Elements in a push: twice the fragment's where workers report their local momentum."""
        return self.num_elements * (2 if self._rule.local_momentum else 1)

    @property
    def momentum(self) -> torch.Tensor:
        """What moves the parameters when the next bin opens (float32 [n]); zeros if the rule has no such vector."""
        name = self._rule.momentum_vector
        return torch.zeros_like(self.w) if name is None else self.state[name]

    @property
    def vectors(self) -> dict[str, torch.Tensor]:
        """All numbers by name: w, and the rule's vectors (float32 [n] each)."""
        return {"w": self.w, **self.state}

    def restore(self, vectors: Mapping[str, torch.Tensor], open_bin: int, newest: Contribution | None) -> None:
        """Take up all numbers (float32 [n] each; kept, not copied) as they were.

        Raises:
            StorageError: They are not the vectors that the rule keeps, or of another size.
        """
        self._require_vectors(self._rule, vectors.keys() - {"w"})
        wrong = [name for name, vector in vectors.items() if vector.shape != self.w.shape]
        if wrong:
            raise StorageError(f"{wrong[0]} has {vectors[wrong[0]].numel()} elements, w has {self.num_elements}")
        self.w = vectors["w"]
        self.state = {name: vectors[name] for name in self._rule.state}
        self.open_bin, self.newest = open_bin, newest

    def take_rule(self, rule: OuterRule, correction: DirectionCorrection | None) -> None:
        """Change the numbers by another rule from here on.

        Raises:
            StorageError: It keeps other vectors.
        """
        self._require_vectors(rule, self.state.keys())
        self._use(rule, correction)

    def follow(self, decision: Decision, codec: Codec | None = None, payload: torch.Tensor | None = None) -> None:
        """Do what a decision says.

        Args:
            decision: What happens.
            codec: How the push is written, if the decision has a contribution.
            payload: The push (uint8 [codec.encoded_bytes(push_elements)]); it MUST have passed codec.check.
        """
        opened_before = self._next_bins(decision.bins_opened_before)
        opened_after = self._next_bins(decision.bins_opened_after)
        push, done = decision.contribution, 0
        if not (opened_before or push or opened_after):
            return
        if push is None:
            gradients: Iterator[torch.Tensor | None] = (None for _ in self._pieces(done))
        elif codec is None or payload is None:
            raise ValueError("a decision with a contribution needs the push that contributes")
        else:
            done = self._followed_compiled(codec, payload, opened_before, push, opened_after)
            gradients = self._decoded(codec, payload, done)
            self.newest = push
        for piece, g in zip(self._pieces(done), gradients, strict=True):
            numbers = Numbers(w=self.w[piece], state={name: vector[piece] for name, vector in self.state.items()})
            for opened in opened_before:
                self._rule.open_bin(numbers, opened)
            if push is not None and g is not None:
                self._rule.apply(numbers, g, push)
            for opened in opened_after:
                self._rule.open_bin(numbers, opened)

    def published(self) -> torch.Tensor:
        """What workers are sent, float32 [n]; a view of the parameters where that is what the rule publishes."""
        return self._rule.published(Numbers(w=self.w, state=self.state), self.newest)

    def encoded(self, codec: Codec, *, with_momentum: bool = False) -> torch.Tensor:
        """What workers are sent as a payload (uint8 [codec.encoded_bytes(n)], or of 2n with the momentum behind)."""
        values = self.published()
        return codecs.encode(codec, torch.cat((values, self.momentum)) if with_momentum else values)

    def _use(self, rule: OuterRule, correction: DirectionCorrection | None) -> None:
        self._rule = rule
        self._correction = correction if rule.momentum_vector is not None else None

    @staticmethod
    def _require_vectors(rule: OuterRule, names: Set[str]) -> None:
        if set(rule.state) != names:
            raise StorageError(
                f"the outer rule {type(rule).__name__} keeps the vectors {sorted(rule.state)}, and this run has "
                f"{sorted(names)}: outer.rule cannot change to it in a run that has begun"
            )

    def _next_bins(self, count: int) -> range:
        """Count bins as opened; returns their numbers."""
        opened = range(self.open_bin + 1, self.open_bin + 1 + count)
        self.open_bin += count
        return opened

    def _followed_compiled(
        self, codec: Codec, payload: torch.Tensor, before: range, push: Contribution, after: range
    ) -> int:
        """Do all that a decision says in one pass where there are loops for it; how many elements are done."""
        if not (isinstance(codec, CompiledCodec) and type(self._rule) is OrderedMomentum and self._correction is None):
            return 0
        u_rate, w_rate = self._rule.entering(push)
        momentum = self._rule.rates.momentum
        step = MomentumStep(
            before=[momentum(opened) for opened in before],
            u_rate=u_rate,
            w_rate=w_rate,
            after=[momentum(opened) for opened in after],
        )
        return codec.step(payload, self.w, self.state["u"], step)

    def _pieces(self, first: int) -> Iterator[slice]:
        for start in range(first, self.num_elements, PIECE_ELEMENTS):
            yield slice(start, min(start + PIECE_ELEMENTS, self.num_elements))

    def _decoded(self, codec: Codec, payload: torch.Tensor, first: int) -> Iterator[torch.Tensor]:
        """The push from an element on, in pieces; each may be overwritten, and is good until the next is asked for."""
        if self._correction is None and not self._rule.local_momentum:
            scratch = torch.empty(min(PIECE_ELEMENTS, self.num_elements))
            for piece in self._pieces(first):
                g = scratch[: piece.stop - piece.start]
                codec.decode_range(payload, self.num_elements, piece.start, g)
                yield g
            return
        whole = torch.empty(self.push_elements)
        codec.decode_range(payload, self.push_elements, 0, whole)
        if self._correction is not None:
            self._correction.correct(whole[: self.num_elements], self.momentum, self._tensor_bounds)
        halves = whole.view(2, -1) if self._rule.local_momentum else whole
        for piece in self._pieces(first):
            yield halves[..., piece]
