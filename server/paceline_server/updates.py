"""Updates on their way out: how they are written, where they go, and what they take of the shard's buffer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from paceline_server.buffers import BufferBudget, Room
from paceline_server.fragment import FragmentValues
from paceline_server.held import Form, Held, HeldMemory
from paceline_server.ledger import Answer
from paceline_wire import codecs
from paceline_wire.checksum import crc32
from paceline_wire.codecs.base import Codec
from paceline_wire.errors import CodecError
from paceline_wire.transfer import Outgoing, outgoing


@dataclass(frozen=True, kw_only=True)
class Written:
    """A fragment's values at one moment, written in one form.

    Attributes:
        form: The form.
        values: The encoding.
        held: What the worker holds once it has it; None if that is not kept.
        values_crc32: CRC-32 of what it holds then; None if it is not told.
    """

    form: Form
    values: Outgoing
    held: Held | None = None
    values_crc32: int | None = None


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A fragment's values at one moment, ready to be sent.

    Attributes:
        written: The values in the form that is due.
        room: What they take of the shard's buffer; whoever sends them gives it back.
    """

    written: Written
    room: Room


class Recipient(Protocol):
    """Where a worker's answers go: its open stream."""

    def form(self, fragment: int) -> Form:
        """How its next update of a fragment is to be written."""

    @property
    def has_values_waiting(self) -> bool:
        """Whether an update waits here with its values, or is being sent."""

    def deliver(self, fragment: int, answer: Answer, update: Encoded | None) -> None:
        """Queue an answer with the fragment's values; does nothing once the stream has ended.

        Without values, because the shard's buffer had no room for them, the recipient asks for the newest when it can
        send them (`Engine.newest`).
        """


def write(values: FragmentValues, form: Form, memory: HeldMemory, *, with_momentum: bool) -> Written:
    """Write what a fragment's workers are sent, in a form; what they hold then is in memory.

    Values that are not finite are written whole, whatever the form: the worker refuses them and says so.
    """
    if form.since is None:
        return _write_whole(values, form, memory, with_momentum=with_momentum)
    momentum = values.momentum if with_momentum else None
    try:
        payload, moved = codecs.difference(
            form.codec, values.published(), form.since.values, momentum, memory.take(values.num_elements)
        )
    except CodecError:
        whole = Form(codec=codecs.whole_codec(form.codec))
        return _write_whole(values, whole, memory, with_momentum=with_momentum)
    held = memory.held(moved, form.since.num_differences + 1)
    checksum = crc32(moved.numpy().data) if held.is_checked else None
    return Written(form=form, values=outgoing(form.codec, payload), held=held, values_crc32=checksum)


def _write_whole(values: FragmentValues, form: Form, memory: HeldMemory, *, with_momentum: bool) -> Written:
    payload = values.encoded(form.codec, with_momentum=with_momentum)
    ready = outgoing(form.codec, payload)
    num_elements = values.num_elements * (2 if with_momentum else 1)
    if not form.kept or not _is_finite(form.codec, payload, num_elements):
        return Written(form=form, values=ready)
    held = memory.take(values.num_elements)
    form.codec.decode_range(payload, num_elements, 0, held)
    return Written(form=form, values=ready, held=memory.held(held))


def _is_finite(codec: Codec, payload: torch.Tensor, num_elements: int) -> bool:
    try:
        codec.check(payload, num_elements)
    except CodecError:
        return False
    return True


def rooms_for(
    budget: BufferBudget, recipients: Sequence[tuple[Recipient, Form]], num_elements: int
) -> dict[Form, Room]:
    """Room for an update of num_elements in each form that its recipients are due, as far as there is any now.

    One encoding serves all who are due its form. For those who all have values waiting already only half of the buffer
    is taken: a few slow workers must not fill it with updates, while others could take theirs at once.
    """
    rooms: dict[Form, Room] = {}
    for form in {due for _, due in recipients}:
        ahead = all(recipient.has_values_waiting for recipient, due in recipients if due == form)
        room = budget.try_reserve(
            form.codec.encoded_bytes(num_elements), leave_free_bytes=budget.capacity_bytes // 2 if ahead else 0
        )
        if room is not None:
            rooms[form] = room
    return rooms


def share_of(written: Mapping[Form, Written], rooms: Mapping[Form, Room], form: Form) -> Encoded | None:
    """One recipient's share of an encoding; None if there was no room for it."""
    return Encoded(written=written[form], room=rooms[form].share()) if form in rooms else None
