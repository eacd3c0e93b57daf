"""When a run's settings are stable, by the linear model of a run near an optimum.

The model [derived; docs/algorithms.md, section 9]. Look along one direction, and let every number be its distance to
the optimum, the same for everybody. A round of H inner steps removes the part `contraction` (a, 0 < a <= 2) of it: from
`start` it makes the outer gradient D = a start. Answers come `delay` rounds late, and a worker goes on from

    start  =  newest answer  -  sum of the expected steps of its own pushes that are not in that answer

Everything is linear, so one round multiplies the state (the server's w and u, and every worker's start, private
momentum, unanswered pushes and unread answers) by a constant matrix. The run is stable where no eigenvalue of it lies
outside of the unit circle. The matrix is not written down anywhere: the algorithm is played on linear forms, numbers
written as sums over the coordinates of the state, and the forms that come out are its rows.

Workers that push together may be taken as one, since their mean and their differences from it do not mix:

- *common mode*: the server and one worker for each group of those who push together, all in it being alike;
- *deviation mode*: differences within a group cancel in the server, so one worker that is always answered 0.

So all workers together make two small matrices, however many they are. The more groups push one after another, the
larger is the first.

Save for `local`, every outer gradient is multiplied by lr before it has any effect, so that only the product of lr and
contraction counts: the largest stable contraction is a constant of the other settings divided by lr.

What the model leaves out: curvature that differs among workers, noise, inner optimizer state, codecs, and answers that
come in the middle of a round (which help). It is a guide to orders of magnitude, and exact for what it describes.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

MAX_CONTRACTION = 2.0
"""No stable inner optimizer removes more of a distance in a round: it would end further away than it began."""

MAX_DELAY_ROUNDS = 8
"""The most rounds that a worker may have in flight (exchange.window)."""

LATENESS_SLACK = 0.1
"""Mean bins late that count as none: one push in ten a bin late is an accident, not the rhythm of the run."""

_GROUPS_TIMES_DELAY = 12
"""How large a model of asynchronous workers a server can afford: its limits are found in some 50 ms."""

_MAX_PRODUCT = 8.0
"""Where the search for lr times contraction ends. Blocking Polyak ends at 2 (1 + beta) < 4, and nothing seen beyond."""

_LEAST_USEFUL_LR = 1e-3
"""An lr below this trains nothing, and is not advised."""

_STABLE_RADIUS = 1 + 1e-9
"""Growth by less is rounding."""

_GRID_POINTS = 200
_LOT = 16
_SPLITS = 3
_REFINEMENTS = 12
"""The edge is first sought on a grid, since the stable region may have holes, then narrowed to 1 / (200 * 4**12)."""

Estimate: TypeAlias = Literal["delayed", "1/M", "1", "local", "predicted"]
"""What a worker expects of its own pushes in flight.

