"""What a worker saves is what it goes on from: rounds, residuals, estimates and pushes in flight, bit for bit."""

import copy
import io
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from paceline.eager import PreparedPush
from paceline.fragments import manifest_of
from paceline.worker import Overlap, ReceivedUpdate, Worker, WorkerSettings
from paceline.worker_state import Progress, SavedFragment, SavedPush, SavedWorker, staleness
from paceline_wire import codecs
from paceline_wire.errors import InvalidInputError
from paceline_wire.v1 import parameter_server_pb2 as pb
from support_core import normal

SIZE = 300
MANIFEST = manifest_of({"w": torch.zeros(SIZE)}, (), 256)
INDEXES = range(len(MANIFEST.fragments))


def settings(own_weight: str = "1", overlap: Overlap = Overlap.EAGER) -> WorkerSettings:
    """A worker's settings; int4, so that every push leaves a residual."""
    configuration = pb.RunConfiguration(
        outer=pb.OuterConfiguration(lr=0.5, momentum=0.5, look_ahead=True),
        exchange=pb.ExchangeConfiguration(own_weight=own_weight, window=2),
    )
    return WorkerSettings(configuration=configuration, overlap=overlap, uplink=codecs.codec("int4"))


@dataclass
class Played:
    """A worker, its model, and its pushes in flight, with a server that moves nothing by itself."""

    of: WorkerSettings
    model: torch.Tensor = field(default_factory=lambda: torch.zeros(SIZE))
    in_flight: list[dict[int, PreparedPush]] = field(default_factory=lambda: [{} for _ in INDEXES])

    def __post_init__(self) -> None:
        self.worker = Worker(self.of, MANIFEST, {"w": self.model}, bases(0), inner_steps=3, num_workers=2)

    def step(self, seed: int) -> None:
        """One inner step."""
        self.model.add_(normal(SIZE, seed))
        self.worker.count(10)
        self.worker.after_step()
        self.worker.adopt()

    def push(self) -> list[bytes]:
        """End the round; the payloads."""
        ended = self.worker.end_round()
        pushes = [self.worker.prepare(index, ended) for index in INDEXES]
        for index, push in enumerate(pushes):
            self.in_flight[index][push.seq] = push
        return [push.payload.numpy().tobytes() for push in pushes]

    def answer(self, index: int, seq: int, *, refusal: str | None = None) -> None:
        """Let a push be answered."""
        del self.in_flight[index][seq]
        values, newest_bin = bases(seq)[index]
        update = ReceivedUpdate(
            values=values, bin=newest_bin, bins_late=0, refusal=refusal, inner_steps=3, quota=2, num_bytes=0
        )
        self.worker.take_in(index, seq, update)

    def saved(self) -> SavedWorker:
        """Its state."""
        fragments = []
        for index, (start, values) in enumerate(self.worker.positions()):
            memory = self.worker.memory(index)
            pushes = [
                SavedPush(
                    seq=push.seq,
                    base_bin=push.base_bin,
                    tokens=None,
                    payload=push.payload,
                    residual=memory.uplink.residuals_in_flight[push.seq],
                    expected=memory.expected[push.seq],
                )
                for push in self.in_flight[index].values()
            ]
            fragments.append(
                SavedFragment(
                    start=start,
                    values=values,
                    seq=memory.uplink.seq,
                    residual=memory.uplink.residual,
                    velocity=memory.velocity,
                    pushes=pushes,
                )
            )
        return SavedWorker(
            worker_id="a",
            incarnation=5,
            manifest=MANIFEST.digest,
            initialization_id=2**63,
            uplink="int4",
            round=self.worker.round,
            steps_in_round=self.worker.steps_in_round,
            tokens=self.worker.tokens,
            fragments=fragments,
        )


def bases(seq: int) -> list[tuple[torch.Tensor, int]]:
    """The server's values after so many pushes of this worker, and their bin."""
    return [(normal(fragment.num_elements, 100 + seq) * (seq > 0), seq) for fragment in MANIFEST.fragments]


def through_a_file(saved: SavedWorker) -> SavedWorker:
    """The state after torch.save and torch.load."""
    file = io.BytesIO()
    torch.save(saved.to_dict(), file)
    file.seek(0)
    return SavedWorker.from_dict(torch.load(file, weights_only=True))


def restored(before: Played, decided: int, newest: int) -> Played:
    """A new worker that goes on from another's state, with so many of its pushes decided."""
    saved = through_a_file(before.saved())
    after = Played(before.of)
    progress = [Progress(seq=decided) for _ in INDEXES]
    assert staleness(saved, progress) is None
    after.worker.restore(saved, bases(newest), progress)
    after.in_flight = copy.deepcopy(before.in_flight)
    return after


