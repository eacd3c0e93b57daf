"""A worker that is killed and restarted from its checkpoint loses nothing and counts nothing twice."""

import contextlib
import copy
import io
import logging
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import paceline
import paceline_server
from integration.killable import KillableServer
from integration.patience import PATIENCE_S, wait_until
from integration.raw import RawStream, RawWorker
from integration.restartable_worker import INNER_STEPS, Model
from paceline import Run
from paceline_server.storage.directory import ShardDirectory
from paceline_server.storage.recovery import recover
from paceline_wire.errors import InvalidInputError

SCRIPT = Path(__file__).with_name("restartable_worker.py")
STEPS = 18
ROUNDS = STEPS // INNER_STEPS
FRAGMENTS = 3
CONFIG: dict[str, Any] = {
    "outer": {"momentum": 0.9},
    "exchange": {"uplink": "int4", "downlink": "fp32", "fragment_elements": 256},
}


def flags(uplink: str) -> list[str]:
    """A run of a few fragments."""
    exchange = ["--exchange.uplink", uplink, "--exchange.downlink", "fp32", "--exchange.fragment-elements", "256"]
    return ["--outer.momentum", "0.9", *exchange]


def life(address: str, checkpoint: Path, overlap: str, *, die_at: int = -1, die: str = "after") -> int:
    """Let the worker run from its checkpoint to its end, one way or the other; its exit code."""
    command = [sys.executable, str(SCRIPT), address, str(checkpoint), "--steps", str(STEPS), "--overlap", overlap]
    command += ["--die-at", str(die_at), "--die", die]
    return subprocess.run(command, stdout=subprocess.DEVNULL, timeout=2 * PATIENCE_S, check=False).returncode


def lives(server: KillableServer, checkpoint: Path, overlap: str, seed: int) -> int:
    """Let it be killed again and again on its way, at any point, and the server in between; how often it was."""
    moments, kills, step = random.Random(seed), 0, 0
    while step < STEPS - 1:
        step = min(step + moments.randrange(2, 2 * INNER_STEPS), STEPS - 1)
        die = moments.choice(["before", "after", f"in:{moments.uniform(0, 0.02):.4f}"])
        code = life(server.address, checkpoint, overlap, die_at=step, die=die)
        assert code in (-signal.SIGKILL, 0)
        kills += code != 0
        if kills == 2:
            server.restart()
    assert life(server.address, checkpoint, overlap) == 0
    return kills


def vectors(data_dir: Path) -> dict[str, torch.Tensor]:
    """All numbers of a stopped server's fragments."""
    shard = recover(ShardDirectory(data_dir, 0)).shard
    found: dict[str, torch.Tensor] = {}
    for index, hosted in shard.fragments.items():
        assert hosted.values is not None
        found |= {f"{name} of {index}": vector for name, vector in hosted.values.vectors.items()}
        assert hosted.ledger.answered["restarted"].seq == ROUNDS
        assert hosted.ledger.issuing_bin == ROUNDS
    return found


@pytest.mark.parametrize("uplink", ["fp32", "int4"])
def test_killed_anywhere_it_ends_in_the_same_bits(tmp_path: Path, uplink: str) -> None:
    """Killed at random points, with the server killed once, too, a worker brings the run to the uninterrupted bits."""
    states = []
    for name in ("killed", "uninterrupted"):
        with KillableServer(tmp_path / name, *flags(uplink)) as server:
            checkpoint = tmp_path / f"{name}.pt"
            if name == "killed":
                assert lives(server, checkpoint, "blocking", seed=len(uplink)) >= 3
            else:
                assert life(server.address, checkpoint, "blocking") == 0
            assert server.stop() == 0
        states.append(vectors(tmp_path / name))
    assert len(states[1]) == 2 * FRAGMENTS
    for vector, expected in states[1].items():
        assert torch.equal(expected, states[0][vector]), vector


def test_killed_twice_after_the_same_round(tmp_path: Path) -> None:
    """A start that dies after it has pushed and before it has saved anything is counted for the next one."""
    with KillableServer(tmp_path / "run", *flags("int4")) as server:
        checkpoint = tmp_path / "state.pt"
        for step in (INNER_STEPS - 1, INNER_STEPS - 1):
            assert life(server.address, checkpoint, "blocking", die_at=step) == -signal.SIGKILL
        assert life(server.address, checkpoint, "blocking") == 0
        assert server.stop() == 0
    vectors(tmp_path / "run")


def test_eager_pushes_count_once(tmp_path: Path) -> None:
    """Killed with pushes in flight, each round's pushes are applied once, whatever was answered before."""
    with KillableServer(tmp_path / "run", *flags("int4")) as server:
        assert lives(server, tmp_path / "state.pt", "eager", seed=2) >= 3
        assert server.stop() == 0
    vectors(tmp_path / "run")


# --- In this process.


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A run that all tests share."""
    with paceline_server.local(CONFIG) as found:
        yield found


class Trainer:
    """A model, its optimizer, and its membership of the run; a context manager that leaves without flushing."""

    def __init__(self, address: str, worker_id: str, overlap: str = "blocking") -> None:
        self.model = Model()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)
        self.run: Run = paceline.join(
            address, self.model, self.optimizer, inner_steps=INNER_STEPS, worker_id=worker_id, overlap=overlap
        )

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(self, *_: object) -> None:
        self.run.close()

    def train(self, steps: int) -> None:
        """Make inner steps."""
        for step in range(steps):
            self.model.loss(step).backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            self.optimizer.zero_grad()


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    """The state as it is after torch.save and torch.load."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def test_the_round_goes_on_at_its_step(address: str) -> None:
    """Round, step and local progress are those of the saved state, in every bit while nobody else pushed."""
    with Trainer(address, "goes-on") as before:
        before.train(INNER_STEPS + 2)
        state, values = through_a_file(before.run.state_dict()), before.model.x.detach().clone()
    with Trainer(address, "goes-on") as after:
        after.run.load_state_dict(state)
        assert torch.equal(values, after.model.x)
        assert (after.run.round, after.run.stats().inner_steps) == (1, INNER_STEPS)
        after.train(1)
        assert after.run.round == 2


