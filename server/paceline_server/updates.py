"""Updates on their way out: where they go, what they take of the shard's buffer, and who shares an encoding."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from paceline_server.buffers import BufferBudget, Room
from paceline_server.ledger import Answer
from paceline_wire.codecs.base import Codec
from paceline_wire.transfer import Outgoing


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A fragment's values at one moment, ready to be sent.

    Attributes:
        values: The values in the codec asked for.
        room: What they take of the shard's buffer; whoever sends them gives it back.
    """

    values: Outgoing
    room: Room


class Recipient(Protocol):
    """Where a worker's answers go: its open stream."""

    @property
    def downlink(self) -> Codec:
        """How its updates are to be written."""

    @property
    def has_values_waiting(self) -> bool:
        """Whether an update waits here with its values, or is being sent."""

    def deliver(self, fragment: int, answer: Answer, update: Encoded | None) -> None:
        """Queue an answer with the fragment's values; does nothing once the stream has ended.

        Without values, because the shard's buffer had no room for them, the recipient asks for the newest when it can
        send them (`Engine.newest`).
        """


def rooms_for(budget: BufferBudget, recipients: Sequence[Recipient], num_elements: int) -> dict[Codec, Room]:
    """Room for an update of num_elements in each codec that its recipients want, as far as there is any now.

    One encoding serves all who want its codec. For those who all have values waiting already only half of the buffer is
    taken: a few slow workers must not fill it with updates, while others could take theirs at once.
    """
    rooms: dict[Codec, Room] = {}
    for codec in {recipient.downlink for recipient in recipients}:
        ahead = all(recipient.has_values_waiting for recipient in recipients if recipient.downlink is codec)
        room = budget.try_reserve(
            codec.encoded_bytes(num_elements), leave_free_bytes=budget.capacity_bytes // 2 if ahead else 0
        )
        if room is not None:
            rooms[codec] = room
    return rooms


def share_of(encoded: Mapping[Codec, Outgoing], rooms: Mapping[Codec, Room], codec: Codec) -> Encoded | None:
    """One recipient's share of an encoding; None if there was no room for it."""
    return Encoded(values=encoded[codec], room=rooms[codec].share()) if codec in rooms else None
