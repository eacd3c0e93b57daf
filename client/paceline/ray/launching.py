"""`launch`: puts a run's shards and workers on a Ray cluster as actors; `attach`: finds a run that is there."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
import ray.cloudpickle
import ray.exceptions

from paceline.channels import TLS
from paceline.ray.book import AddressBook
from paceline.ray.running import RayRun
from paceline.ray.shard import ShardActor
from paceline.ray.status import NAMESPACE, ActorStatus, RunSpec
from paceline.ray.training import Train
from paceline.ray.worker import WorkerActor
from paceline_wire.errors import ConfigurationError, InvalidInputError, PacelineError, UnavailableError

MAX_TRAIN_BYTES = 64 * 1024
"""What Ray keeps with an actor, so that it can be started again when the launching process is gone (limit 100 KiB)."""

REFUSED_S = 20.0
"""Seconds that a shard may be refused at the launch: longer than an earlier process takes to leave its directory."""

LOOK_EVERY_S = 0.5
"""Seconds between two looks at whether the shards serve."""

_OURS = ("name", "namespace", "lifetime", "max_restarts", "get_if_exists")


def launch(
    train: Train,
    *,
    data_dir: str | Path,
    config: Mapping[str, Any] | None = None,
    shards: int = 1,
    workers: int = 1,
    name: str = "run",
    shard_options: Mapping[str, Any] | None = None,
    worker_options: Mapping[str, Any] | None = None,
    token: str | None = None,
    tls: TLS | str | Path | bool | None = None,
    start_s: float = 120.0,
) -> RayRun:
    """Put a run on the Ray cluster that this process is connected to, and return when its shards serve.

    Shards and workers are detached actors, which the cluster starts again on other nodes when theirs die. A shard goes
    on where its journal is; a worker calls train again, which goes on where it saved its state. Connect first:
    `ray.init(address="auto")`.

    Args:
        train: The training function, called on every worker with its `WorkerContext`. What it refers to goes with it,
            64 KiB at most: let it load its data itself.
        data_dir: An absolute path that every node sees: shared storage. A run that is there already goes on.
        config: The server's configuration, a mapping of the same form as the file, without shards and
            storage.data_dir. `listen` is any free port of the node's address unless given.
        shards: How many.
        workers: How many.
        name: Of the run, one of its kind on the cluster.
        shard_options: Ray's options of each shard's actor, such as {"num_cpus": 4, "resources": {...}}. Unless given,
            one CPU each, spread over the nodes.
        worker_options: Ray's options of each worker's actor, such as {"num_gpus": 1}; as above.
        token: The run's token for the workers, if it has one; it is no part of the configuration. A signed one must be
            made for the run's name (`paceline certs make ... --worker NAME`), under which all its workers act.
        tls: How workers verify the shards, see `paceline.join`; files must be on every node. Shards move between nodes,
            so give the name that is in their certificate: `paceline.TLS(ca=..., server_name=...)`.
        start_s: Seconds that the shards may take to serve.

    Raises:
        InvalidInputError: An argument is not as said, or the cluster has a run of this name.
        ConfigurationError: The shards refuse the configuration.
        UnavailableError: Not all shards serve in that time; the text says what each of them is doing.

    Example:
        ray.init(address="auto")
        with paceline.ray.launch(train, data_dir="/shared/run", shards=2, workers=4) as run:
            results = run.wait()
    """
    spec = RunSpec(
        name=_name(name),
        num_shards=_count("shards", shards),
        num_workers=_count("workers", workers),
        data_dir=_data_dir(data_dir),
        config=_config(config or {}, has_tls=bool(tls)),
        token=token,
        tls=tls,
    )
    shard_options, worker_options = _options("shard", shard_options), _options("worker", worker_options)
    pickled = _pickled(train)
    _require_ray()
    _begin_book(spec)
    run = RayRun(spec)
    try:
        for index in range(shards):
            _begin(ShardActor, spec, "shard", index, shard_options)
        _wait_for_shards(run, start_s)
        for index in range(workers):
            _begin(WorkerActor, spec, "worker", index, worker_options, pickled)
    except BaseException:
        run.stop()
        raise
    return run


def attach(name: str = "run") -> RayRun:
    """Find a run that is on the cluster, launched by whichever process.

    Args:
        name: Of the run.

    Raises:
        InvalidInputError: The cluster has no run of this name.
    """
    _require_ray()
    try:
        spec: RunSpec = ray.get(ray.get_actor(f"{name}/book", namespace=NAMESPACE).spec.remote())
    except ValueError:
        raise InvalidInputError(f"the Ray cluster has no run {name!r}: launch it, or ask by the name it has") from None
    return RayRun(spec)


def _begin(actor: type, spec: RunSpec, kind: str, index: int, options: Mapping[str, Any], *arguments: object) -> None:
    ours = {"name": spec.actor_name(kind, index), "namespace": NAMESPACE, "lifetime": "detached", "max_restarts": -1}
    ray.remote(actor).options(**{"num_cpus": 1, "scheduling_strategy": "SPREAD", **options, **ours}).remote(
        spec, index, *arguments
    )


def _begin_book(spec: RunSpec) -> None:
    """Begin the address book, whose name is the run's claim to its own."""
    name = spec.actor_name("book")
    try:
        book = (
            ray.remote(AddressBook)
            .options(name=name, namespace=NAMESPACE, lifetime="detached", max_restarts=-1, num_cpus=0)
            .remote(spec)
        )
    except ValueError:
        raise InvalidInputError(
            f"the Ray cluster has a run {spec.name!r}: paceline.ray.attach({spec.name!r}) finds it, and its stop() "
            "ends it; or give this run another name"
        ) from None
    try:
        ray.get(book.spec.remote())
    except ray.exceptions.RayActorError as error:
        raise InvalidInputError(f"the run cannot begin in {spec.data_dir}: {error}") from error


