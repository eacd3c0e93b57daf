"""Room for payloads: bounded, first come first served, given back exactly once, and taken from peers that stall."""

import asyncio
from contextlib import ExitStack

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline_server.buffers import (
    MIB,
    STREAM_BYTES,
    WORK_BYTES,
    BufferBudget,
    Buffers,
    Room,
    largest_payload_bytes,
    shortage,
)
from paceline_server.config import ServerConfig


async def settled() -> None:
    """Let every task that can go on do so."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_requests_are_granted_in_order() -> None:
    """A small request does not overtake a large one that came before it, or the large one might wait for ever."""
    budget, granted = BufferBudget(10), []

    async def ask(num_bytes: int) -> None:
        room = await budget.reserve(num_bytes)
        granted.append(num_bytes)
        room.release()

    first = await budget.reserve(6)
    tasks = [asyncio.create_task(ask(num_bytes)) for num_bytes in (8, 1, 2)]
    await settled()
    assert (granted, budget.num_waiting, budget.held_bytes) == ([], 3, 6)
    assert budget.try_reserve(1) is None
    first.release()
    await asyncio.gather(*tasks)
    assert (granted, budget.held_bytes) == ([8, 1, 2], 0)


async def test_never_more_is_held_than_fits() -> None:
    """Room is granted up to the last byte and not beyond."""
    budget = BufferBudget(10)
    rooms = [budget.try_reserve(5), budget.try_reserve(5)]
    assert None not in rooms
    assert budget.try_reserve(1) is None
    assert budget.held_bytes == 10


async def test_a_request_beyond_the_budget_is_granted_alone() -> None:
    """It waits until nothing else is held, and nothing is granted beside it."""
    budget = BufferBudget(10)
    small = await budget.reserve(1)
    asking = asyncio.create_task(budget.reserve(50))
    await settled()
    assert not asking.done()
    small.release()
    large = await asking
    assert budget.held_bytes == 50
    assert budget.try_reserve(1) is None
    large.release()
    assert budget.held_bytes == 0


async def test_releasing_twice_gives_back_once() -> None:
    """A claim counts once, however often it is released."""
    budget = BufferBudget(10)
    room, other = await budget.reserve(4), await budget.reserve(4)
    room.release()
    room.release()
    assert budget.held_bytes == 4
    other.release()
    with pytest.raises(ValueError, match="given back"):
        other.share()


async def test_shared_bytes_count_once_until_the_last_claim_is_released() -> None:
    """An encoding that goes to many is in memory once."""
    budget = BufferBudget(10)
    room = await budget.reserve(8)
    shares = [room.share() for _ in range(5)]
    room.release()
    assert budget.held_bytes == 8
    for share in shares[1:]:
        share.release()
    assert budget.held_bytes == 8
    shares[0].release()
    assert budget.held_bytes == 0


async def test_whoever_gives_up_waiting_takes_nothing_and_holds_nobody_up() -> None:
    """A cancelled request at the head of the queue lets the next one in."""
    budget = BufferBudget(10)
    held = await budget.reserve(5)
    large = asyncio.create_task(budget.reserve(9))
    small = asyncio.create_task(budget.reserve(3))
    await settled()
    assert not small.done()
    large.cancel()
    (await small).release()
    held.release()
    assert (budget.held_bytes, budget.num_waiting) == (0, 0)


async def test_room_granted_to_a_task_that_is_cancelled_meanwhile_is_free() -> None:
    """Cancellation between the grant and the task's next step loses no bytes."""
    budget = BufferBudget(10)
    held = await budget.reserve(10)
    asking = asyncio.create_task(budget.reserve(10))
    await settled()
    held.release()
    assert budget.held_bytes == 10
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert budget.held_bytes == 0


async def test_a_part_can_be_left_free() -> None:
    """A request that leaves something free is refused while another one of its size is granted."""
    budget = BufferBudget(10)
    await budget.reserve(4)
    assert budget.try_reserve(2, leave_free_bytes=5) is None
    assert budget.try_reserve(2, leave_free_bytes=4) is not None


async def test_a_stalled_transfer_is_ended_for_those_who_wait() -> None:
    """Its `end` is called once somebody has waited long enough, and not that of a claim whose transfer is over."""
    budget, ended = BufferBudget(10, stalled_s=0.0), []
    stalled, arrived = await budget.reserve(5), await budget.reserve(5)

    def end_stalled() -> None:
        ended.append("stalled")
        stalled.release()

    stalled.begin_transfer(end_stalled)
    arrived.begin_transfer(lambda: ended.append("arrived"))
    arrived.end_transfer()
    await asyncio.wait_for(budget.reserve(5), timeout=10)
    assert ended == ["stalled"]


