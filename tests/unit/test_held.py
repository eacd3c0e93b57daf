"""What workers hold and a shard keeps: named before it is used, within its bound, told apart from anything else."""

import zlib

import pytest
import torch

from paceline.fragments import Destination, empty_tensors
from paceline.held import Held as WorkersHeld
from paceline.held import follow
from paceline_server.held import CHECKED_EVERY, MOST_SPARE, Form, Held, HeldMemory, Holding, Holdings
from paceline_wire import codecs
from paceline_wire.errors import CodecError, UnavailableError
from paceline_wire.manifest import Manifest, TensorSpec
from paceline_wire.v1 import parameter_server_pb2 as pb

INT8, BF16 = codecs.codec("int8"), codecs.codec("bf16")
SIZE = 100
BYTES = 4 * SIZE


def held(version: int) -> Held:
    """Values of a version."""
    return Held(values=torch.full((SIZE,), float(version)), version=version)


def begun(holdings: Holdings, worker: str = "a", incarnation: int = 1, fragments: int = 1) -> Holding:
    """A worker that was sent fragments whole, each of the version of its index."""
    holding = holdings.begin(worker, incarnation)
    for fragment in range(fragments):
        holding.name(fragment, None)
        holding.keep(fragment, held(fragment))
    return holding


def test_updates_are_whole_until_something_is_held_and_then_differences() -> None:
    """What was queued last is what the next update is a difference to."""
    holding = Holdings(BYTES).begin("a", 1)
    holding.name(0, None)
    assert holding.form(0, INT8, SIZE) == Form(codec=BF16, kept=True)
    first = held(7)
    holding.keep(0, first)
    assert holding.form(0, INT8, SIZE) == Form(codec=INT8, since=first)
    holding.keep(0, None)
    assert holding.form(0, INT8, SIZE) == Form(codec=BF16, kept=True)


@pytest.mark.parametrize(("named", "kept"), [(0, True), (1, False), (None, False)])
def test_on_a_new_stream_the_worker_names_what_it_holds(named: int | None, kept: bool) -> None:
    """Nothing is a difference before it does; another version, or none, is dropped; what it names later is ignored."""
    holdings = Holdings(BYTES)
    begun(holdings).end()
    holding = holdings.begin("a", 1)
    assert holding.held(0) is None
    holding.name(0, named)
    assert (holding.held(0) is not None) == kept
    assert holdings.num_bytes == (BYTES if kept else 0)
    holding.keep(0, held(5))
    holding.name(0, named)
    assert holding.held(0) is not None


def test_a_stream_that_was_replaced_keeps_nothing() -> None:
    """Its successor has what it kept, and what is queued in the old one, or its end, changes nothing of that."""
    holdings = Holdings(2 * BYTES)
    older = begun(holdings)
    newer = holdings.begin("a", 1)
    newer.name(0, 0)
    assert older.form(0, INT8, SIZE) == Form(codec=BF16)
    older.keep(0, held(9))
    older.end()
    kept = newer.held(0)
    assert kept is not None
    assert kept.version == 0
    assert holdings.num_bytes == BYTES


def test_another_incarnation_begins_with_nothing() -> None:
    """Whatever it names: a version is of what one start of a worker was sent."""
    holdings = Holdings(BYTES)
    begun(holdings).end()
    newer = holdings.begin("a", 2)
    newer.name(0, 0)
    assert newer.held(0) is None
    assert holdings.num_bytes == 0


def test_idle_workers_make_room_for_others() -> None:
    """Those whose streams ended first go first, and only as many as must."""
    holdings = Holdings(3 * BYTES)
    streams = [begun(holdings, worker) for worker in ("a", "b", "c")]
    streams[1].end()
    streams[0].end()
    begun(holdings, "d")
    assert [holdings.of(worker) is not None for worker in "abcd"] == [True, False, True, True]
    assert holdings.num_bytes == 3 * BYTES


def test_workers_with_a_stream_make_room_for_nobody() -> None:
    """Where all are connected, one more is sent whole values that are not kept, and nothing exceeds the bound."""
    holdings = Holdings(2 * BYTES)
    for worker in ("a", "b"):
        begun(holdings, worker)
    more = holdings.begin("c", 1)
    more.name(0, None)
    assert more.form(0, INT8, SIZE) == Form(codec=BF16)
    more.keep(0, held(1))
    assert more.held(0) is None
    assert holdings.num_bytes == 2 * BYTES


def test_what_is_held_moves_within_the_bound() -> None:
    """Values that take the place of earlier ones need no more room than those had."""
    holdings = Holdings(2 * BYTES)
    holding = begun(holdings, fragments=2)
    for version in range(10, 20):
        holding.keep(0, held(version))
        assert holding.held(0) is not None
        assert holdings.num_bytes == 2 * BYTES


def test_only_members_are_remembered() -> None:
    """What somebody held who left or was given up is dropped once its stream has ended."""
    holdings = Holdings(4 * BYTES)
    begun(holdings, "stays").end()
    begun(holdings, "leaves").end()
    leaving = begun(holdings, "is leaving")
    holdings.keep_only(lambda worker, incarnation: (worker, incarnation) == ("stays", 1))
    assert holdings.num_bytes == 2 * BYTES
    leaving.end()
    holdings.keep_only(lambda worker, _: worker == "stays")
    assert holdings.num_bytes == BYTES


