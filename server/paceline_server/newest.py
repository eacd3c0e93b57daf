"""A fragment's newest values for those who wait for room: all who wait for the same share one encoding."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from paceline_server.buffers import BufferBudget, Room
from paceline_server.held import Form
from paceline_server.ledger import Ledger
from paceline_server.updates import Encoded, Written


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is to be encoded.

    Attributes:
        fragment: The fragment's index.
        form: How.
        num_elements: Elements that the encoding has.
        with_momentum: Whether the momentum follows the values.
    """

    fragment: int
    form: Form
    num_elements: int
    with_momentum: bool


Encode = Callable[[Wanted, Callable[[], None]], Awaitable[tuple[Ledger, Written]]]
"""Encodes the values of this moment, with the ledger that belongs to them; calls back when the moment has come."""


@dataclass(eq=False)
class _Encoding:
    """One encoding that is waited for, and by how many."""

    work: "asyncio.Task[tuple[Ledger, Written, Room]]"
    num_waiting: int = 0


class NewestValues:
    """Encodes when there is room. Belongs to one event loop.

    Whoever asks before the encoding has begun gets values of a later moment than the question, so all of them can have
    the same. Slow workers then need room once for each fragment, and not once for each worker.

    Args:
        budget: Where the encodings take their room.
        encode: Does the work.
    """

    def __init__(self, budget: BufferBudget, encode: Encode) -> None:
        self._budget = budget
        self._encode = encode
        self._not_begun: dict[Wanted, _Encoding] = {}

    async def get(self, wanted: Wanted) -> tuple[Ledger, Encoded]:
        """Newest values and the ledger that belongs to them, once there is room. Cancelled, it takes none."""
        encoding = self._not_begun.get(wanted)
        if encoding is None:
            encoding = self._not_begun[wanted] = _Encoding(asyncio.create_task(self._work(wanted)))
        encoding.num_waiting += 1
        try:
            ledger, written, room = await asyncio.shield(encoding.work)
            return ledger, Encoded(written=written, room=room.share())
        finally:
            encoding.num_waiting -= 1
            if encoding.num_waiting == 0:
                self._end(wanted, encoding)

    async def _work(self, wanted: Wanted) -> tuple[Ledger, Written, Room]:
        room = await self._budget.reserve(wanted.form.codec.encoded_bytes(wanted.num_elements))
        try:
            ledger, written = await self._encode(wanted, lambda: self._begun(wanted))
        except BaseException:
            room.release()
            raise
        return ledger, written, room

    def _begun(self, wanted: Wanted) -> None:
        self._not_begun.pop(wanted, None)

    def _end(self, wanted: Wanted, encoding: _Encoding) -> None:
        """Give up what nobody waits for, or the share of the encoding itself once all have theirs."""
        if self._not_begun.get(wanted) is encoding:
            del self._not_begun[wanted]
        if not encoding.work.done():
            encoding.work.cancel()
        elif not encoding.work.cancelled() and encoding.work.exception() is None:
            encoding.work.result()[2].release()