delayed: nothing. 1/M, 1: the step of an outer optimizer fed with its own outer gradients alone, a worker's share of it
or the whole. local: the outer gradient itself. predicted: what the server, from the newest answer and its momentum,
would do if everybody had pushed what this worker pushed.
"""

Floats: TypeAlias = NDArray[np.float64]
Form: TypeAlias = NDArray[np.float64]
"""A number as a linear function of the state, for several settings at once: float64 [settings or 1, coordinates]."""


@dataclass(frozen=True, kw_only=True)
class StabilitySetting:
    """A run in the linear model.

    Attributes:
        lr: Learning rate of the mean outer gradient of a full bin (outer.lr).
        momentum: Momentum coefficient beta, in [0, 1) (outer.momentum).
        workers: Workers M, all equally fast; also the quota of a bin.
        look_ahead: Whether answers look ahead along the momentum (Nesterov) or not (Polyak) (outer.publish).
        delay: Rounds by which answers come late. 0: an answer is there before the next round begins (blocking). 1: it
            is there when the next round ends (overlap by a full round). More: the window lets several be in flight.
        estimate: What a worker expects of its pushes in flight. Without effect where delay is 0.
        groups: Groups of equally many workers, those of a group pushing together and the groups one after another,
            evenly spaced. 1: all together; a bin is everybody's pushes of one round, and an answer has all of it (a
            barrier). As many as workers: asynchronous, each push answered at once, bins by quota with OrMo's
            ceil(t / M). Between: nearly that, with smaller matrices.
        ordered: False: momentum in order of arrival, u = beta u + (lr / M) g ; w -= u for every push. It differs from
            ordered momentum only where each worker is a group of its own, and is modelled only there.
    """

    lr: float
    momentum: float
    workers: int
    look_ahead: bool
    delay: int = 0
    estimate: Estimate = "1"
    groups: int = 1
    ordered: bool = True

    def __post_init__(self) -> None:
        """Refuse what the model does not describe.

        Raises:
            ValueError: A value is out of its range, or momentum by arrival was asked for where workers push together.
        """
        if not (self.lr >= 0 and 0 <= self.momentum < 1 and 1 <= self.groups <= self.workers and self.delay >= 0):
            raise ValueError(f"lr, momentum, workers, groups or delay is out of its range: {self}")
        if self.estimate not in get_args(Estimate):
            raise ValueError(f"estimate is {self.estimate!r}, not one of {', '.join(get_args(Estimate))}")
        if not self.ordered and self.groups < self.workers:
            raise ValueError("momentum by arrival is modelled only where each worker is a group of its own")

    @property
    def extra_bins_late(self) -> int:
        """Bins by which every push is later than without overlap.

        A push belongs to the bin of the newest answer at its worker. With a delay of one round that is still the answer
        to the push before it, as when blocking; every further round makes it one bin older. Momentum by arrival takes
        every push for one on time.
        """
        return max(0, self.delay - 1) if self.ordered else 0


def spectral_radius(setting: StabilitySetting, contraction: float) -> float:
    """The factor by which a distance grows in a round, in the long run.

    Args:
        setting: The run.
        contraction: The part of a distance that a round of inner steps removes (a).
    """
    return float(_radii(setting, np.array([setting.lr]), np.array([contraction]))[0])


def largest_stable_contraction(setting: StabilitySetting) -> float:
    """The largest contraction at and below which no distance grows, up to MAX_CONTRACTION.

    Stability is sought upwards from 0 on a grid of steps of 0.01 (0.04 / lr save for `local`); a narrower hole in the
    stable region may be missed.
    """
    if setting.estimate != "local" and setting.lr > 0:
        return min(MAX_CONTRACTION, largest_stable_lr(setting) / setting.lr)
    return _first_edge(lambda a: _radii(setting, np.array([setting.lr]), a), MAX_CONTRACTION)


def largest_stable_lr(setting: StabilitySetting, contraction: float = 1.0) -> float:
    """The largest lr at and below which no distance grows at this contraction, all else as in the setting.

    0.0 if none is stable. Stability is sought upwards from 0 in steps of 0.04 / contraction.
    """
    for_any_lr = replace(setting, lr=1.0)
    if setting.estimate != "local":
        return _largest_stable_lr(for_any_lr, 1.0) / contraction
    return _largest_stable_lr(for_any_lr, contraction)


@lru_cache(maxsize=1024)
def _largest_stable_lr(setting: StabilitySetting, contraction: float) -> float:
    """largest_stable_lr, of a setting whose own lr counts for nothing."""
    return _first_edge(lambda lr: _radii(setting, lr, np.array([contraction])), _MAX_PRODUCT / contraction)


def setting_seen(
    *,
    lr: float,
    momentum: float,
    workers: int,
    look_ahead: bool,
    estimate: Estimate,
    asynchronous: bool,
    mean_bins_late: float,
) -> StabilitySetting:
    """What a server should take its run for, as far as it can see, if its workers never wait.

    Asynchronous workers are taken to push one after another. Many of them, or long delays, would make large matrices,
    so they are modelled in at most 12 / delay groups (but 2 at least): that finds limits a few percent too high.

    Args:
        lr: The configured learning rate (outer.lr).
        momentum: The configured momentum (outer.momentum).
        workers: Active workers, at least 1.
        look_ahead: Whether answers look ahead.
        estimate: The configured own weight (exchange.own_weight).
        asynchronous: Whether every push is answered at once (schedule.kind).
        mean_bins_late: The mean number of bins that recent pushes were late; see delay_seen for how it is rounded.
    """
    delay = delay_seen(mean_bins_late, asynchronous=asynchronous)
    groups = min(workers, max(2, _GROUPS_TIMES_DELAY // delay)) if asynchronous else 1
    return StabilitySetting(
        lr=lr,
        momentum=momentum,
        workers=workers,
        look_ahead=look_ahead,
        delay=delay,
        estimate=estimate,
        groups=groups,
    )


def delay_seen(mean_bins_late: float, *, asynchronous: bool) -> int:
    """The delay, in rounds, that a server should assume of workers that never wait.

    A server sees bins, not rounds, and rounds up, to the worst that looks the same. Where bins are everybody's pushes,
    a push on time (0 bins late) may come from a worker that got its answer at the very end of the round: one round of
    delay. Asynchronous answers name bins by quota: with M workers, a push that missed no round is (M - 1) / M bins
    late, so that there the first bin of lateness is no delay. Lateness up to LATENESS_SLACK beyond a whole number is
    ignored, and more than MAX_DELAY_ROUNDS is taken for that: such lateness comes from workers of different speeds, and
    larger matrices would say little more.

    Args:
        mean_bins_late: The mean number of bins that recent pushes were late.
        asynchronous: Whether pushes are answered at once.
    """
    bins = math.ceil(max(0.0, mean_bins_late - LATENESS_SLACK))
    return min(MAX_DELAY_ROUNDS, max(1, bins if asynchronous else bins + 1))


@lru_cache(maxsize=1024)
def warning_of(setting: StabilitySetting) -> str | None:
    """One sentence for an operator if a fresh model may blow up, or None.

    A fresh model is one whose rounds remove nearly the whole distance: a contraction of 1. The warning also comes where
    1 is in a stable island above a smaller contraction that is not.
    """
    contraction = largest_stable_contraction(setting)
    if contraction >= 1.0 - 1e-6:
        return None
    workers = "1 worker" if setting.workers == 1 else f"{setting.workers} workers"
    delay = "1 round" if setting.delay == 1 else f"{setting.delay} rounds"
    advice = _advice(setting)
    return (
        f"lr {setting.lr:g} with momentum {setting.momentum:g} may blow up on a fresh model: with {workers}, answers "
        f"{delay} late and own weight {setting.estimate}, the linear model is stable while a round removes at most "
        f"{_rounded_down(contraction):g} of the distance to an optimum, and a fresh model's removes nearly all of it; "
        f"{advice}"
    )


def _advice(setting: StabilitySetting) -> str:
    lr = largest_stable_lr(setting)
    if lr >= _LEAST_USEFUL_LR:
        return f"at this momentum an lr of up to {_rounded_down(lr):g} is stable"
    return "at this momentum no lr is stable, so choose another own weight"


def _rounded_down(limit: float) -> float:
    """Down to two digits, since a limit that is rounded up is not one; the limit is above 0."""
    unit = 10.0 ** (math.floor(math.log10(limit)) - 1)
    return math.floor(limit / unit + 1e-6) * unit


# --- The algorithm on linear forms.


@dataclass(frozen=True)
class _Server:
    """The server's numbers, as they are or as an answer says them."""

    w: Form
    u: Form

    def pushed(self, g: Form, eta: Floats, beta: float, bins_late: int, *, opens: bool, look_ahead: bool) -> "_Server":
        """With a push in: u += eta beta^d g ; w -= eta (1 - beta^(d+1)) / (1 - beta) g.

        If a bin opens with it, that is before it (Polyak), or after it and before its answer (look-ahead).
        """
        server = self._opened(beta) if opens and not look_ahead else self
        decay = beta**bins_late
        displacement = (1 - decay * beta) / (1 - beta)
        server = _Server(server.w - displacement * eta * g, server.u + decay * eta * g)
        return server._opened(beta) if opens and look_ahead else server

    def _opened(self, beta: float) -> "_Server":
        """With the next bin open: w -= beta u ; u *= beta."""
        u = beta * self.u
        return _Server(self.w - u, u)