def test_some_differences_are_checked() -> None:
    """The first after whole values, which shows other arithmetic at once, and then one of so many."""
    checked = [
        number for number in range(200) if Held(values=torch.zeros(1), version=0, num_differences=number).is_checked
    ]
    assert checked == list(range(1, 200, CHECKED_EVERY))


def test_memory_is_used_again_once_nobody_holds_its_values() -> None:
    """Not before, not for another size, and no more of it is kept than is soon used."""
    memory = HeldMemory(7)
    first = memory.held(memory.take(SIZE))
    address = first.values.data_ptr()
    second = memory.held(memory.take(SIZE))
    assert second.values.data_ptr() != address
    assert (first.version, second.version) == (7, 8)
    del first
    assert memory.take(SIZE + 1).data_ptr() != address
    assert memory.take(SIZE).data_ptr() == address
    many = [memory.held(memory.take(SIZE)) for _ in range(2 * MOST_SPARE)]
    addresses = {each.values.data_ptr() for each in many}
    many.clear()
    again = [memory.take(SIZE) for _ in range(MOST_SPARE)]
    assert {each.data_ptr() for each in again} <= addresses


# --- The worker's side.


def update(difference_to: int | None = None, version: int | None = None, values_crc32: int | None = None) -> pb.Update:
    """An announcement."""
    return pb.Update(difference_to=difference_to, version=version, values_crc32=values_crc32)


def test_whole_values_are_held_if_they_have_a_name() -> None:
    """And nothing is if not."""
    values = torch.linspace(-1, 1, 2 * SIZE).bfloat16().float()
    payload = codecs.encode(BF16, values)
    followed = follow(update(version=3), BF16, payload, (SIZE, SIZE), None)
    assert followed.held is not None
    assert followed.held.version == 3
    assert torch.equal(values[:SIZE], followed.values)
    assert torch.equal(values[SIZE:], followed.behind)
    assert follow(update(), BF16, payload, (SIZE, SIZE), followed.held).held is None


def test_a_difference_moves_what_is_held_as_at_the_shard() -> None:
    """The values move, and momentum behind them is taken as it is."""
    before, momentum = WorkersHeld(values=torch.linspace(-1, 1, 256), version=3), torch.full((256,), 127.0)
    payload, moved = codecs.difference(INT8, torch.linspace(2, -2, 256), before.values, momentum)
    followed = follow(update(difference_to=3, version=4), INT8, payload, (256, 256), before)
    assert followed.held is not None
    assert torch.equal(moved, followed.held.values)
    assert torch.equal(moved, followed.values)
    assert torch.equal(momentum, followed.behind)
    assert torch.equal(torch.linspace(-1, 1, 256), before.values)


@pytest.mark.parametrize("sizes", [(256,), (100, 156)])
@pytest.mark.parametrize("num_behind", [0, 256])
def test_values_are_written_to_their_destination_as_well(sizes: tuple[int, ...], num_behind: int) -> None:
    """In one piece or in several, whole or as a difference; what is held then has memory of its own."""
    manifest = Manifest.of(
        [
            TensorSpec(name=str(index), shape=(size,), dtype="float32", role="parameter")
            for index, size in enumerate(sizes)
        ]
    )
    tensors = empty_tensors(manifest)
    into = Destination(fragment=manifest.fragments[0], tensors=tensors)
    behind = torch.full((num_behind,), 127.0)
    payload = codecs.encode(BF16, torch.cat((torch.linspace(-1, 1, 256), behind)))
    first = follow(update(version=3), BF16, payload, (256, num_behind), None, into=into)
    assert first.held is not None
    assert torch.equal(first.values, torch.cat(list(tensors.values())))
    tensors["0"].fill_(5)
    payload, moved = codecs.difference(
        INT8, torch.linspace(2, -2, 256), first.held.values, behind if num_behind else None
    )
    second = follow(update(difference_to=3, version=4), INT8, payload, (256, num_behind), first.held, into=into)
    assert second.held is not None
    assert torch.equal(moved, second.held.values)
    assert torch.equal(moved, torch.cat(list(tensors.values())))
    assert torch.equal(behind, second.behind)
    tensors["0"].fill_(5)
    assert torch.equal(moved, second.held.values)


def test_a_difference_to_something_else_is_not_followed() -> None:
    """Not to another version, not to nothing, not to other bits, and not beyond what float32 holds."""
    before = WorkersHeld(values=torch.zeros(SIZE), version=3)
    payload, moved = codecs.difference(INT8, torch.linspace(1, 2, SIZE), before.values)
    crc32 = zlib.crc32(moved.numpy().data)
    assert follow(update(difference_to=3, values_crc32=crc32), INT8, payload, (SIZE, 0), before).held is None
    for known, announced in (
        (before, update(difference_to=4, version=5)),
        (None, update(difference_to=3, version=5)),
        (before, update(difference_to=3, version=5, values_crc32=crc32 ^ 1)),
    ):
        with pytest.raises(UnavailableError, match="asks for whole ones"):
            follow(announced, INT8, payload, (SIZE, 0), known)
    huge = WorkersHeld(values=torch.full((SIZE,), 3e38), version=3)
    payload = codecs.encode(INT8, huge.values)
    with pytest.raises(CodecError, match="beyond"):
        follow(update(difference_to=3, version=5), INT8, payload, (SIZE, 0), huge)