@pytest.mark.parametrize("own_weight", ["1", "1/M", "local", "predicted"])
def test_it_goes_on_in_the_same_bits(own_weight: str) -> None:
    """Saved in the midst of a round with pushes in flight, a worker makes the same model and the same pushes."""
    before = Played(settings(own_weight))
    for seq in (1, 2, 3):
        before.step(seq)
        before.push()
    for index in INDEXES:
        before.answer(index, 1)
    before.worker.adopt()
    before.step(7)
    after = restored(before, decided=1, newest=1)
    assert torch.equal(before.model, after.model)
    assert (after.worker.round, after.worker.steps_in_round, after.worker.tokens) == (3, 1, 10)
    for played in (before, after):
        for index in INDEXES:
            played.answer(index, 2)
            played.answer(index, 3, refusal="refused")
        played.step(8)
    assert torch.equal(before.model, after.model)
    assert before.push() == after.push()


def test_what_the_base_has_is_not_expected_again() -> None:
    """A push in flight that was decided is in the newest base, and nothing more is expected of it."""
    before = Played(settings())
    before.step(1)
    before.push()
    after = restored(before, decided=1, newest=1)
    assert torch.equal(torch.cat([values for values, _ in bases(1)]), after.model)
    unknown = restored(before, decided=0, newest=0)
    assert not torch.equal(torch.zeros(SIZE), unknown.model)


def test_a_round_that_was_pushed_is_done_once_more_from_where_it_was() -> None:
    """One push more than the state knows: model and start stay, the push is the same, the next start is the base."""
    before = Played(settings(overlap=Overlap.BLOCKING))
    before.step(1)
    after = restored(before, decided=1, newest=1)
    assert torch.equal(before.model, after.model)
    for played in (before, after):
        played.step(2)
    assert before.push() == after.push()
    for index in INDEXES:
        after.answer(index, 1)
    after.worker.adopt()
    assert torch.equal(torch.cat([values for values, _ in bases(1)]), after.model)


def test_a_stale_state_leaves_only_the_numbering() -> None:
    """Nothing of the old round is in the model, nothing is owed, and the next push has the next number."""
    after = Played(settings())
    after.worker.begin_anew(4, bases(6), [Progress(seq=6) for _ in INDEXES])
    assert torch.equal(torch.cat([values for values, _ in bases(6)]), after.model)
    assert (after.worker.round, after.worker.steps_in_round) == (4, 0)
    after.push()
    assert [list(pushes) for pushes in after.in_flight] == [[7] for _ in INDEXES]


@pytest.mark.parametrize(
    ("progress", "reason"),
    [
        (Progress(seq=3), None),
        (Progress(seq=4), None),
        (Progress(seq=1), None),
        (Progress(seq=5), "the run has 5 of this worker's pushes to fragment 1, and the state 3"),
        (Progress(seq=0), "forgotten"),
        (Progress(seq=0, superseded=True), "another start of worker 'a'"),
    ],
)
def test_which_states_are_stale(progress: Progress, reason: str | None) -> None:
    """With pushes 2 and 3 in flight, from none of those to one more round may be decided."""
    played = Played(settings())
    for seq in (1, 2, 3):
        played.step(seq)
        played.push()
    for index in INDEXES:
        played.answer(index, 1)
    found = staleness(played.saved(), [Progress(seq=3), progress])
    assert found is None if reason is None else found is not None and reason in found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "reads format 1"),
        ({"round": "1"}, "no int 'round'"),
        ({"fragments": None}, "no list 'fragments'"),
        ({"fragments": [{"start": torch.zeros(2, 2)}]}, r"start is torch.float32 of shape \[2, 2\]"),
        ({"fragments": [3]}, "no Tensor 'start'"),
    ],
)
def test_what_is_no_state_is_refused(change: dict[str, Any], message: str) -> None:
    """The text says what is missing or wrong."""
    state = Played(settings()).saved().to_dict()
    with pytest.raises(InvalidInputError, match=message):
        SavedWorker.from_dict({**state, **change})


@pytest.mark.parametrize(("key", "number"), [("round", -1), ("incarnation", 1 << 64), ("initialization_id", -7)])
def test_numbers_that_cannot_travel_are_refused(key: str, number: int) -> None:
    """A negative or enormous number would end the exchange later, in the middle of training."""
    state = Played(settings()).saved().to_dict()
    with pytest.raises(InvalidInputError, match=f"{key} is {number}"):
        SavedWorker.from_dict({**state, key: number})


@pytest.mark.parametrize("key", ["residual", "velocity", "payload", "expected"])
def test_vectors_of_another_size_are_refused(key: str) -> None:
    """So is what is kept for pushes and is not of the fragments' sizes."""
    played = Played(settings())
    played.step(1)
    played.push()
    state = copy.deepcopy(played.saved().to_dict())
    saved = SavedWorker.from_dict(state)
    saved.require(worker_id=saved.worker_id, manifest=MANIFEST, initialization_id=saved.initialization_id)
    fragment = state["fragments"][0]
    dtype = torch.uint8 if key == "payload" else torch.float32
    (fragment["pushes"][0] if key in ("payload", "expected") else fragment)[key] = torch.zeros(3, dtype=dtype)
    with pytest.raises(InvalidInputError, match="does not fit together"):
        SavedWorker.from_dict(state).require(
            worker_id=saved.worker_id, manifest=MANIFEST, initialization_id=saved.initialization_id
        )
