"""docker-compose.yml does what it says, run without a container engine: from the first start to a restart."""

import json
import signal
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from integration.containers import Composition, missing
from integration.patience import PATIENCE_S, wait_until

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

SHARDS = ("shard-0", "shard-1")
WORKERS = ("worker-1", "worker-2")

LOOK = "PACELINE_TOKEN_FILE=/run/paceline/token exec paceline status --json --tls-ca /run/paceline/ca.pem shard-1:7070"
"""What docs/deploy.md has a user run in a worker's container, so with a worker's token."""

PUSHES_BYTES = 1_000_000
"""More than three rounds of two workers: a push of the example's model takes 160 kB, half of it for each shard."""


@pytest.fixture(scope="module")
def composition(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Composition]:
    """The services, none of them started."""
    folder = tmp_path_factory.mktemp("compose")
    folder.chmod(0o755)
    with Composition(folder, TRAIN_SECONDS="600") as made:
        yield made


def finished(process: "subprocess.Popen[str]") -> str:
    """Wait for a process that should end well; what it printed."""
    printed, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, printed
    return printed


def started_shards(composition: Composition) -> "dict[str, subprocess.Popen[str]]":
    """Start both shards once there are credentials, and wait until their health checks say so."""
    finished(composition.start("certs"))
    shards = {name: composition.start(name) for name in SHARDS}
    wait_until(lambda: all(composition.is_healthy(name) for name in SHARDS))
    return shards


def journal_bytes(composition: Composition) -> list[int]:
    """How much each shard has written: it grows with every push."""
    return [sum(file.stat().st_size for file in composition.volume(name).rglob("*.*")) for name in SHARDS]


def wait_for_pushes(composition: Composition, workers: "list[subprocess.Popen[str]]") -> None:
    """Wait until both shards have taken several rounds more of both workers."""
    before = journal_bytes(composition)

    def taken() -> bool:
        for worker in workers:
            assert worker.poll() is None, worker.communicate()[0]
        after = journal_bytes(composition)
        return all(now > then + PUSHES_BYTES for now, then in zip(after, before, strict=True))

    wait_until(taken)


def look(composition: Composition) -> list[dict[str, Any]]:
    """What `paceline status` says of each shard, from a worker's container."""
    status = json.loads(finished(composition.start("worker-1", command=["sh", "-euc", LOOK])))
    shards: list[dict[str, Any]] = status["shards"]
    return shards


def pushing(composition: Composition) -> list[tuple[str, ...]]:
    """The workers' services of which each shard has applied a push since it started."""
    members = [[each for each in shard["members"] if each["pushes_applied"]] for shard in look(composition)]
    return [tuple(sorted(each["worker_id"].removesuffix(".0") for each in shard)) for shard in members]


def test_keys_belong_to_those_who_need_them(composition: Composition) -> None:
    """A start makes credentials, each file for one user, also after one that was cut off; a second start keeps them."""
    (composition.volume("authority") / "new" / "authority").mkdir(parents=True)
    finished(composition.start("certs"))
    key = (composition.volume("server-credentials") / "server.key").read_bytes()
    finished(composition.start("certs"))
    assert (composition.volume("server-credentials") / "server.key").read_bytes() == key
    for name in ("server", *WORKERS):
        files = list(composition.volume(f"{name}-credentials").iterdir())
        assert {(file.stat().st_uid, file.stat().st_mode & 0o777) for file in files} == {(10001, 0o400)}
    authority = [path for path in composition.volume("authority").rglob("*.key") if path.is_file()]
    assert authority
    assert {(file.stat().st_uid, file.stat().st_mode & 0o077) for file in authority} == {(0, 0)}
    for name in WORKERS:
        assert {file.name for file in composition.volume(f"{name}-credentials").iterdir()} == {"ca.pem", "token"}


def test_the_run_trains_drains_and_goes_on(composition: Composition) -> None:
    """Two shards and two workers train over TLS; stopped in good order and started again, the run goes on."""
    shards = started_shards(composition)
    workers = [composition.start(name) for name in WORKERS]
    wait_for_pushes(composition, workers)
    for name, shard in shards.items():
        composition.stop(name, shard)
    assert [shard.wait(PATIENCE_S) for shard in shards.values()] == [0, 0]
    started_shards(composition)
    # A worker that is still on its way back to a shard has nobody to say good-bye to.
    wait_until(lambda: all(pushed == WORKERS for pushed in pushing(composition)))
    for name, worker in zip(WORKERS, workers, strict=True):
        composition.stop(name, worker)
    for worker in workers:
        printed, _ = worker.communicate(timeout=PATIENCE_S)
        assert worker.returncode == -signal.SIGINT, printed
    left = look(composition)
    assert [shard["shard_index"] for shard in left] == [0, 1]
    assert [shard["members"] for shard in left] == [[], []], "workers that are stopped leave the run"


def test_services_are_confined(composition: Composition) -> None:
    """A shard writes to its volume and to /tmp and nowhere else, and reads nothing of the authority or of root's."""
    finished(composition.start("certs"))
    tries = {
        "touch /var/lib/paceline/file && touch /tmp/file": True,
        "touch /opt/paceline/file": False,
        "touch /var/file": False,
        "touch /run/paceline/file": False,
        "cat /run/paceline/server.key": True,
        "ls /authority/run": False,
    }
    found = {}
    for line in tries:
        process = composition.start("shard-0", command=["sh", "-c", line])
        process.communicate(timeout=PATIENCE_S)
        found[line] = process.returncode == 0
    assert found == tries
