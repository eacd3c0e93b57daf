"""The scenarios of docs/deploy.md: their commands as they stand, in network namespaces in place of the hosts.

A stand-in is a namespace at the end of an emulated link, with a /etc/hosts and a /var/lib of its own. Only how long the
example trains, and how long doctor measures, are others here; credentials are made as the page says.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from integration.patience import PATIENCE_S, wait_until
from link import Host, Link
from link_queue import LinkShape

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not Path("/dev/net/tun").exists() or shutil.which("unshare") is None,
    reason="needs root, /dev/net/tun and unshare",
)

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
NAME = "ps.example.org"
SHORTER = (
    ("examples/train.py ", "examples/train.py --seconds 1.5 "),
    ("paceline doctor ", "paceline doctor --seconds 0.2 "),
)


class Block(NamedTuple):
    """Commands of a page for one host."""

    host: str
    commands: str


def blocks_of(heading: str) -> list[Block]:
    """The scenario's blocks, in order; the first line of each says where."""
    section = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    found = re.findall(r"```bash\n# (?:on |)(.*?)\n(.*?)```", section, re.DOTALL)
    return [Block(host, commands) for host, commands in found]


class Stage:
    """The stand-ins of one scenario, and what runs in them.

    Args:
        folder: For their files and their output.
        link: The hosts; the first one is the server's.
        running: Ends what is left at the end.
    """

    def __init__(self, folder: Path, link: Link, running: ExitStack) -> None:
        self.folder = folder
        self._link = link
        self._running = running
        self._outputs = 0
        (folder / "lib" / "paceline").mkdir(parents=True)
        (folder / "bin").mkdir()
        (folder / "hosts").write_text(f"127.0.0.1 localhost\n{link.hosts[0].address} {NAME}\n")
        self._command("paceline", f'exec {sys.executable} -m paceline "$@"')
        self._command("python", f'exec {sys.executable} "$@"')
        (folder / "examples").symlink_to(ROOT / "examples")
        certificates(folder)

    def start(self, block: Block, worker: int = 1) -> "subprocess.Popen[str]":
        """Start a block's commands in its host; a worker's is the one with that number."""
        commands = block.commands
        for text, shorter in SHORTER:
            commands = commands.replace(text, shorter)
        # Doctor's findings on emulated links are no failures of the sequence.
        commands = re.sub(r"^(paceline doctor .*)$", r"\1 || [ $? -eq 1 ]", commands, flags=re.MULTILINE)
        mounts = f"mount --bind {self.folder / 'hosts'} /etc/hosts && mount --bind {self.folder / 'lib'} /var/lib"
        script = f"{mounts} && cd {self.folder} && export PATH={self.folder / 'bin'}:$PATH && set -e\n{commands}"
        command = ["unshare", "--mount", "--propagation", "private", "bash", "-c", script]
        env = {name: value for name, value in os.environ.items() if not name.startswith("PACELINE_")}
        host = self._host(block, worker)
        process = host.popen(
            command, stdout=self._output(), stderr=subprocess.STDOUT, text=True, env=env, process_group=0
        )
        self._running.callback(end, process)
        return process

    def serve(self, block: Block) -> "subprocess.Popen[str]":
        """Start a server and wait until it serves."""
        process = self.start(block)
        log = self.newest_output
        wait_until(lambda: "serving on" in log.read_text() or process.poll() is not None)
        assert process.poll() is None, log.read_text()
        return process

    def run(self, block: Block, worker: int = 1) -> str:
        """Run a block to its end; what it printed."""
        process = self.start(block, worker)
        log = self.newest_output
        return self.ended(process, log)

    def ended(self, process: "subprocess.Popen[str]", log: Path) -> str:
        """Wait for the end of a block that must end well; what it printed."""
        code = process.wait(2 * PATIENCE_S)
        assert code == 0, log.read_text()
        return log.read_text()

    @property
    def newest_output(self) -> Path:
        """Where the block that was started last prints."""
        return self.folder / f"output-{self._outputs}"

    def _output(self) -> int:
        self._outputs += 1
        descriptor = os.open(self.newest_output, os.O_WRONLY | os.O_CREAT)
        self._running.callback(os.close, descriptor)
        return descriptor

    def _host(self, block: Block, worker: int) -> Host:
        return self._link.hosts[0 if "server" in block.host else worker]

    def _command(self, name: str, script: str) -> None:
        path = self.folder / "bin" / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)