def _wait_for_shards(run: RayRun, start_s: float) -> None:
    began_s = time.monotonic()
    refused_s: dict[int, float] = {}
    while True:
        statuses, now_s = run.status_of_shards(), time.monotonic()
        if all(status.state == "serving" for status in statuses):
            return
        refused_s = {
            status.index: refused_s.get(status.index, now_s) for status in statuses if status.state == "refused"
        }
        for status in statuses:
            if status.state == "failed":
                raise ConfigurationError(status.error)
            if status.state == "refused" and now_s - refused_s[status.index] > REFUSED_S:
                raise PacelineError(f"shard {status.index} cannot serve: {status.error}")
        if now_s - began_s > start_s:
            raise UnavailableError(
                f"the shards do not all serve after {start_s:g} s: {'; '.join(map(_sentence, statuses))}. "
                "Does the cluster have room for them (ray status)?"
            )
        time.sleep(LOOK_EVERY_S)


def _sentence(status: ActorStatus) -> str:
    return f"shard {status.index} is {status.state}" + (f" ({status.error})" if status.error else "")


def _require_ray() -> None:
    if not ray.is_initialized():
        raise InvalidInputError(
            'this process is not connected to a Ray cluster: call ray.init(address="auto") first, or with its address'
        )


def _name(name: str) -> str:
    if not name or "/" in name:
        raise InvalidInputError(f"the name {name!r} of a run must have a letter and no slash")
    return name


def _count(what: str, count: int) -> int:
    if count < 1:
        raise InvalidInputError(f"{what} is {count}; it must be at least 1")
    return count


def _data_dir(data_dir: str | Path) -> Path:
    path = Path(data_dir)
    if not path.is_absolute():
        raise InvalidInputError(f"data_dir = {str(data_dir)!r} must be an absolute path, the same on every node")
    return path


def _config(config: Mapping[str, Any], *, has_tls: bool) -> dict[str, Any]:
    if "shards" in config or "data_dir" in config.get("storage", {}):
        raise InvalidInputError("config must not have shards and storage.data_dir: they are arguments of launch")
    if has_tls != bool(config.get("security", {}).get("tls_cert")):
        raise InvalidInputError(
            "shards and workers must agree on TLS: give config security.tls_cert and security.tls_key, and launch tls; "
            "or none of them"
        )
    try:
        plain: dict[str, Any] = json.loads(json.dumps(config))
    except (TypeError, ValueError) as error:
        raise InvalidInputError(f"config must be of values that JSON has: {error}") from None
    return plain


def _options(kind: str, options: Mapping[str, Any] | None) -> dict[str, Any]:
    taken = [option for option in options or {} if option in _OURS]
    if taken:
        raise InvalidInputError(f"{kind}_options must not have {', '.join(taken)}: the launch decides that")
    return dict(options or {})


def _pickled(train: Train) -> bytes:
    pickled: bytes = ray.cloudpickle.dumps(train)
    if len(pickled) > MAX_TRAIN_BYTES:
        raise InvalidInputError(
            f"train and what it refers to take {len(pickled)} bytes and may take {MAX_TRAIN_BYTES}: "
            "let it load its data and its model itself"
        )
    return pickled
