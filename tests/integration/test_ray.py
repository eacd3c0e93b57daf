"""A run on a real Ray cluster of several nodes: nodes are killed, the run goes on, and no push is lost."""

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import paceline
from integration.restartable_worker import INNER_STEPS
from paceline.cli import ExitCode, cli
from paceline_server.storage.directory import ShardDirectory
from paceline_server.storage.parameters import read_parameters
from paceline_server.storage.recovery import recover
from paceline_wire.errors import ConfigurationError, InvalidInputError, PacelineError, UnauthenticatedError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    ray = pytest.importorskip("ray", reason="Ray is not installed: make test-ray")
    cluster_utils = pytest.importorskip("ray.cluster_utils")

    import paceline.ray
    from integration.ray_training import ENOUGH, fail, train_until_enough
    from paceline.ray import RayRun

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own

ROOT = Path(__file__).resolve().parents[2]
STORE_BYTES = 80 * 1024 * 1024
PATIENCE_S = 90.0
"""A bound on what the cluster takes to start processes on a busy machine."""

CONFIG: dict[str, Any] = {
    "listen": "127.0.0.1:0",
    "outer": {"momentum": 0.9},
    "exchange": {"uplink": "int4", "downlink": "fp32", "fragment_elements": 256, "inner_steps": INNER_STEPS},
}
ON: dict[str, Any] = {"shard_options": {"resources": {"shards": 1}}, "worker_options": {"resources": {"workers": 1}}}
FRAGMENTS = 3


class KillableCluster:
    """A head, two nodes for shards and two for workers."""

    def __init__(self) -> None:
        # A dead node is known to be dead after a second of silence, so that tests do not wait.
        health = {
            "health_check_initial_delay_ms": 0,
            "health_check_period_ms": 500,
            "health_check_failure_threshold": 2,
        }
        head = {"num_cpus": 0, "object_store_memory": STORE_BYTES, "include_dashboard": False, "_system_config": health}
        self._cluster = cluster_utils.Cluster(initialize_head=True, head_node_args=head)
        self._nodes: list[Any] = []
        for kind in ("shards", "shards", "workers", "workers"):
            self.add(kind)
        ray.init(address=self.address, log_to_driver=False)

    @property
    def address(self) -> str:
        """Where other processes connect to it."""
        return str(self._cluster.address)

    def add(self, kind: str) -> None:
        """Add a node with room for two of a kind."""
        node = self._cluster.add_node(num_cpus=4, object_store_memory=STORE_BYTES, resources={kind: 2})
        self._nodes.append(node)

    def kill(self, node_id: str) -> None:
        """Kill everything on a node with SIGKILL, as when its host loses power."""
        (node,) = [each for each in self._nodes if each.node_id == node_id]
        self._nodes.remove(node)
        raylet = node.all_processes["raylet"][0].process.pid
        doomed = descendants(raylet)
        assert doomed
        self._cluster.remove_node(node, allow_graceful=False)
        for pid in doomed:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def shut_down(self) -> None:
        """End it."""
        ray.shutdown()
        self._cluster.shutdown()


def descendants(pid: int) -> list[int]:
    """All processes below one."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found = [pid]
    for each in found:
        found += [child for child, parent in parents.items() if parent == each]
    return found[1:]


@pytest.fixture(scope="module")
def cluster() -> Iterator[KillableCluster]:
    """A cluster that all tests share."""
    # Ray pickles functions of modules by name: its workers must be able to import this folder's.
    paths = [str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        found = KillableCluster()
        try:
            yield found
        finally:
            found.shut_down()


def eventually(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s, "what was waited for did not happen"
        time.sleep(0.1)


def told(data_dir: Path, worker: int) -> tuple[int, int]:
    """How often a worker was started, and its round."""
    file = data_dir / f"worker-{worker}" / "told"
    starts, current = file.read_text(encoding="utf-8").split() if file.exists() else (0, 0)
    return int(starts), int(current)


def goes_on(data_dir: Path) -> None:
    """Both workers come three rounds further."""
    before = [told(data_dir, worker)[1] for worker in range(2)]
    eventually(lambda: all(told(data_dir, worker)[1] >= before[worker] + 3 for worker in range(2)))


async def parameters(run: RayRun) -> dict[str, torch.Tensor]:
    """The run's parameters in every bit, as its shards have them."""
    async with paceline.connect(run.address, locate=run.locate) as client:
        return (await client.fetch("fp32")).tensors


async def test_nodes_die_and_no_push_is_lost(cluster: KillableCluster, tmp_path: Path) -> None:
    """Nodes with a worker and with a shard are killed, the address book, too: each round of each worker counts once."""
    with paceline.ray.launch(
        train_until_enough, data_dir=tmp_path, config=CONFIG, shards=2, workers=2, name="killed", **ON
    ) as run:
        goes_on(tmp_path)
        first = run.status()
        assert [shard.state for shard in first.shards] == ["serving"] * 2
        assert [worker.state for worker in first.workers] == ["training"] * 2
        assert run.locate() == [shard.address for shard in first.shards]
        assert len({shard.node for shard in first.shards}) == 2, "spread"

        cluster.kill(first.workers[0].node)
        eventually(lambda: told(tmp_path, 0)[0] == 2)
        goes_on(tmp_path)
        moved = run.status().workers[0]
        assert moved.node not in ("", first.workers[0].node)

        ray.kill(ray.get_actor("killed/book", namespace="paceline"), no_restart=False)
        cluster.kill(first.shards[1].node)
        eventually(lambda: run.locate()[1] != first.shards[1].address)
        goes_on(tmp_path)
        shard = run.status().shards[1]
        assert (shard.state, shard.address) == ("serving", run.locate()[1])
        assert shard.node not in ("", first.shards[1].node)
        assert told(tmp_path, 1)[0] == 1 + (first.workers[1].node == first.workers[0].node), "it followed the shard"

        (tmp_path / ENOUGH).touch()
        results = run.wait(PATIENCE_S)
        live = await parameters(run)
        attached = paceline.ray.attach("killed")
        assert [each.pid for each in attached.status().shards] == [each.pid for each in run.status().shards]
    assert [result["refused"] for result in results] == [0, 0]
    _, kept = read_parameters(tmp_path)
    assert torch.equal(live["x"], kept["x"])
    fragments: dict[int, Any] = {}
    for index in range(2):
        fragments |= recover(ShardDirectory(tmp_path, index)).shard.fragments
    assert len(fragments) == FRAGMENTS
    for hosted in fragments.values():
        answered = {name: each.seq for name, each in hosted.ledger.answered.items()}
        assert answered == {f"killed.{worker}": results[worker]["rounds"] for worker in range(2)}
    cluster.add("shards")
    cluster.add("workers")


