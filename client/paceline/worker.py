"""The logic of one worker: its rounds, its pushes, where its model goes on from. Pure: no sockets, no loop, no clock.

`Run` and `Exchanger` drive it with threads and a network, the simulator with a virtual clock. The way of a round:

    after_step ... after_step     one for every inner step; `adopt` at these boundaries takes the newest proposed start
    end_round                     once `is_full` and the window has room: what the round has done, to be pushed
    prepare                       fragment by fragment: encode the outer gradient, propose a start that includes it
    take_in                       fragment by fragment, when the answer comes: propose the start that follows from it

`after_step`, `adopt`, `end_round` and `count` belong to the training thread, `prepare` and `take_in` to whoever
exchanges; of one fragment, those two are called one at a time and in order.

A worker that is to survive its process saves `positions` and, fragment by fragment, `memory` (worker_state.py); the
next process makes a new one and lets it `restore` them, before anything else.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum

import torch

from paceline.eager import (
    Estimate,
    FragmentMemory,
    LocalContinuation,
    NoEstimate,
    OwnOuterStep,
    PredictedServer,
    PreparedPush,
    WorkerFragment,
)
from paceline.model_state import FragmentState
from paceline.place import Handed, Place
from paceline.placement import places_of
from paceline.rebase import RoundStart
from paceline.uplink import UplinkState
from paceline.worker_state import Progress, SavedFragment, SavedWorker
from paceline_wire.codecs.base import Codec
from paceline_wire.errors import InvalidInputError
from paceline_wire.manifest import Fragment, Manifest
from paceline_wire.v1 import parameter_server_pb2 as pb

_STEP_TIME_MEMORY = 0.9
"""Weight of the past in the running mean of an inner step's seconds: about the last ten steps count."""


class Overlap(Enum):
    """What a worker does while its push is under way."""

    EAGER = "eager"
    """Go on from the newest base plus the own estimate of what is in flight."""
    DELAYED = "delayed"
    """Go on from the newest base; the own push shows when its answer comes."""
    BLOCKING = "blocking"
    """Wait for the answer."""


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """How a worker exchanges.

    Attributes:
        configuration: What the server tells of the run.
        overlap: What to do while a push is under way.
        uplink: How pushes are written.
        error_feedback: Whether what that loses of a push is added to the next.
    """

    configuration: pb.RunConfiguration
    overlap: Overlap
    uplink: Codec
    error_feedback: bool = True

    @property
    def window(self) -> int:
        """Rounds that may be in flight before the training thread waits."""
        return 1 if self.overlap is Overlap.BLOCKING else max(1, self.configuration.exchange.window)


@dataclass(frozen=True, kw_only=True, eq=False)
class ReceivedUpdate:
    """The server's answer to a push.

    Attributes:
        values: The fragment's newest values, float32 [n] at its place.
        server_momentum: The momentum that the server holds with them, float32 [n] there; None if it was not sent.
        bin: The bin that outer gradients computed from them belong to.
        bins_late: How late the push was when it was applied.
        refusal: Why it was not applied; None if it was.
        inner_steps: Inner steps for the next round.
        quota: Pushes that share the learning rate.
        lr: The outer learning rate that the run has now; 0: not told.
        momentum: The momentum coefficient that the run has now, if lr is told.
        num_bytes: Size of the encoded values.
    """

    values: torch.Tensor
    server_momentum: torch.Tensor | None = None
    bin: int
    bins_late: int
    refusal: str | None
    inner_steps: int
    quota: int
    lr: float = 0.0
    momentum: float = 0.0
    num_bytes: int


@dataclass(frozen=True, kw_only=True, eq=False)
class EndedFragment:
    """What a round has done to one fragment.

    Attributes:
        start: Where it began.
        end: Where it ended; None: where the model is, which is lent.
        local_momentum: The momentum of its inner steps; None where the run does not order it.
    """

    start: Handed
    end: Handed | None
    local_momentum: Handed | None