@dataclass(frozen=True)
class _Worker:
    """One worker between two rounds."""

    start: Form
    velocity: Form
    """The momentum that is fed with its own outer gradients only."""
    in_flight: tuple[Form, ...]
    """For each push that is not in the newest answer read, oldest first: the expected step, or for predicted its D."""
    unread: tuple[_Server, ...]
    """The answers to them."""

    @staticmethod
    def num_forms(setting: StabilitySetting) -> int:
        """How many numbers a worker has."""
        return 2 + 3 * setting.delay

    @classmethod
    def read(cls, setting: StabilitySetting, forms: Iterator[Form]) -> "_Worker":
        """The worker whose numbers come next; the inverse of forms()."""
        start, velocity = next(forms), next(forms)
        in_flight = tuple(next(forms) for _ in range(setting.delay))
        unread = tuple(_Server(next(forms), next(forms)) for _ in range(setting.delay))
        return cls(start, velocity, in_flight, unread)

    def forms(self) -> Iterator[Form]:
        """All its numbers, in order."""
        yield from (self.start, self.velocity, *self.in_flight)
        for answer in self.unread:
            yield from (answer.w, answer.u)

    def next_round(self, setting: StabilitySetting, d: Form, answer: _Server, lr: Floats) -> "_Worker":
        """The worker when it begins its next round, after it pushed d, to be answered so `delay` rounds later."""
        expected, velocity = self._expected_step(setting, d, lr)
        in_flight = (*self.in_flight, expected)[1:]
        base, *unread = *self.unread, answer
        if setting.estimate == "predicted":
            for gradient in in_flight:
                base = base.pushed(
                    gradient,
                    lr,
                    setting.momentum,
                    setting.extra_bins_late,
                    opens=True,
                    look_ahead=setting.look_ahead,
                )
            start = base.w
        else:
            start = base.w - sum(in_flight, start=np.zeros(1))
        return _Worker(start, velocity, in_flight, tuple(unread))

    def _expected_step(self, setting: StabilitySetting, d: Form, lr: Floats) -> tuple[Form, Form]:
        """What the worker keeps of its push, and its private momentum after it."""
        if setting.delay == 0:
            # Nothing is ever in flight; a private momentum that nobody reads would only add its own beta.
            return np.zeros_like(d), np.zeros_like(d)
        match setting.estimate:
            case "delayed":
                return np.zeros_like(d), np.zeros_like(d)
            case "local" | "predicted":
                return d, np.zeros_like(d)
            case "1" | "1/M":
                velocity = setting.momentum * self.velocity + d
                step = d + setting.momentum * velocity if setting.look_ahead else velocity
                weight = 1.0 if setting.estimate == "1" else 1 / setting.workers
                return weight * lr * step, velocity


