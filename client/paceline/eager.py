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

from dataclasses import dataclass
from typing import Protocol

import torch

from paceline.uplink import Uplink
from paceline_wire.codecs.base import Codec


class Estimate(Protocol):
    """What a worker expects a push of its own to do to the published parameters of one fragment."""

    def step(self, outer_gradient: torch.Tensor, num_workers: int) -> torch.Tensor | None:
        """The displacement, to be subtracted (float32 [n]), of the newest push; None for none.

        Called once for each push, in order. outer_gradient is what the server will decode, and is not changed.
        """


class NoEstimate:
    """Expect nothing: work goes on from the newest base (blocking and delayed exchange)."""

    def step(self, outer_gradient: torch.Tensor, num_workers: int) -> None:
        """Expect no displacement."""


class LocalContinuation:
    """Go on from the local end point: the push is expected to do what the inner steps did."""

    def step(self, outer_gradient: torch.Tensor, num_workers: int) -> torch.Tensor:
        """The outer gradient itself."""
        return outer_gradient


class OwnOuterStep:
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

    def step(self, outer_gradient: torch.Tensor, num_workers: int) -> torch.Tensor:
        """The outer step at this push, momentum of the earlier ones included."""
        rate = self._lr if self._whole else self._lr / num_workers
        if self._momentum == 0:
            return outer_gradient * rate
        if self._velocity is None:
            self._velocity = outer_gradient.clone()
        else:
            self._velocity.mul_(self._momentum).add_(outer_gradient)
        if not self._look_ahead:
            return self._velocity * rate
        return (self._velocity * self._momentum).add_(outer_gradient).mul_(rate)


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


class WorkerFragment:
    """One fragment as a worker sees it.

    Args:
        base: The newest values that the server sent, float32 [n]; kept, not copied.
        bin: The bin that outer gradients computed from them belong to.
        codec: How pushes are written.
        estimate: What the worker expects of its pushes in flight.
    """

    def __init__(self, *, base: torch.Tensor, bin: int, codec: Codec, estimate: Estimate) -> None:  # noqa: A002
        self._base = base
        self._bin = bin
        self._uplink = Uplink(codec)
        self._estimate = estimate
        self._expected_steps: dict[int, torch.Tensor | None] = {}

    @property
    def base(self) -> torch.Tensor:
        """The newest values that the server sent, float32 [n]."""
        return self._base

    def push(self, outer_gradient: torch.Tensor, num_workers: int) -> PreparedPush:
        """Encode an outer gradient (float32 [n]), with what the codec lost of earlier ones, and count it as in flight.

        The loss carried over is committed only when the push is acknowledged as applied. An outer gradient that is not
        finite is prepared all the same, expected to do nothing: the server refuses it and says why.
        """
        encoded = self._uplink.encode(outer_gradient)
        self._expected_steps[encoded.seq] = self._estimate.step(encoded.decoded, num_workers)
        return PreparedPush(seq=encoded.seq, base_bin=self._bin, payload=encoded.payload)

    def receive(self, seq: int, values: torch.Tensor, bin: int, *, applied: bool) -> None:  # noqa: A002
        """Take the answer to a push: the server's newest values (float32 [n]; kept, not copied) and their bin."""
        self._uplink.settle(seq, applied=applied)
        del self._expected_steps[seq]
        self.rebase(values, bin)

    def rebase(self, values: torch.Tensor, bin: int) -> None:  # noqa: A002
        """Take newer server values (float32 [n]; kept, not copied) and their bin."""
        self._base = values
        self._bin = bin

    def new_start(self) -> torch.Tensor:
        """Where inner steps should go on from (float32 [n]): base minus all expected steps in flight."""
        steps = [step for step in self._expected_steps.values() if step is not None]
        if not steps:
            return self._base
        start = self._base - steps[0]
        for step in steps[1:]:
            start.sub_(step)
        return start
