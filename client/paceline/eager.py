"""What a worker knows of one fragment between its pushes and their answers. Pure: no threads, no sockets, no clock.

The server keeps one canonical state and answers each push with it. The worker adds what it expects its own pushes in
flight to do, so that it never has to wait to see its own work:

    start of the next inner steps  =  base  -  sum of the expected steps of all own pushes not yet answered

With the expected step of OwnOuterStep and weight 1/M this is DiLoCo with eager updates, exactly: the outer optimizer is
linear in the gradients, so the paper's stale average with the own stale part replaced by the fresh one is the canonical
state plus the step that the own outer gradients alone would make.

Source: Kale et al., Eager Updates For Overlapped Communication and Computation in DiLoCo <arXiv 2502.12996>,
Algorithm 2; the server form is derived in docs/algorithms.md.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from paceline.uplink import Uplink, UplinkState, moved
from paceline_wire.codecs.base import Codec
from paceline_wire.codecs.feedback import Encoded
from paceline_wire.codecs.parts import Parts, whole


class Estimate(Protocol):
    """What a worker expects its own pushes to do to the published parameters of one fragment."""

    def adapt(self, *, lr: float, momentum: float) -> None:
        """Take the coefficients that the run's outer schedule has now; they count for what is expected from now on."""

    @property
    def velocity(self) -> torch.Tensor | None:
        """What it keeps between pushes, float32 [n]; None for nothing. A copy."""

    def restore(self, velocity: torch.Tensor | None) -> None:
        """Go on from what an estimate of the same kind kept (float32 [n]; not kept, copied); others ignore it."""

    def expect(self, push: Encoded, num_elements: int, num_workers: int) -> torch.Tensor | None:
        """What `start` needs to know of the newest push (float32 [n]); None for nothing.

        Called once for each push, in order. Its first num_elements (n) are the outer gradient: what the server will
        decode.
        """

    def start(
        self, base: torch.Tensor, momentum: torch.Tensor | None, expected: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """Where inner steps should go on from, float32 [n]; nothing that is given is changed.

        Args:
            base: The newest values that the server sent, float32 [n].
            momentum: The momentum that the server held then, float32 [n]; None if it was not sent.
            expected: What `expect` returned for each push in flight, in order.
        """


class _Memoryless:
    """Estimates that keep nothing between pushes."""

    @property
    def velocity(self) -> torch.Tensor | None:
        """Nothing."""
        return None

    def restore(self, velocity: torch.Tensor | None) -> None:
        """Nothing to go on from."""


class _ExpectedSteps(_Memoryless):
    """Estimates that expect a fixed displacement of every push, whatever the server's momentum."""

    def adapt(self, *, lr: float, momentum: float) -> None:
        """Nothing here depends on the coefficients."""

    def start(
        self, base: torch.Tensor, momentum: torch.Tensor | None, expected: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """Base minus all expected steps."""
        if not expected:
            return base
        start = base - expected[0]
        for step in expected[1:]:
            start.sub_(step)
        return start


class NoEstimate(_ExpectedSteps):
    """Expect nothing: work goes on from the newest base (blocking and delayed exchange)."""

    def expect(self, push: Encoded, num_elements: int, num_workers: int) -> None:
        """Expect no displacement."""


class LocalContinuation(_ExpectedSteps):
    """Go on from the local end point: the push is expected to do what the inner steps did."""

    def expect(self, push: Encoded, num_elements: int, num_workers: int) -> torch.Tensor:
        """The outer gradient itself."""
        return push.decode()[:num_elements]


class OwnOuterStep(_ExpectedSteps):
    """The outer step that this worker's own outer gradients alone would make, by a momentum fed only by them.

        v = beta v + D ;  step = weight lr (D + beta v) where replies look ahead (Nesterov), weight lr v where not

    Args:
        lr: The run's outer learning rate.
        momentum: The run's momentum coefficient beta.
        look_ahead: Whether the run's replies look ahead.
        whole: True expects the others to push the same (weight 1), False expects nothing of them (weight 1/M).
    """

    def __init__(self, *, lr: float, momentum: float, look_ahead: bool, whole: bool) -> None:
        self._lr = lr
        self._momentum = momentum
        self._look_ahead = look_ahead
        self._whole = whole
        self._velocity: torch.Tensor | None = None

    @property
    def velocity(self) -> torch.Tensor | None:
        """The momentum v, float32 [n]; None before the first push and without momentum. A copy."""
        return None if self._velocity is None else self._velocity.clone()

    def restore(self, velocity: torch.Tensor | None) -> None:
        """Go on with the momentum v (float32 [n], copied)."""
        self._velocity = None if velocity is None else velocity.clone()

    def adapt(self, *, lr: float, momentum: float) -> None:
        """Make the next steps with these coefficients."""
        self._lr, self._momentum = lr, momentum

    def expect(self, push: Encoded, num_elements: int, num_workers: int) -> torch.Tensor:
        """The outer step at this push, momentum of the earlier ones included."""
        rate = self._lr if self._whole else self._lr / num_workers
        step = torch.empty(num_elements, device=push.payload.device)
        if self._momentum == 0:
            self._velocity = None  # a schedule that raises the coefficient from 0 starts from the next push
        elif self._velocity is None:
            self._velocity = torch.zeros_like(step)
        for where, outer_gradient in push.decoded_pieces(num_elements):
            if self._velocity is None:
                torch.mul(outer_gradient, rate, out=step[where])
                continue
            velocity = self._velocity[where].mul_(self._momentum).add_(outer_gradient)
            if self._look_ahead:
                torch.mul(velocity, self._momentum, out=step[where]).add_(outer_gradient).mul_(rate)
            else:
                torch.mul(velocity, rate, out=step[where])
        return step


class PredictedServer(_Memoryless):
    """Play the server: from its newest parameters and momentum on, each push in flight fills a bin of its own.

    The others are expected to push the same. For each push D, in order of seq:

        look-ahead (Nesterov):  u += lr D ;  w -= lr D ;  w -= beta u ;  u *= beta
        not (Polyak):           w -= beta u ;  u *= beta ;  u += lr D ;  w -= lr D

    so with look-ahead one push gives w - beta u - lr (1 + beta) D.

    Args:
        lr: The run's outer learning rate.
        momentum: The run's momentum coefficient beta.
        look_ahead: Whether the run's replies look ahead.
    """

    def __init__(self, *, lr: float, momentum: float, look_ahead: bool) -> None:
        self._lr = lr
        self._momentum = momentum
        self._look_ahead = look_ahead

    def adapt(self, *, lr: float, momentum: float) -> None:
        """Play the server with these coefficients."""
        self._lr, self._momentum = lr, momentum

    def expect(self, push: Encoded, num_elements: int, num_workers: int) -> torch.Tensor:
        """The outer gradient: what it does depends on the momentum that it meets."""
        return push.decode()[:num_elements]

    def start(
        self, base: torch.Tensor, momentum: torch.Tensor | None, expected: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """The parameters that the server will publish once it has all pushes in flight."""
        if not expected:
            return base
        w = base.clone()
        u = torch.zeros_like(base) if momentum is None else momentum.clone()
        for outer_gradient in expected:
            if not self._look_ahead:
                self._open_bin(w, u)
            u.add_(outer_gradient, alpha=self._lr)
            w.sub_(outer_gradient, alpha=self._lr)
            if self._look_ahead:
                self._open_bin(w, u)
        return w

    def _open_bin(self, w: torch.Tensor, u: torch.Tensor) -> None:
        u.mul_(self._momentum)
        w.sub_(u)


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedPush:
    """What is sent for one fragment at the end of a round.

    Attributes:
        seq: Counts the pushes to this fragment from 1.
        base_bin: The bin of the newest values that the worker holds.
        payload: The encoded outer gradient, uint8 [m].
    """

    seq: int
    base_bin: int
    payload: torch.Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class FragmentMemory:
    """What a worker remembers of its pushes to one fragment; its tensors are read-only.

    Attributes:
        uplink: What the uplink remembers.
        velocity: What the estimate keeps, float32 [n]; None: nothing.
        expected: What is expected of each push in flight, by seq (float32 [n]); None: nothing.
    """

    uplink: UplinkState = field(default_factory=UplinkState)
    velocity: torch.Tensor | None = None
    expected: Mapping[int, torch.Tensor | None] = field(default_factory=dict)

    def moved(self, move: Callable[[torch.Tensor], torch.Tensor]) -> "FragmentMemory":
        """The same, each tensor where move brings it."""
        return FragmentMemory(
            uplink=self.uplink.moved(move),
            velocity=None if self.velocity is None else move(self.velocity),
            expected=moved(self.expected, move),
        )


class WorkerFragment:
    """One fragment as a worker sees it.

    Args:
        base: The newest values that the server sent, float32 [n]; kept, not copied.
        bin: The bin that outer gradients computed from them belong to.
        codec: How pushes are written.
        estimate: What the worker expects of its pushes in flight.
        error_feedback: Whether what the codec loses of a push is added to the next.
    """

    def __init__(
        self,
        *,
        base: torch.Tensor,
        bin: int,  # noqa: A002
        codec: Codec,
        estimate: Estimate,
        error_feedback: bool = True,
    ) -> None:
        self._base = base
        self._momentum: torch.Tensor | None = None
        self._bin = bin
        self._uplink = Uplink(codec, error_feedback=error_feedback)
        self._estimate = estimate
        self._expected: dict[int, torch.Tensor | None] = {}
        self._included_seq = 0

    @property
    def base(self) -> torch.Tensor:
        """The newest values that the server sent, float32 [n]."""
        return self._base

    def push(
        self,
        start: torch.Tensor,
        end: torch.Tensor | Parts,
        num_workers: int,
        local_momentum: torch.Tensor | None = None,
    ) -> PreparedPush:
        """Encode an outer gradient, start minus end, with what the codec lost of earlier ones; count it as in flight.

        The loss carried over is committed only when the push is acknowledged as applied. An outer gradient that is not
        finite is prepared all the same, expected to do nothing: the server refuses it and says why.

        Args:
            start: Where the round started, float32 [n].
            end: Where it ended, float32 [n], in one tensor or in several, one behind the other.
            num_workers: How many share the learning rate.
            local_momentum: The momentum of the inner steps, float32 [n], where the run orders it: encoded after the
                outer gradient; nothing is expected of it.
        """
        if local_momentum is None:
            push = self._uplink.encode(start, minus=end)
        else:
            ended = end if isinstance(end, torch.Tensor) else whole(end)
            push = self._uplink.encode(torch.cat((start - ended, local_momentum)))
        expected = self._estimate.expect(push.encoded, start.numel(), num_workers)
        self._expected[push.seq] = expected if push.seq > self._included_seq else None
        return PreparedPush(seq=push.seq, base_bin=self._bin, payload=push.encoded.payload)

    def receive(
        self,
        seq: int,
        values: torch.Tensor,
        bin: int,  # noqa: A002
        *,
        applied: bool,
        momentum: torch.Tensor | None = None,
    ) -> None:
        """Take the answer to a push: the server's newest values (float32 [n]; kept, not copied) and their bin.

        Args:
            seq: The push.
            values: The values.
            bin: The bin that outer gradients computed from them belong to.
            applied: Whether the push was applied; else it was refused.
            momentum: The server's momentum, float32 [n], kept; None if it was not sent.
        """
        self._uplink.settle(seq, applied=applied)
        del self._expected[seq]
        self.rebase(values, bin, momentum)

    def rebase(self, values: torch.Tensor, bin: int, momentum: torch.Tensor | None = None) -> None:  # noqa: A002
        """Take newer server values (float32 [n]; kept, not copied), their bin, and the momentum if it was sent."""
        self._base = values
        self._bin = bin
        self._momentum = momentum

    @property
    def state(self) -> "FragmentMemory":
        """What it remembers of its pushes at this moment."""
        return FragmentMemory(
            uplink=self._uplink.state, velocity=self._estimate.velocity, expected=dict(self._expected)
        )

    def restore(self, memory: "FragmentMemory", included_seq: int) -> None:
        """Go on from what a worker remembered of its pushes to this fragment.

        Args:
            memory: What it remembered.
            included_seq: The newest push, known here or not, that is in the base already: nothing more is expected of
                it and those before it.
        """
        self._uplink.restore(memory.uplink)
        self._estimate.restore(memory.velocity)
        self._included_seq = included_seq
        self._expected = {seq: known if seq > included_seq else None for seq, known in memory.expected.items()}

    def adapt(self, *, lr: float, momentum: float) -> None:
        """Take the outer coefficients that the run has now."""
        self._estimate.adapt(lr=lr, momentum=momentum)

    def new_start(self) -> torch.Tensor:
        """Where inner steps should go on from (float32 [n]): the base, and what is expected of the pushes in flight."""
        expected = [known for known in self._expected.values() if known is not None]
        return self._estimate.start(self._base, self._momentum, expected)
