"""Newest values for many who wait: encoded once, never older than the question, and their room given back."""

import asyncio
from collections.abc import Callable

import pytest
import torch

from paceline_server.buffers import BufferBudget
from paceline_server.held import Form
from paceline_server.ledger import Ledger
from paceline_server.newest import NewestValues, Wanted
from paceline_server.updates import Written
from paceline_wire import codecs
from paceline_wire.transfer import outgoing

FP32 = codecs.codec("fp32")
WANTED = Wanted(fragment=0, form=Form(codec=FP32), num_elements=4, with_momentum=False)


class Fragment:
    """A fragment whose bin is the moment at which it is encoded; encoding waits for its lock."""

    def __init__(self, capacity_bytes: int = 16) -> None:
        self.bin = 0
        self.encodings = 0
        self.lock = asyncio.Lock()
        self.may_finish = asyncio.Event()
        self.may_finish.set()
        self.budget = BufferBudget(capacity_bytes)
        self.newest = NewestValues(self.budget, self.encode)

    async def encode(self, wanted: Wanted, begun: Callable[[], None]) -> tuple[Ledger, Written]:
        """Encode at this moment."""
        async with self.lock:
            begun()
            self.encodings += 1
            ledger = Ledger(issuing_bin=self.bin)
            await self.may_finish.wait()
            values = outgoing(FP32, codecs.encode(FP32, torch.zeros(wanted.num_elements)))
            return ledger, Written(form=wanted.form, values=values)


async def settled() -> None:
    """Let every task that can go on do so."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_all_who_wait_share_one_encoding() -> None:
    """Three wait for room and get the same bytes, which count once and are free when the last has sent them."""
    fragment = Fragment()
    held = await fragment.budget.reserve(16)
    asking = [asyncio.create_task(fragment.newest.get(WANTED)) for _ in range(3)]
    await settled()
    assert fragment.budget.num_waiting == 1
    fragment.bin = 7
    held.release()
    answers = await asyncio.gather(*asking)
    assert [ledger.issuing_bin for ledger, _ in answers] == [7, 7, 7]
    assert (fragment.encodings, fragment.budget.held_bytes) == (1, 16)
    for _, encoded in answers:
        assert fragment.budget.held_bytes == 16
        encoded.room.release()
    assert fragment.budget.held_bytes == 0


async def test_whoever_asks_after_an_encoding_has_begun_gets_a_later_one() -> None:
    """Values are never older than the question: a push that was applied in between must be in them."""
    fragment = Fragment(capacity_bytes=32)
    fragment.may_finish.clear()
    first = asyncio.create_task(fragment.newest.get(WANTED))
    await settled()
    assert fragment.encodings == 1
    fragment.bin = 1
    second = asyncio.create_task(fragment.newest.get(WANTED))
    await settled()
    fragment.may_finish.set()
    assert [(await asking)[0].issuing_bin for asking in (first, second)] == [0, 1]


async def test_who_gives_up_leaves_it_to_the_others() -> None:
    """One of two is cancelled, and the other has its values; when both are, nothing is held or waited for."""
    fragment = Fragment()
    held = await fragment.budget.reserve(16)
    asking = [asyncio.create_task(fragment.newest.get(WANTED)) for _ in range(2)]
    await settled()
    asking[0].cancel()
    held.release()
    (await asking[1])[1].room.release()
    held = await fragment.budget.reserve(16)
    given_up = asyncio.create_task(fragment.newest.get(WANTED))
    await settled()
    given_up.cancel()
    await settled()
    held.release()
    assert (fragment.budget.held_bytes, fragment.budget.num_waiting) == (0, 0)
    (await fragment.newest.get(WANTED))[1].room.release()


async def test_an_encoding_that_fails_holds_nothing() -> None:
    """All who wait get the error, and the room is free."""

    async def fail(wanted: Wanted, begun: Callable[[], None]) -> tuple[Ledger, Written]:
        begun()
        raise RuntimeError("no values")

    budget = BufferBudget(16)
    newest = NewestValues(budget, fail)
    results = await asyncio.gather(*(newest.get(WANTED) for _ in range(2)), return_exceptions=True)
    assert [str(result) for result in results] == ["no values"] * 2
    assert budget.held_bytes == 0
    with pytest.raises(RuntimeError, match="no values"):
        await newest.get(WANTED)