class EndedRound:
    """What a round has done, fragment by fragment; each is taken out once, and its memory is free once it is encoded.

    Attributes:
        tokens: Tokens or samples that it stands for; None if nobody counted them.

    Args:
        fragments: What it has done to each.
        tokens: See above.
    """

    def __init__(self, fragments: Iterable[EndedFragment], tokens: int | None) -> None:
        self.tokens = tokens
        self._fragments = dict(enumerate(fragments))

    def take(self, index: int) -> EndedFragment:
        """What it has done to a fragment."""
        return self._fragments.pop(index)


class Worker:
    """One worker of a run.

    Args:
        settings: How it exchanges.
        manifest: What is exchanged.
        tensors: The live model's tensors by name, detached; set to the bases.
        bases: Each fragment's values (float32 [n] on the host; kept) and bin, as they were fetched.
        places: Where the exchange works on each fragment; None: where the model is.
        inner_steps: Inner steps in a round, as the server said.
        num_workers: How many share the learning rate, as the server said.

    Raises:
        InvalidInputError: The run asks for an estimate that this version does not know.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        manifest: Manifest,
        tensors: Mapping[str, torch.Tensor],
        bases: Sequence[tuple[torch.Tensor, int]],
        *,
        inner_steps: int,
        num_workers: int,
        places: Sequence[Place] | None = None,
    ) -> None:
        self.inner_steps = inner_steps
        self.round = 0
        self.steps_in_round = 0
        self._num_workers = num_workers
        self._settings = settings
        self._untouched = True
        self._is_lent = False
        self._tokens: int | None = None
        self._plan = manifest.fragments
        self._places = places or places_of(manifest, tensors)
        self._states = [
            FragmentState(plan, tensors, place) for plan, place in zip(self._plan, self._places, strict=True)
        ]
        self._fragments = [
            WorkerFragment(
                base=self._placed(index, values),
                bin=base_bin,
                codec=settings.uplink,
                estimate=estimate_of(settings, self._plan[index]),
                error_feedback=settings.error_feedback,
            )
            for index, (values, base_bin) in enumerate(bases)
        ]
        self._starts = [
            RoundStart(state, state.write(values)) for state, (values, _) in zip(self._states, bases, strict=True)
        ]

    def _placed(self, index: int, values: torch.Tensor) -> torch.Tensor:
        """Values (float32 [n] on the host) where the exchange works on a fragment."""
        place = self._places[index]
        with place.stream():
            return place.from_host(values)

    @property
    def num_fragments(self) -> int:
        """Fragments of the run."""
        return len(self._plan)

    @property
    def untouched(self) -> bool:
        """Whether no inner step has changed the model since the last start that was adopted whole."""
        return self._untouched

    @property
    def is_lent(self) -> bool:
        """Whether the exchange reads and sets the model itself, and the training thread must not use it."""
        return self._is_lent

    @property
    def tokens(self) -> int | None:
        """Tokens or samples that the current round stands for so far; None if nobody counted them."""
        return self._tokens

    def after_step(self, steps: int = 1) -> None:
        """Count inner steps that have changed the model."""
        self.steps_in_round += steps
        self._untouched = False

    def count(self, tokens: int) -> None:
        """Add tokens or samples to what the round stands for."""
        self._tokens = tokens + (self._tokens or 0)

    def is_full(self, own_inner_steps: int | None = None) -> bool:
        """Whether the round has its steps: as many as the worker wants itself, else as the server said."""
        return self.steps_in_round >= (own_inner_steps or self.inner_steps)

    def adopt(self) -> None:
        """Take what has been proposed, at a boundary between two inner steps, and the model back if it was lent."""
        self.take_back()
        for start in self._starts:
            start.adopt(untouched=self._untouched)

    def take_back(self) -> None:
        """Take back a model that is lent: the exchange sets it no more, and proposes what has not come yet.

        Not before the round that has ended is encoded: its end is where the model is.
        """
        if not self._is_lent:
            return
        for start in self._starts:
            start.take_back()
        for place in set(self._places):
            place.take_model_back()
        self._is_lent = False

    def end_round(self, local_momentum: Mapping[str, torch.Tensor] | None = None) -> EndedRound:
        """End the round where the model is, and begin the next there.

        A worker that waits for every answer (blocking) must not use the model before `adopt`.

        Args:
            local_momentum: The momentum of the inner steps by name, with their learning rate inside; given exactly if
                the run orders it.
        """
        starts, ends = self._ended()
        local_momenta = [
            None
            if local_momentum is None or plan.role != "parameter"
            else FragmentState(plan, local_momentum, place).read()
            for plan, place in zip(self._plan, self._places, strict=True)
        ]
        fragments = zip(starts, ends, local_momenta, strict=True)
        ended = EndedRound(
            [EndedFragment(start=start, end=end, local_momentum=momentum) for start, end, momentum in fragments],
            self._tokens,
        )
        self.round += 1
        self.steps_in_round = 0
        self._untouched = True
        self._tokens = None
        return ended

    def _ended(self) -> tuple[list[Handed], list[Handed | None]]:
        """Where each fragment's round started, and where it ended."""
        if self._settings.overlap is Overlap.BLOCKING:
            self._is_lent = True
            for place in set(self._places):
                place.lend_model()
            return [start.lend() for start in self._starts], [None] * len(self._starts)
        ends = [state.read() for state in self._states]
        return [start.end_round(end) for start, end in zip(self._starts, ends, strict=True)], [*ends]

    def prepare(self, index: int, ended: EndedRound) -> PreparedPush:
        """Encode a fragment's outer gradient, once, and propose a start that includes what is expected of it.

        Returns:
            The push, its payload on the host.
        """
        fragment, place, work = self._fragments[index], self._places[index], ended.take(index)
        with place.stream():
            end = self._states[index].lent() if work.end is None else work.end.take()
            prepared = fragment.push(
                work.start.take(),
                end,
                self._num_workers,
                None if work.local_momentum is None else work.local_momentum.take(),
            )
            del work, end
            if self._settings.overlap is not Overlap.BLOCKING:
                self._starts[index].propose(fragment.new_start())
            return replace(prepared, payload=place.to_host(prepared.payload))

    def take_in(self, index: int, seq: int, update: ReceivedUpdate) -> None:
        """Take the answer to a fragment's push, and propose the start that follows from it."""
        fragment, applied = self._fragments[index], update.refusal is None
        if update.lr:
            lr, momentum = _coefficients(self._settings, self._plan[index], update.lr, update.momentum)
            fragment.adapt(lr=lr, momentum=momentum)
        fragment.receive(seq, update.values, update.bin, applied=applied, momentum=update.server_momentum)
        with self._places[index].stream():
            self._starts[index].answer(fragment.new_start(), replace=not applied)
        if index == 0:
            self.inner_steps = update.inner_steps
            self._num_workers = update.quota

    def adopt_canonical(self, bases: Sequence[tuple[torch.Tensor, int]]) -> None:
        """Set the model to the run's values; nothing may be in flight. Called on the training thread.

        Args:
            bases: Each fragment's values (float32 [n] on the host; kept) and bin.
        """
        for index, (values, newest_bin) in enumerate(bases):
            with self._places[index].stream():
                placed = self._places[index].from_host(values)
                self._fragments[index].rebase(placed, newest_bin)
                self._starts[index].propose(placed, replace=True)
        self._untouched = True
        self.adopt()

    def positions(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Where each fragment's round started and where the model is, float32 [n] on the host.

        Called on the training thread.
        """
        values = [state.read() for state in self._states]
        return [
            (start.current.take().cpu(), read.take().cpu()) for start, read in zip(self._starts, values, strict=True)
        ]

    def memory(self, index: int) -> FragmentMemory:
        """What is remembered of the pushes to a fragment, on the host; not while `prepare` or `take_in` works on it."""
        with self._places[index].stream():
            # Not through pinned memory, of which torch keeps for good what a checkpoint takes once.
            return self._fragments[index].state.moved(torch.Tensor.cpu)

    def restore(
        self, saved: SavedWorker, bases: Sequence[tuple[torch.Tensor, int]], progress: Sequence[Progress]
    ) -> None:
        """Go on from a saved state that is not stale: newest base plus what is expected, minus the local progress.

        A fragment to which one push more was decided than the state knows stays where it was: its round ended before,
        and is done once more until then.

        Args:
            saved: The state.
            bases: Each fragment's newest values (float32 [n] on the host; kept) and bin, fetched after the progress was
                told.
            progress: How far the shards got, fragment by fragment.
        """
        self.round, self.steps_in_round, self._tokens = saved.round, saved.steps_in_round, saved.tokens
        self._untouched = saved.steps_in_round == 0
        for index, (values, newest_bin) in enumerate(bases):
            fragment, start = self._fragments[index], self._starts[index]
            of, found = saved.fragments[index], progress[index]
            place = self._places[index]
            start.restore(of.start, of.values)
            with place.stream():
                fragment.rebase(place.from_host(values), newest_bin)
                fragment.restore(_memory_of(of).moved(place.from_host), found.seq)
                if found.seq <= of.seq:
                    start.propose(fragment.new_start())
        self.adopt()

    def begin_anew(
        self, round_number: int, bases: Sequence[tuple[torch.Tensor, int]], progress: Sequence[Progress]
    ) -> None:
        """Begin a round at the run's values, as a worker whose saved state is stale; pushes go on where the run is.

        Args:
            round_number: What to call the round.
            bases: Each fragment's newest values (float32 [n] on the host; kept) and bin.
            progress: How far the shards got, fragment by fragment.
        """
        self.round = round_number
        for fragment, found in zip(self._fragments, progress, strict=True):
            fragment.restore(FragmentMemory(uplink=UplinkState(seq=found.seq)), found.seq)
        self.adopt_canonical(bases)


class StepTime:
    """The running mean of an inner step's duration, which a worker reports as its speed."""

    def __init__(self) -> None:
        self.mean_s: float | None = None

    def observe(self, took_s: float, steps: int = 1) -> None:
        """Note inner steps that took so many seconds each."""
        past = _STEP_TIME_MEMORY**steps
        self.mean_s = took_s if self.mean_s is None else past * self.mean_s + (1 - past) * took_s


def estimate_of(settings: WorkerSettings, fragment: Fragment) -> Estimate:
    """What a worker expects of its pushes to a fragment.

    Raises:
        InvalidInputError: The run asks for an estimate that this version does not know.
    """
    outer, own_weight = settings.configuration.outer, settings.configuration.exchange.own_weight
    if settings.overlap is not Overlap.EAGER:
        return NoEstimate()
    if own_weight == "local":
        return LocalContinuation()
    if own_weight not in ("1", "1/M", "predicted"):
        raise InvalidInputError(f"the server asks for own_weight {own_weight!r}, which this version does not know")
    lr, momentum = _coefficients(settings, fragment, outer.lr, outer.momentum)
    if own_weight == "predicted" and fragment.role == "parameter" and not outer.local_momentum:
        return PredictedServer(lr=lr, momentum=momentum, look_ahead=outer.look_ahead)
    return OwnOuterStep(lr=lr, momentum=momentum, look_ahead=outer.look_ahead, whole=own_weight != "1/M")


def _memory_of(saved: SavedFragment) -> FragmentMemory:
    residuals = {push.seq: push.residual for push in saved.pushes}
    return FragmentMemory(
        uplink=UplinkState(seq=saved.seq, residual=saved.residual, residuals_in_flight=residuals),
        velocity=saved.velocity,
        expected={push.seq: push.expected for push in saved.pushes},
    )


def _coefficients(settings: WorkerSettings, fragment: Fragment, lr: float, momentum: float) -> tuple[float, float]:
    """The outer coefficients that an estimate of a fragment uses, given those that the run has now.

    Buffers are averaged without momentum, whatever the rule. Where the rule orders the workers' local momentum, its
    momentum is made of that and not of outer gradients, so an outer gradient is expected to do its own step alone.
    """
    if fragment.role == "averaged":
        return 1.0, 0.0
    return lr, 0.0 if settings.configuration.outer.local_momentum else momentum
