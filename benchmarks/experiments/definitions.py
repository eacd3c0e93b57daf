"""The experiments: which methods are compared in which settings, and what each may tune."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from experiments.campaign import Arm, Experiment, Settings, grid
from experiments.trial import Fleet, TaskSpec, Trial

EXACT = {"exchange.uplink": "fp32", "exchange.downlink": "fp32"}
LOOK_AHEAD = {"outer.publish": "look-ahead"}


# --- (a) OrMo: single gradients on images.

ORMO_GRADIENTS = 3200
ORMO_WORKERS = (4, 16, 64)
ORMO_STEPS = (0.25, 0.6, 1.5, 3.5)
"""Final displacements by a bin's mean gradient that are tried, lr / (1 - momentum)."""


def _scaled(steps: Sequence[float], momenta: Sequence[float]) -> tuple[Settings, ...]:
    """Return settings by the final displacement that a mean gradient makes, lr / (1 - momentum)."""
    return tuple(
        (("outer.lr", round(step * (1 - momentum), 6)), ("outer.momentum", momentum))
        for momentum in momenta
        for step in steps
    )


def _ormo_methods(gradients: int, num_workers: int) -> dict[str, tuple[Mapping[str, Any], tuple[Settings, ...]]]:
    decay = {"outer.lr_decay": "step", "outer.total_bins": gradients // num_workers}
    asynchronous = {
        **EXACT,
        **decay,
        "schedule.kind": "async",
        "schedule.quota": num_workers,
        "outer.late_bins": 1 << 40,
    }
    with_momentum = _scaled(ORMO_STEPS, (0.5, 0.9))
    without = _scaled((0.15, 0.25, 0.4, 0.6, 1.0, 1.5, 2.3, 3.5), (0.0,))
    barrier = {**EXACT, **decay, "schedule.kind": "barrier", "outer.publish": "polyak"}
    return {
        "synchronous momentum": (barrier, with_momentum),
        "asynchronous SGD": ({**asynchronous, "outer.rule": "sgd"}, without),
        "naive momentum": ({**asynchronous, "outer.rule": "momentum"}, with_momentum),
        "SMEGA2": ({**asynchronous, "outer.rule": "smega2"}, with_momentum),
        "OrMo": ({**asynchronous, "outer.rule": "ormo"}, with_momentum),
        "OrMo-DA": ({**asynchronous, "outer.rule": "ormo-da", "outer.late_bins": 2}, with_momentum),
    }


SYNCHRONOUS_BIN_S = {4: (1.33, 9.95), 16: (1.63, 13.4), 64: (1.96, 16.4)}
"""Mean virtual time until all K workers have made a gradient, as simulated: alike, and a quarter 10 times slower."""


def _synchronous_in_equal_time(gradients: int, fleet: Fleet, points: tuple[Settings, ...], cell: str) -> Arm:
    """Synchronous momentum for as long as asynchronous workers take, its rate falling over the bins it has time for."""
    num_workers = len(fleet.slowness)
    time_s = gradients / sum(1 / slowness for slowness in fleet.slowness)
    bin_s = SYNCHRONOUS_BIN_S[num_workers][max(fleet.slowness) > 1]
    server = {
        **EXACT,
        "schedule.kind": "barrier",
        "outer.publish": "polyak",
        "outer.lr_decay": "step",
        "outer.total_bins": max(1, round(time_s / bin_s)),
        "exchange.inner_steps": 1,
        "exchange.dynamic_inner_steps": False,
    }
    trial = Trial(
        task=TaskSpec(kind="images", inner="sgd", inner_lr=1.0),
        fleet=fleet,
        server=_settings(server),
        overlap="blocking",
        until_s=time_s,
        points=10,
    )
    return Arm(cell=cell, name="synchronous momentum, equal time", trial=trial, grid=points)


def ormo(gradients: int = ORMO_GRADIENTS, workers: Sequence[int] = ORMO_WORKERS) -> Experiment:
    """OrMo's setting: each push is one stochastic gradient; a quarter of the workers may be ten times slower."""
    arms = []
    for num_workers in workers:
        for label, slow in (("alike", 1.0), ("a quarter 10 times slower", 10.0)):
            slowness = tuple(slow if worker < num_workers // 4 else 1.0 for worker in range(num_workers))
            fleet = Fleet(slowness=slowness, jitter=0.3)
            for name, (server, points) in _ormo_methods(gradients, num_workers).items():
                trial = Trial(
                    task=TaskSpec(kind="images", inner="sgd", inner_lr=1.0),
                    fleet=fleet,
                    server=_settings({**server, "exchange.inner_steps": 1, "exchange.dynamic_inner_steps": False}),
                    overlap="blocking",
                    until_gradients=gradients,
                    points=10,
                )
                arms.append(Arm(cell=f"K = {num_workers}, {label}", name=name, trial=trial, grid=points))
            points = _scaled(ORMO_STEPS, (0.5, 0.9))
            arms.append(_synchronous_in_equal_time(gradients, fleet, points, f"K = {num_workers}, {label}"))
    return Experiment(name="ormo", title="OrMo's setting", arms=tuple(arms))


# --- (b) DiLoCo: eager exchange on text.

DILOCO_STEPS = 600
DILOCO_GRID = grid(outer__lr=(0.5, 0.9), outer__momentum=(0.5, 0.8))
WEIGHTS = ("1/M", "1", "local", "predicted")

Overlapping = tuple[str, Literal["eager", "delayed", "blocking"], str, float]
"""Name, overlap, own weight, and the part of a round after which the answer arrives."""

OVERLAPS: tuple[Overlapping, ...] = (
    ("blocking", "blocking", "1", 0.0),
    ("delayed", "delayed", "1", 1.0),
    ("eager 1/M (the paper's)", "eager", "1/M", 1.0),
    ("eager 1", "eager", "1", 1.0),
    ("eager local", "eager", "local", 1.0),
    ("eager predicted", "eager", "predicted", 1.0),
    ("1/M, answer after 0.6", "eager", "1/M", 0.6),
    ("1/M, answer after 0.3", "eager", "1/M", 0.3),
    ("1/M, answer after 0.1", "eager", "1/M", 0.1),
    ("1, answer after 0.6", "eager", "1", 0.6),
    ("1, answer after 0.3", "eager", "1", 0.3),
    ("1, answer after 0.1", "eager", "1", 0.1),
)
MOST_TELLING = ("blocking", "eager 1/M (the paper's)", "eager 1", "1, answer after 0.3")


def _is_played(name: str, part: float, num_workers: int, inner_steps: int) -> bool:
    """Whether there is time for this arm: a run takes as many steps as there are workers."""
    if num_workers >= 16:
        return name in MOST_TELLING and inner_steps == 30
    return num_workers < 8 or part not in (0.1, 0.6)


def diloco(
    steps: int = DILOCO_STEPS, workers: Sequence[int] = (2, 4, 8, 16), rounds: Sequence[int] = (10, 30, 100)
) -> Experiment:
    """DiLoCo's setting: equal workers in step, a barrier, and overlap of every kind."""
    arms = []
    for num_workers in workers:
        for inner_steps in rounds:
            for name, overlap, weight, part in OVERLAPS:
                if not _is_played(name, part, num_workers, inner_steps):
                    continue
                server = {
                    **EXACT,
                    "schedule.kind": "barrier",
                    "exchange.inner_steps": inner_steps,
                    "exchange.own_weight": weight,
                }
                trial = Trial(
                    task=TaskSpec(kind="text"),
                    fleet=Fleet(slowness=(1.0,) * num_workers, delay=inner_steps * part / 2),
                    server=_settings(server),
                    overlap=overlap,
                    until_rounds=steps // inner_steps,
                    points=6,
                )
                cell = f"M = {num_workers}, H = {inner_steps}"
                arms.append(Arm(cell=cell, name=name, trial=trial, grid=DILOCO_GRID))
    return Experiment(name="diloco", title="DiLoCo's setting", arms=tuple(arms))


# --- (c) Codecs.

UPLINKS = ("fp32", "bf16", "int8", "int4", "fp4", "topk")
CODEC_GRID = grid(outer__lr=(0.5, 0.8), outer__momentum=(0.5, 0.8))


def codecs(steps: int = DILOCO_STEPS) -> Experiment:
    """What each codec costs, in each direction, with and without carrying its error."""
    arms = []
    for codec in UPLINKS:
        for carried in (True, False) if codec != "fp32" else (True,):
            name = codec if carried else f"{codec}, error dropped"
            arms.append(_codec_arm("up", name, {"exchange.uplink": codec}, steps, error_feedback=carried))
    arms.append(_codec_arm("down", "fp32", {}, steps))
    arms.append(_codec_arm("down", "bf16", {"exchange.downlink": "bf16"}, steps))
    arms += [_codec_arm("down", f"{codec} of differences", {}, steps, delta=codec) for codec in ("int8", "int4", "fp4")]
    arms.append(_codec_arm("both", "int4, int4 of differences", {"exchange.uplink": "int4"}, steps, delta="int4"))
    arms.append(_codec_arm("both", "topk, int4 of differences", {"exchange.uplink": "topk"}, steps, delta="int4"))
    return Experiment(name="codecs", title="Codecs", arms=tuple(arms), seeds=(0, 1, 2, 3, 4))


def _codec_arm(
    cell: str,
    name: str,
    server: Mapping[str, Any],
    steps: int,
    *,
    error_feedback: bool = True,
    delta: str | None = None,
) -> Arm:
    base = {**EXACT, "schedule.kind": "barrier", "exchange.inner_steps": 20, "exchange.own_weight": "1"}
    trial = Trial(
        task=TaskSpec(kind="text"),
        fleet=Fleet(slowness=(1.0,) * 4, delay=3.0),
        server=_settings({**base, **server}),
        downlink_delta=delta,
        error_feedback=error_feedback,
        until_rounds=steps // 20,
    )
    return Arm(cell=cell, name=name, trial=trial, grid=CODEC_GRID)


# --- (d) The frontier: unequal workers.

FRONTIER_GRID = grid(outer__lr=(0.4, 0.7, 1.0), outer__momentum=(0.5, 0.8))
SGD_GRID = grid(outer__lr=(0.3, 0.5, 0.7, 1.0, 1.4, 2.0))

FLEETS = {
    "4 workers, one 4 times slower, jitter, half a round of delay": Fleet(
        slowness=(1.0, 1.0, 1.0, 4.0), jitter=0.5, delay=5.0
    ),
    "4 equal workers, no jitter, no delay": Fleet(slowness=(1.0,) * 4),
    "8 workers, from 1 to 8 times slower, jitter, a whole round of delay": Fleet(
        slowness=(1.0, 1.0, 1.5, 2.0, 2.0, 3.0, 4.0, 8.0), jitter=0.5, delay=10.0
    ),
}
FRONTIER_ROUND = 20
FRONTIER_TIME = 600.0


def _schedule(kind: str, **others: Any) -> dict[str, Any]:
    return {"schedule.kind": kind, **{key.replace("__", "."): value for key, value in others.items()}}


def _frontier_methods(num_workers: int) -> dict[str, tuple[Literal["eager", "blocking"], dict[str, Any]]]:
    quorum = {"schedule.quorum": max(2, num_workers * 3 // 4)}
    fixed = {"exchange.dynamic_inner_steps": False}
    methods: dict[str, tuple[Literal["eager", "blocking"], dict[str, Any]]] = {
        "synchronous": ("blocking", _schedule("barrier") | fixed),
        "synchronous, DyLU": ("blocking", _schedule("barrier")),
        "quorum, DyLU, waiting": ("blocking", _schedule("quorum") | quorum),
        "asynchronous OrMo, DyLU, waiting": ("blocking", _schedule("async")),
    }
    for weight in ("1/M", "1", "predicted"):
        own = {"exchange.own_weight": weight}
        methods |= {
            f"barrier, overlap {weight}": ("eager", _schedule("barrier") | own),
            f"quorum, overlap {weight}": ("eager", _schedule("quorum") | quorum | own),
            f"participation, overlap {weight}": ("eager", _schedule("participation") | own | LOOK_AHEAD),
            f"async OrMo, overlap {weight}": ("eager", _schedule("async") | own | LOOK_AHEAD),
        }
    own = {"exchange.own_weight": "1"}
    methods |= {
        "barrier, window 2, overlap 1": ("eager", _schedule("barrier", exchange__window=2) | own),
        "quorum, window 2, overlap 1": ("eager", _schedule("quorum", exchange__window=2) | quorum | own),
        "async OrMo (Polyak), overlap 1": ("eager", _schedule("async") | own),
        "async OrMo, window 2, overlap 1": ("eager", _schedule("async", exchange__window=2) | own | LOOK_AHEAD),
        "async OrMo (Polyak), window 2, overlap 1": ("eager", _schedule("async", exchange__window=2) | own),
    }
    for rule in ("ormo-da", "sgd", "momentum", "nesterov", "delayed-nesterov", "mla", "smega2"):
        methods[f"async {rule}, overlap 1"] = ("eager", _schedule("async") | {"outer.rule": rule} | LOOK_AHEAD)
    heloco = _schedule("async") | {"outer.correction": "heloco"}
    methods["async mla + HeLoCo, overlap 1"] = ("eager", heloco | {"outer.rule": "mla"})
    methods["async OrMo (Polyak) + HeLoCo, overlap 1"] = ("eager", heloco | own)
    methods["async OrMo (Polyak) + HeLoCo, window 2, overlap 1"] = ("eager", heloco | own | {"exchange.window": 2})
    return methods


AT_EQUAL_TOKENS = (
    "synchronous, DyLU",
    "quorum, DyLU, waiting",
    "asynchronous OrMo, DyLU, waiting",
    "barrier, overlap 1",
    "quorum, overlap 1",
    "async OrMo, overlap 1/M",
    "async OrMo (Polyak), overlap 1",
    "async OrMo (Polyak), window 2, overlap 1",
    "async sgd, overlap 1",
    "async mla + HeLoCo, overlap 1",
)
"""The methods that are also compared after equal numbers of tokens, with the settings that were best at equal time."""


def frontier(*, equal: Literal["time", "tokens"] = "time", time_s: float = FRONTIER_TIME) -> Experiment:
    """Workers of unequal speed, jitter and delay: every schedule and rule, waiting or not."""
    arms = []
    for cell, fleet in FLEETS.items():
        tokens = round(sum(time_s / slowness for slowness in fleet.slowness) * 0.7)
        for name, (overlap, server) in _frontier_methods(len(fleet.slowness)).items():
            if equal == "tokens" and name not in AT_EQUAL_TOKENS:
                continue
            trial = Trial(
                task=TaskSpec(kind="text"),
                fleet=fleet,
                server=_settings({**EXACT, "exchange.inner_steps": FRONTIER_ROUND, **server}),
                overlap=overlap,
                until_s=time_s if equal == "time" else None,
                until_gradients=tokens if equal == "tokens" else None,
            )
            points = SGD_GRID if server.get("outer.rule") == "sgd" else FRONTIER_GRID
            arms.append(Arm(cell=cell, name=name, trial=trial, grid=points))
    return Experiment(
        name=f"frontier-{equal}",
        title=f"The frontier at equal {equal}",
        arms=tuple(arms),
        tuned_as=frontier(equal="time", time_s=time_s) if equal == "tokens" else None,
    )


# --- How much momentum: ordered and in order of arrival.

MOMENTA = (0.0, 0.3, 0.5, 0.7, 0.9)


def momentum(time_s: float = FRONTIER_TIME) -> Experiment:
    """Each momentum coefficient with rates of its own, for the unequal fleets of the frontier."""
    arms = []
    for cell, fleet in FLEETS.items():
        if len(set(fleet.slowness)) == 1:
            continue
        for rule, label in (("ormo", "ordered"), ("momentum", "by arrival")):
            for coefficient in MOMENTA:
                server = {
                    **EXACT,
                    **LOOK_AHEAD,
                    "schedule.kind": "async",
                    "exchange.inner_steps": FRONTIER_ROUND,
                    "exchange.own_weight": "1",
                    "outer.rule": rule,
                }
                trial = Trial(task=TaskSpec(kind="text"), fleet=fleet, server=_settings(server), until_s=time_s)
                points = _scaled((0.7, 1.2, 2.0), (coefficient,))
                arms.append(Arm(cell=cell, name=f"{label}, momentum {coefficient}", trial=trial, grid=points))
    return Experiment(name="momentum", title="How much momentum", arms=tuple(arms))


# --- (e) Data that differ between workers.


def unlike(steps: int = DILOCO_STEPS) -> Experiment:
    """The same methods where workers' data are alike and where they differ."""
    arms = []
    for kind, shardings in (("text", ("same", "by-source")), ("images", ("same", "by-class"))):
        for sharding in shardings:
            for name, (overlap, server) in _unlike_methods().items():
                trial = Trial(
                    task=TaskSpec(kind=kind, sharding=sharding, inner_lr=0.004 if kind == "text" else 0.001),  # type: ignore[arg-type]
                    fleet=Fleet(slowness=(1.0,) * 5, jitter=0.2, delay=5.0),
                    server=_settings({**EXACT, "exchange.inner_steps": 20, **server}),
                    overlap=overlap,
                    until_rounds=steps // 20,
                )
                arms.append(Arm(cell=f"{kind}, {sharding}", name=name, trial=trial, grid=DILOCO_GRID))
    return Experiment(name="unlike", title="Data that differ between workers", arms=tuple(arms))


def _unlike_methods() -> dict[str, tuple[Literal["eager", "delayed", "blocking"], dict[str, Any]]]:
    barrier = _schedule("barrier")
    methods: dict[str, tuple[Literal["eager", "delayed", "blocking"], dict[str, Any]]] = {
        "blocking": ("blocking", barrier),
    }
    methods |= {f"barrier, {weight}": ("eager", barrier | {"exchange.own_weight": weight}) for weight in WEIGHTS}
    for codec in ("int4", "topk"):
        methods[f"barrier, 1, {codec} up"] = ("eager", barrier | {"exchange.own_weight": "1", "exchange.uplink": codec})
    methods |= {
        "participation, 1": ("eager", _schedule("participation") | LOOK_AHEAD),
        "async OrMo (Polyak), 1": ("eager", _schedule("async")),
        "async mla + HeLoCo, 1": ("eager", _schedule("async") | {"outer.rule": "mla", "outer.correction": "heloco"}),
    }
    return methods


# --- (late) A worker that comes back after a long time.

LATE_BINS = {"whole": 1 << 40, "from 16 bins": 16, "from 8 bins": 8, "from 4 bins": 4, "from 2 bins": 2}
"""Treatments of late pushes: the lateness from which they enter in part."""


def late(time_s: float = FRONTIER_TIME) -> Experiment:
    """A worker stalls with a push on its way and comes back late: what each treatment costs."""
    arms = []
    for num_workers, momentum, away in (
        *((4, momentum, away) for momentum in (0.5, 0.9) for away in (0.0, 100.0, 380.0)),
        *((2, momentum, away) for momentum in (0.5, 0.9) for away in (0.0, 380.0)),
    ):
        absences = ((num_workers - 1, 205.0, 205.0 + away, "stall"),) if away else ()
        for name, late_bins in LATE_BINS.items():
            server = {
                **EXACT,
                **LOOK_AHEAD,
                "schedule.kind": "async",
                "schedule.quota": num_workers,
                "exchange.inner_steps": 10,
                "outer.late_bins": late_bins,
            }
            trial = Trial(
                task=TaskSpec(kind="text"),
                fleet=Fleet(slowness=(1.0,) * num_workers, jitter=0.2, delay=1.0, absences=absences),
                server=_settings(server),
                until_s=time_s,
                points=60,
            )
            length = f"away for {round(away / 10)} rounds" if away else "never away"
            points = grid(outer__lr=(0.7,), outer__momentum=(momentum,))
            arms.append(
                Arm(cell=f"M = {num_workers}, momentum {momentum}, {length}", name=name, trial=trial, grid=points)
            )
    return Experiment(name="late", title="A worker that comes back late", arms=tuple(arms))


def _settings(server: Mapping[str, Any]) -> Settings:
    return tuple(sorted(server.items()))


EXPERIMENTS: dict[str, Callable[[], Experiment]] = {
    "ormo": ormo,
    "diloco": diloco,
    "codecs": codecs,
    "frontier-time": lambda: frontier(equal="time"),
    "frontier-tokens": lambda: frontier(equal="tokens"),
    "momentum": momentum,
    "unlike": unlike,
    "late": late,
}
"""Every experiment by name."""

SMALL: dict[str, Callable[[], Experiment]] = {
    "ormo": lambda: ormo(gradients=480, workers=(4,)),
    "diloco": lambda: diloco(steps=120, workers=(2,), rounds=(10,)),
    "codecs": lambda: codecs(steps=120),
    "frontier-time": lambda: frontier(equal="time", time_s=120.0),
    "frontier-tokens": lambda: frontier(equal="tokens", time_s=120.0),
    "momentum": lambda: momentum(time_s=120.0),
    "unlike": lambda: unlike(steps=120),
    "late": lambda: late(time_s=120.0),
}
"""The same in a few minutes: less training, fewer settings."""