def _radii(setting: StabilitySetting, lrs: Floats, contractions: Floats) -> Floats:
    """Spectral radii for arrays of lr and contraction that are as long as each other, or 1: float64 [settings]."""
    lr, a = lrs[:, None], contractions[:, None]
    common = _radius(_common_matrix(setting, lr, a))
    # Without delay the next start is the answer, whatever the worker had differently before.
    if setting.groups == setting.workers or setting.delay == 0:
        return common
    return np.maximum(common, _radius(_deviation_matrix(setting, lr, a)))


def _common_matrix(setting: StabilitySetting, lr: Floats, a: Floats) -> Floats:
    """One round of the server and of a worker of each group, from a bin's first label on: [settings, n, n].

    With t counted from 0, labels t + 1 given to answers, and labels belonging to bin ceil(label / M), the push at a t
    divisible by M finds the bin open that its base named. The next opens another, so those after it are a bin late.
    """
    beta, eta = setting.momentum, lr / setting.groups
    forms = iter(_coordinates(2 + setting.groups * _Worker.num_forms(setting)))
    server = _Server(next(forms), next(forms))
    workers = [_Worker.read(setting, forms) for _ in range(setting.groups)]
    for number, worker in enumerate(workers):
        d = a * worker.start
        bins_late = min(number, 1) + setting.extra_bins_late if setting.ordered else 0
        opens = not setting.ordered or number == (0 if setting.look_ahead else 1 % setting.groups)
        server = server.pushed(d, eta, beta, bins_late, opens=opens, look_ahead=setting.look_ahead)
        workers[number] = worker.next_round(setting, d, server, lr)
    return _matrix([server.w, server.u, *(form for worker in workers for form in worker.forms())])