async def test_a_transfer_that_moves_keeps_its_room() -> None:
    """Only what has not moved since the time in question ends."""
    budget, ended = BufferBudget(10), []
    room = await budget.reserve(5)
    now_s = asyncio.get_running_loop().time()
    room.begin_transfer(lambda: ended.append("ended"))
    room.moved()
    room.end_if_stalled(now_s - 1)
    assert not ended
    room.end_if_stalled(asyncio.get_running_loop().time())
    assert ended == ["ended"]


steps = st.lists(st.tuples(st.sampled_from(["ask", "ask", "drop"]), st.integers(0, 12)), max_size=40)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(steps)
def test_whatever_happens_the_budget_holds_and_nothing_is_lost(steps: list[tuple[str, int]]) -> None:
    """Held are the bytes of the claims that are out, within the capacity but for one large claim alone."""

    async def play() -> None:
        budget = BufferBudget(10)
        requests: list[tuple[int, asyncio.Task[Room]]] = []
        for step, number in [*steps, *[("drop", 0)] * len(steps)]:
            if step == "ask":
                requests.append((number, asyncio.create_task(budget.reserve(number))))
            elif requests:
                _, task = requests.pop(number % len(requests))
                if task.done():
                    task.result().release()
                else:
                    task.cancel()
            await settled()
            held = [num_bytes for num_bytes, task in requests if task.done()]
            assert budget.held_bytes == sum(held)
            assert sum(held) <= 10 or sorted(held)[:-1] == [0] * (len(held) - 1)
            assert budget.num_waiting == len(requests) - len(held)
        assert (budget.held_bytes, budget.num_waiting) == (0, 0)

    asyncio.run(play())


def test_open_streams_take_their_part_and_leave_some() -> None:
    """Each direction has half of what gRPC leaves; a quarter of the buffer remains however many streams are open."""
    buffers = Buffers(100 * MIB + WORK_BYTES)

    def capacities() -> tuple[int, int]:
        return buffers.incoming.capacity_bytes, buffers.outgoing.capacity_bytes

    assert capacities() == (50 * MIB, 50 * MIB)
    with ExitStack() as streams:
        streams.enter_context(buffers.stream())
        assert capacities() == (50 * MIB - STREAM_BYTES // 2,) * 2
        for _ in range(100):
            streams.enter_context(buffers.stream())
        assert capacities() == ((100 * MIB + WORK_BYTES) // 8,) * 2
    assert capacities() == (50 * MIB, 50 * MIB)


def test_more_streams_than_the_buffer_is_good_for_are_told(caplog: pytest.LogCaptureFixture) -> None:
    """The sentence names the size that would do, once; with that size there is nothing to tell."""
    with ExitStack() as streams:
        buffers = Buffers(100 * MIB)
        for _ in range(11):
            streams.enter_context(buffers.stream())
        assert [record.getMessage() for record in caplog.records] == [
            "8 open streams may take more than exchange.buffer_mib = 100 in all; set it to at least 107"
        ]
        buffers = Buffers(107 * MIB)
        for _ in range(8):
            streams.enter_context(buffers.stream())
        assert len(caplog.records) == 1


async def test_room_that_becomes_free_by_resizing_is_granted() -> None:
    """A budget that shrinks grants nothing until it is below its capacity again; one that grows grants at once."""
    budget = BufferBudget(10)
    first = await budget.reserve(8)
    budget.resize(5)
    asking = asyncio.create_task(budget.reserve(4))
    await settled()
    assert not asking.done()
    budget.resize(12)
    assert (await asking) is not None
    first.release()


@pytest.mark.parametrize(
    ("changes", "elements"),
    [
        ({}, 4),
        ({"exchange": {"uplink": "fp32", "dynamic_inner_steps": False}, "outer": {"rule": "orlomo"}}, 8),
        ({"exchange": {"downlink": "fp32", "own_weight": "predicted"}}, 8),
        ({"exchange": {"own_weight": "predicted"}}, 4),
    ],
)
def test_the_largest_payload_is_that_of_any_codec_in_use(changes: dict[str, dict[str, object]], elements: int) -> None:
    """First parameters are fp32; local momentum doubles pushes, and predictions double updates."""
    config = ServerConfig.model_validate(changes)
    assert largest_payload_bytes(config) == elements * config.exchange.fragment_elements


def test_a_buffer_too_small_for_two_payloads_is_told_with_what_would_do() -> None:
    """The sentence names both fields and the least size; with that size there is nothing to tell."""
    small = ServerConfig.model_validate({"exchange": {"buffer_mib": 31}})
    sentence = shortage(small)
    assert sentence is not None
    assert "buffer_mib = 31" in sentence
    assert "at least 32" in sentence
    assert shortage(ServerConfig.model_validate({"exchange": {"buffer_mib": 32}})) is None
    assert shortage(ServerConfig()) is None