def test_what_others_pushed_meanwhile_is_adopted(address: str) -> None:
    """The model is the newest base minus the local progress of the round that goes on."""
    with Trainer(address, "adopts") as before:
        before.train(2)
        state = before.run.state_dict()
    progress = torch.cat([each["start"] - each["values"] for each in state["fragments"]])
    with Trainer(address, "another") as other:
        other.train(INNER_STEPS)
    with Trainer(address, "adopts") as after:
        base = after.model.x.detach().clone()
        after.run.load_state_dict(state)
        assert not torch.equal(base, before.model.x + progress)
        torch.testing.assert_close(after.model.x.detach(), base - progress)


def test_a_state_that_is_too_old_begins_anew(address: str, caplog: pytest.LogCaptureFixture) -> None:
    """If the worker pushed rounds after it saved its state, a new round begins at the run's values, with a warning."""
    with Trainer(address, "old") as before:
        before.train(INNER_STEPS + 1)
        state = before.run.state_dict()
        before.train(3 * INNER_STEPS)
    with Trainer(address, "old") as after, caplog.at_level(logging.WARNING):
        base = after.model.x.detach().clone()
        after.run.load_state_dict(state)
        assert torch.equal(base, after.model.x)
        assert "the run has 4 of this worker's pushes to fragment 0, and the state 1" in caplog.text
        after.train(2 * INNER_STEPS)
        assert after.run.stats().pushes == 2 * FRAGMENTS
        assert after.run.stats().pushes_refused == 0


def test_a_state_that_another_start_ignored_begins_anew(address: str, caplog: pytest.LogCaptureFixture) -> None:
    """A start that pushed without the state makes it too old, whatever it pushed."""
    with Trainer(address, "ignored") as first:
        first.train(INNER_STEPS + 1)
        state = first.run.state_dict()
    with Trainer(address, "ignored") as second:
        second.train(INNER_STEPS)
    with Trainer(address, "ignored") as third, caplog.at_level(logging.WARNING):
        third.run.load_state_dict(state)
        assert "another start of worker 'ignored' has pushed to fragment 0 since" in caplog.text
        third.train(INNER_STEPS)
        assert third.run.stats().pushes == FRAGMENTS


def test_state_of_something_else_is_refused(address: str) -> None:
    """Another worker, model or run, a state that is none, and a late call are told apart, with what to do."""
    with Trainer(address, "right") as trainer:
        state = trainer.run.state_dict()
        wrong = copy.deepcopy(state)
        wrong["manifest"] = "0"
        anew = {**state, "initialization_id": state["initialization_id"] + 1}
        for given, message in (
            ({**state, "worker_id": "left"}, r"of worker 'left'.* join with worker_id='left'"),
            (wrong, "another model"),
            (anew, "another run"),
            ({}, "no int 'format'"),
            ({**state, "format": 99}, "has format 99"),
            ({**state, "fragments": [{}]}, "no Tensor 'start'"),
        ):
            with pytest.raises(InvalidInputError, match=message):
                trainer.run.load_state_dict(given)
        trainer.train(1)
        with pytest.raises(InvalidInputError, match="right after join"):
            trainer.run.load_state_dict(state)


def test_state_can_be_saved_while_exchanges_are_in_flight(address: str) -> None:
    """Under eager every state has whole rounds: each that has ended is in flight or answered in every fragment."""
    with Trainer(address, "eager", "eager") as trainer:
        for step in range(1, 4 * INNER_STEPS + 1):
            trainer.train(1)
            state = trainer.run.state_dict()
            assert state["round"] == step // INNER_STEPS
            for fragment in state["fragments"]:
                assert fragment["seq"] == state["round"]
                in_flight = [push["seq"] for push in fragment["pushes"]]
                assert in_flight == list(range(state["round"] - len(in_flight) + 1, state["round"] + 1))
        trainer.run.flush()
        assert all(not each["pushes"] for each in trainer.run.state_dict()["fragments"])


def test_nothing_of_the_old_start_enters_after_the_answer(address: str) -> None:
    """Pushes that are on their way while the worker is taken over are counted in the answer, or never."""
    with Trainer(address, "seed"):
        pass
    with RawWorker(address, "raced") as old, RawWorker(address, "raced") as new, old.exchange(opened=False) as stream:
        old.join()
        stream.open()
        before = newest(old)
        for seq in range(1, 40):
            stream.push(0, seq, 0, torch.zeros(256))
        wait_until(lambda: newest(old) > before)
        joined = new.join(previous=old.worker.incarnation)
        assert end_of(stream) == "SupersededError"
        decided = {each.fragment: each.seq for each in joined.progress}
        assert decided[0] > 0
        assert decided == {each.fragment: each.seq for each in new.join(previous=old.worker.incarnation).progress}
        with new.exchange() as after:
            after.push(0, decided[0] + 1, 0, torch.zeros(256))
            assert after.update()[0].seq == decided[0] + 1


def newest(worker: RawWorker) -> int:
    """How many pushes the shard has applied."""
    return worker.status().pushes_applied


def end_of(stream: RawStream) -> str:
    """The error that ends a stream, whatever is answered before."""
    for _ in range(100):
        with contextlib.suppress(AssertionError):
            return stream.end().error
    raise AssertionError("the stream goes on")
