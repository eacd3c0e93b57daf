"""What a worker must remember to go on after its own restart, and whether a shard's answer lets it. Pure.

A worker's state is a few numbers, and of every fragment: where the current round started and where the model is, what
the uplink's codec still owes, what the estimate of own pushes keeps, and each push in flight with its bytes. It is a
plain nested dict of tensors, ints, strings, lists and None: torch.save and torch.load(weights_only=True) take it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from paceline_wire import codecs
from paceline_wire.codecs.base import Codec
from paceline_wire.errors import InvalidInputError
from paceline_wire.manifest import Manifest

_Kind = TypeVar("_Kind")

FORMAT = 1
"""Grows when the dict changes, so that a later version can tell what it reads."""

_LARGEST_NUMBER = (1 << 64) - 1


@dataclass(frozen=True, kw_only=True, eq=False)
class SavedPush:
    """A push in flight.

    Attributes:
        seq: Its number.
        base_bin: The bin of the newest values that the worker held.
        tokens: Tokens or samples that it stands for; None if nobody counted them.
        payload: The encoded outer gradient, uint8 [m].
        residual: What the codec owes once it is applied, float32 [n], or [2n] with local momentum; None: nothing.
        expected: What the worker expects of it, float32 [n]; None: nothing.
    """

    seq: int
    base_bin: int
    tokens: int | None
    payload: torch.Tensor
    residual: torch.Tensor | None
    expected: torch.Tensor | None


@dataclass(frozen=True, kw_only=True, eq=False)
class SavedFragment:
    """One fragment.

    Attributes:
        start: Where the current round started, float32 [n].
        values: Where the model is, float32 [n]; start minus values is the local progress.
        seq: The newest push that was encoded; 0: none.
        residual: What the codec owes of the pushes that were applied, float32 [n] or [2n]; None: nothing.
        velocity: What the estimate of own pushes keeps between them, float32 [n]; None: nothing.
        pushes: Those in flight, ascending.
    """

    start: torch.Tensor
    values: torch.Tensor
    seq: int
    residual: torch.Tensor | None
    velocity: torch.Tensor | None
    pushes: Sequence[SavedPush]

    @property
    def answered_seq(self) -> int:
        """The newest push that was answered, and all before it; 0: none."""
        return min((push.seq for push in self.pushes), default=self.seq + 1) - 1


@dataclass(frozen=True, kw_only=True, eq=False)
class SavedWorker:
    """A worker.

    Attributes:
        worker_id: Its name.
        incarnation: The start of the worker that saved this.
        manifest: Digest of the run's manifest.
        initialization_id: Whose first parameters the run has: tells it from one that was begun anew.
        uplink: Name of the codec of the pushes in flight.
        round: The current round.
        steps_in_round: Inner steps that it has.
        tokens: Tokens or samples counted for it; None if nobody counted any.
        fragments: Every fragment, in the order of the plan.
    """

    worker_id: str
    incarnation: int
    manifest: str
    initialization_id: int
    uplink: str
    round: int
    steps_in_round: int
    tokens: int | None
    fragments: Sequence[SavedFragment]

    def to_dict(self) -> dict[str, Any]:
        """The state as a plain dict; its tensors are shared, not copied."""
        fragments = [{**vars(each), "pushes": [dict(vars(push)) for push in each.pushes]} for each in self.fragments]
        return {"format": FORMAT, **vars(self), "fragments": fragments}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> "SavedWorker":
        """The state that `to_dict` gave; tensors come to the host.

        Raises:
            InvalidInputError: It is not such a dict; the text says what is wrong with it.
        """
        if _taken(state, "format", int) != FORMAT:
            raise InvalidInputError(
                f"the saved state has format {state['format']} and this version reads format {FORMAT}: "
                "go on with the version that saved it"
            )
        return cls(
            worker_id=_taken(state, "worker_id", str),
            incarnation=_number(state, "incarnation"),
            manifest=_taken(state, "manifest", str),
            initialization_id=_number(state, "initialization_id"),
            uplink=_taken(state, "uplink", str),
            round=_number(state, "round"),
            steps_in_round=_number(state, "steps_in_round"),
            tokens=_number_if_any(state, "tokens"),
            fragments=[_fragment(each) for each in _taken(state, "fragments", list)],
        )

    def require(self, *, worker_id: str, manifest: Manifest, initialization_id: int) -> None:
        """Make sure that this is the state of a worker with this name, of this model, in this run.

        Raises:
            InvalidInputError: It is not; the text says what differs and what to do.
        """
        if self.worker_id != worker_id:
            raise InvalidInputError(
                f"the saved state is of worker {self.worker_id!r}, and this one joined as {worker_id!r}: "
                f"join with worker_id={self.worker_id!r}, or leave the state out to begin as a new worker"
            )
        sizes = [fragment.num_elements for fragment in manifest.fragments]
        saved = [(each.start.numel(), each.values.numel()) for each in self.fragments]
        if self.manifest != manifest.digest or saved != [(size, size) for size in sizes]:
            raise InvalidInputError(
                "the saved state is of another model: its tensors or their cut are not this run's; "
                "leave it out to begin with the run's parameters"
            )
        for fragment, num_elements in zip(self.fragments, sizes, strict=True):
            _require_sizes(fragment, num_elements, codecs.codec(self.uplink))
        if self.initialization_id != initialization_id:
            raise InvalidInputError(
                f"the saved state is of another run (initialization {self.initialization_id:x}), and this one began "
                f"anew (initialization {initialization_id:x}): leave it out to begin with the run's parameters"
            )


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a shard got with a worker's pushes to one fragment.

    Attributes:
        seq: The newest push that was decided, and all before it; 0: none.
        superseded: Whether a later start of the worker has pushed that did not go on from the saved state.
    """

    seq: int
    superseded: bool = False