def _deviation_matrix(setting: StabilitySetting, lr: Floats, a: Floats) -> Floats:
    """One round of a worker's difference from the mean worker: [settings, n, n]."""
    coordinates = _coordinates(_Worker.num_forms(setting))
    worker = _Worker.read(setting, iter(coordinates))
    zero = np.zeros_like(coordinates[0])
    worker = worker.next_round(setting, a * worker.start, _Server(zero, zero), lr)
    return _matrix(worker.forms())


def _coordinates(count: int) -> Floats:
    """The coordinates themselves, as forms: [coordinate, 1, coordinates]."""
    return np.eye(count)[:, None, :]


def _matrix(rows: Iterable[Form]) -> Floats:
    """The matrices that take the coordinates to these forms: [settings, n, n], without coordinates of no effect.

    A coordinate that nothing reads (a column of zeros), or that is always set to 0 (a row of zeros), adds an eigenvalue
    of 0 and is left out, until none is left: that saves more than half of most matrices.
    """
    matrix = np.stack(np.broadcast_arrays(*rows), axis=1)
    while True:
        present = (matrix != 0).any(axis=0)
        kept = np.flatnonzero(present.any(axis=0) & present.any(axis=1))
        if len(kept) == matrix.shape[1]:
            return matrix
        matrix = matrix[:, kept[:, None], kept]


def _radius(matrix: Floats) -> Floats:
    """Largest absolute eigenvalue of each matrix: [settings]."""
    if matrix.shape[1] == 0:
        return np.zeros(matrix.shape[0])
    radii: Floats = np.abs(np.linalg.eigvals(matrix)).max(axis=-1)
    return radii


def _first_edge(radii: Callable[[Floats], Floats], top: float) -> float:
    """The end of the stable region that begins at 0, or top."""
    low, high = _narrowed(radii, np.linspace(0.0, top, _GRID_POINTS + 1))
    for _ in range(_REFINEMENTS if low < top else 0):
        low, high = _narrowed(radii, np.linspace(low, high, _SPLITS + 2))
    return low


def _narrowed(radii: Callable[[Floats], Floats], grid: Floats) -> tuple[float, float]:
    """The neighbours on an ascending grid between which stability ends; its first point counts as stable.

    The last point twice if it is stable too. Points are tried in small lots, since the edge is often near the start.
    """
    for first in range(1, len(grid), _LOT):
        unstable = np.flatnonzero(radii(grid[first : first + _LOT]) > _STABLE_RADIUS)
        if len(unstable):
            edge = first + int(unstable[0])
            return float(grid[edge - 1]), float(grid[edge])
    return float(grid[-1]), float(grid[-1])