def certificates(folder: Path) -> None:
    """What the page's first command makes, where its scenarios look for it."""
    make = [sys.executable, "-m", "paceline", "certs", "make", "certs"]
    subprocess.run([*make, "--server", NAME, "--worker", "paris", "--admin", "me"], cwd=folder, check=True)
    for name in ("token", "ca.pem"):
        (folder / name).symlink_to(folder / "certs" / "workers" / "paris" / name)
    (folder / "me").symlink_to(folder / "certs" / "admins" / "me")


def end(process: "subprocess.Popen[str]") -> None:
    """End a block and what it started."""
    if process.poll() is None:
        os.killpg(process.pid, 15)
    process.wait(PATIENCE_S)


@contextmanager
def staged(folder: Path, shape: LinkShape, hosts: int) -> Iterator[Stage]:
    """Stand-ins with links of a shape between the server and each other host."""
    with Link(shape, hosts=hosts) as link, ExitStack() as running:
        yield Stage(folder, link, running)


def rounds_in(output: str) -> int:
    """Rounds that the example says it has trained."""
    found = re.search(r"after (\d+) rounds", output)
    assert found is not None, output
    return int(found[1])


def test_two_clouds(tmp_path: Path) -> None:
    """A server with TLS and a token, a worker beside it and one over a link, whom doctor tells what to expect."""
    server, far, near, status = blocks_of("Two clouds")
    with staged(tmp_path, LinkShape(rate_mbit=200, delay_ms=10), hosts=2) as stage:
        stage.serve(server)
        beside = stage.start(near._replace(host="the server's cloud"), worker=0)
        log = stage.newest_output
        told = stage.run(far)
        assert "recommended: " in told
        assert "TLSv1." in told
        assert rounds_in(told) >= 1
        assert rounds_in(stage.ended(beside, log)) >= 1
        assert "shard 0: 1 fragments, 303,744 elements" in stage.run(status)


def test_three_continents(tmp_path: Path) -> None:
    """Two shards, workers over long links of their own, and longer rounds set while the server runs."""
    server, second, third, longer = blocks_of("Three continents")
    with staged(tmp_path, LinkShape(rate_mbit=100, delay_ms=60), hosts=3) as stage:
        stage.serve(server)
        one = stage.start(second, worker=1)
        log = stage.newest_output
        assert rounds_in(stage.run(third, worker=2)) >= 1
        assert rounds_in(stage.ended(one, log)) >= 1
        told = stage.run(longer)
        assert told.count("exchange.inner_steps 100 -> 200; holds across restarts") == 2
        assert "lr 0.7, 200 inner steps" in told


def test_home_gpus_behind_nat(tmp_path: Path) -> None:
    """A worker over a thin, lossy link that only dials out: nothing listens in its namespace. And one is put out."""
    server, home, evict = blocks_of("Home GPUs behind NAT")
    with staged(tmp_path, LinkShape(rate_mbit=20, delay_ms=15, loss=0.002), hosts=2) as stage:
        stage.serve(server)
        assert rounds_in(stage.run(home)) >= 1
        told = stage.run(evict)
        assert "its name is refused from now on" in told
        assert "evict home-17 from not a member to evicted for 43200 s: old data set: done" in told


def test_upgrade_and_rollback(tmp_path: Path) -> None:
    """A worker trains on across drain and start; after going back to the copy the run is where it was drained."""
    drain, newer, status, back, older = blocks_of("Upgrade and rollback")
    far = blocks_of("Two clouds")[1]
    train = far._replace(
        commands=re.sub(r"paceline doctor .*\n", "", far.commands).replace("train.py", "train.py --seconds 6")
    )
    with staged(tmp_path, LinkShape(rate_mbit=200, delay_ms=5), hosts=2) as stage:
        first = stage.serve(newer)
        working = stage.start(train)
        log = stage.newest_output
        wait_until(lambda: "at the start" in log.read_text())
        stage.run(drain)
        assert first.wait(PATIENCE_S) == 0
        second = stage.serve(newer)
        assert rounds_in(stage.ended(working, log)) >= 1
        after = bins_in(stage.run(status))
        stage.run(back)
        assert second.wait(PATIENCE_S) == 0
        stage.serve(older)
        assert bins_in(stage.run(status)) < after


def bins_in(output: str) -> int:
    """The bin that `paceline status` says is open."""
    found = re.search(r"bins (\d+)-", output)
    assert found is not None, output
    return int(found[1])


def test_the_scenarios_are_those_tried() -> None:
    """No command of a scenario is left out above: every block of the page is one of a scenario that is run."""
    tried = ("Two clouds", "Three continents", "Home GPUs behind NAT", "Upgrade and rollback")
    assert sum(len(blocks_of(heading)) for heading in tried) == PAGE.count("```bash")
    assert all(shlex.split(block.commands, comments=True) for heading in tried for block in blocks_of(heading))