def test_what_cannot_begin_says_why(cluster: KillableCluster, tmp_path: Path) -> None:
    """Wrong arguments are refused at once, a configuration that shards refuse in their words, and nothing is left."""
    wrong = {**CONFIG, "outer": {"momentum": 2}}
    with pytest.raises(ConfigurationError, match=r"outer\.momentum"):
        paceline.ray.launch(fail, data_dir=tmp_path, config=wrong, name="wrong", **ON)
    with pytest.raises(InvalidInputError, match="no run 'wrong'"):
        paceline.ray.attach("wrong")
    with pytest.raises(InvalidInputError, match="absolute"):
        paceline.ray.launch(fail, data_dir="run")
    with pytest.raises(InvalidInputError, match="arguments of launch"):
        paceline.ray.launch(fail, data_dir=tmp_path, config={"shards": 2})
    with pytest.raises(InvalidInputError, match="shard_options must not have max_restarts"):
        paceline.ray.launch(fail, data_dir=tmp_path, shard_options={"max_restarts": 1})
    with pytest.raises(InvalidInputError, match="must agree on TLS"):
        paceline.ray.launch(fail, data_dir=tmp_path, config={"security": {"tls_cert": "a", "tls_key": "b"}})
    with pytest.raises(InvalidInputError, match="must agree on TLS"):
        paceline.ray.launch(fail, data_dir=tmp_path, tls=True)
    weights = torch.zeros(100_000)
    with pytest.raises(InvalidInputError, match="may take 65536"):
        paceline.ray.launch(lambda worker: weights.sum() + worker.index, data_dir=tmp_path)


async def test_a_run_with_tls_and_signed_tokens(cluster: KillableCluster, tmp_path: Path) -> None:
    """The credentials of `paceline certs`, as docs/ray.md says: shards and workers use them, strangers stay out."""
    certs = tmp_path / "certs"
    make = ["certs", "make", str(certs), "--server", "secured", "--worker", "secured"]
    assert CliRunner().invoke(cli, make).exit_code == 0
    server, worker = certs / "server", certs / "workers" / "secured"
    security = {
        "tls_cert": str(server / "server.pem"),
        "tls_key": str(server / "server.key"),
        "token_key": str(server / "token.pub"),
        "revoked": str(server / "revoked"),
    }
    token = (worker / "token").read_text().strip()
    tls = paceline.TLS(ca=str(worker / "ca.pem"), server_name="secured")
    with paceline.ray.launch(
        train_until_enough,
        data_dir=tmp_path / "run",
        config={**CONFIG, "security": security},
        shards=2,
        workers=2,
        name="secured",
        token=token,
        tls=tls,
        **ON,
    ) as run:
        goes_on(tmp_path / "run")
        async with paceline.connect(run.address, token=token, tls=tls, locate=run.locate) as client:
            members = [{member.worker_id for member in each.members} for each in await client.statuses()]
        assert members == [{"secured.0", "secured.1"}] * 2
        with pytest.raises(UnauthenticatedError):
            async with paceline.connect(run.address, tls=tls):
                pass
        look = ["status", run.address, "--token", token, "--tls-ca", str(worker / "ca.pem")]
        for expected, code in (("secured", ExitCode.OK), ("another", ExitCode.UNREACHABLE)):
            looked = await asyncio.to_thread(CliRunner().invoke, cli, [*look, "--tls-server-name", expected])
            assert looked.exit_code == code, looked.output
        (tmp_path / "run" / ENOUGH).touch()
        results = run.wait(PATIENCE_S)
    assert [result["refused"] for result in results] == [0, 0]


def test_a_training_function_that_fails_is_told(cluster: KillableCluster, tmp_path: Path) -> None:
    """The error of a worker's function reaches whoever waits; a second run of the name is refused meanwhile."""
    with paceline.ray.launch(fail, data_dir=tmp_path, config=CONFIG, name="fails", **ON) as run:
        with pytest.raises(InvalidInputError, match=re.escape("attach('fails')")):
            paceline.ray.launch(fail, data_dir=tmp_path, config=CONFIG, name="fails", **ON)
        with pytest.raises(PacelineError, match="ZeroDivisionError: worker 0 divides"):
            run.wait(PATIENCE_S)


def test_the_example(cluster: KillableCluster, tmp_path: Path) -> None:
    """ray_launch.py trains two workers on the cluster and says what they reached."""
    command = [sys.executable, str(ROOT / "examples" / "ray_launch.py"), "--address", cluster.address]
    command += ["--data-dir", str(tmp_path), "--listen", "127.0.0.1:0", "--steps", "60"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"at the end: loss ([\d.]+) nats", done.stdout)]
    assert len(losses) == 2
    assert max(losses) < 5.4, "close to log(256) at the beginning"