def staleness(saved: SavedWorker, progress: Sequence[Progress]) -> str | None:
    """Why a state is too old for its local progress to count, in a clause; None if it is not.

    One push more than the state knows is what a worker leaves that dies after its round ended and before it saved its
    state again: it does the rest of that round once more, and the push is answered without being applied again.
    """
    for index, (fragment, found) in enumerate(zip(saved.fragments, progress, strict=True)):
        if found.superseded:
            return f"another start of worker {saved.worker_id!r} has pushed to fragment {index} since"
        if found.seq > fragment.seq + 1:
            return f"the run has {found.seq} of this worker's pushes to fragment {index}, and the state {fragment.seq}"
        if found.seq < fragment.answered_seq:
            return f"the run has forgotten this worker, who was away for long, and its pushes to fragment {index}"
    return None


def _require_sizes(fragment: SavedFragment, num_elements: int, uplink: Codec) -> None:
    """Refuse vectors and payloads that would break an exchange later, in the middle of training."""
    sizes = (num_elements, 2 * num_elements)
    per_push = [(push.residual, push.expected) for push in fragment.pushes]
    residuals = [fragment.residual, *(residual for residual, _ in per_push)]
    others = [fragment.velocity, *(expected for _, expected in per_push)]
    fits = all(vector is None or vector.numel() in sizes for vector in residuals)
    fits = fits and all(vector is None or vector.numel() == num_elements for vector in others)
    payload_sizes = {uplink.encoded_bytes(size) for size in sizes}
    if not fits or any(push.payload.numel() not in payload_sizes for push in fragment.pushes):
        raise InvalidInputError(
            "the saved state does not fit together: what it keeps for its pushes is not of the fragments' sizes; "
            "leave it out to begin with the run's parameters"
        )


def _fragment(state: Any) -> SavedFragment:
    return SavedFragment(
        start=_vector(state, "start"),
        values=_vector(state, "values"),
        seq=_number(state, "seq"),
        residual=_vector_if_any(state, "residual"),
        velocity=_vector_if_any(state, "velocity"),
        pushes=[_push(each) for each in _taken(state, "pushes", list)],
    )


def _push(state: Any) -> SavedPush:
    return SavedPush(
        seq=_number(state, "seq"),
        base_bin=_number(state, "base_bin"),
        tokens=_number_if_any(state, "tokens"),
        payload=_vector(state, "payload", torch.uint8),
        residual=_vector_if_any(state, "residual"),
        expected=_vector_if_any(state, "expected"),
    )


def _taken(state: Any, key: str, kind: type[_Kind]) -> _Kind:
    value = state.get(key) if isinstance(state, Mapping) else None
    if not isinstance(value, kind):
        raise InvalidInputError(
            f"the saved state has no {kind.__name__} {key!r}: give load_state_dict what state_dict returned"
        )
    return value


def _number(state: Any, key: str) -> int:
    """A count, as the protocol's messages carry it."""
    number = _taken(state, key, int)
    if not 0 <= number <= _LARGEST_NUMBER:
        raise InvalidInputError(f"the saved state's {key} is {number}; it must be from 0 to {_LARGEST_NUMBER}")
    return number


def _number_if_any(state: Any, key: str) -> int | None:
    return None if isinstance(state, Mapping) and state.get(key) is None else _number(state, key)


def _vector(state: Any, key: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    vector = _taken(state, key, torch.Tensor)
    if vector.dtype is not dtype or vector.dim() != 1:
        raise InvalidInputError(
            f"the saved state's {key} is {vector.dtype} of shape {list(vector.shape)}; it must be {dtype} [n]"
        )
    return vector.detach().cpu()


def _vector_if_any(state: Any, key: str) -> torch.Tensor | None:
    return None if isinstance(state, Mapping) and state.get(key) is None else _vector(state, key)
