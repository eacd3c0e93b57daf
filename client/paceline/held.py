"""What a worker holds of each fragment, where its updates are differences to it: the shard has the same bits. Pure.

Update after update is followed in the order in which they come; see docs/protocol.md, "Differences".
"""

from dataclasses import dataclass

import torch

from paceline.fragments import Destination
from paceline.place import HOST, Place
from paceline_wire import codecs
from paceline_wire.checksum import crc32
from paceline_wire.codecs.base import Codec
from paceline_wire.codecs.moves import write_copies
from paceline_wire.errors import UnavailableError
from paceline_wire.v1 import parameter_server_pb2 as pb


@dataclass(frozen=True, kw_only=True, eq=False)
class Held:
    """What is held of a fragment.

    Attributes:
        values: float32 [n] at the fragment's place; never changed, but where updates have a destination: then nobody
            else has them.
        version: How the shard calls them.
    """

    values: torch.Tensor
    version: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Followed:
    """Where an update leads.

    Attributes:
        values: The fragment's newest values, float32 [n] at the place.
        behind: What the payload has behind them, float32 [m] there.
        held: What is held from now on; None: nothing.
    """

    values: torch.Tensor
    behind: torch.Tensor
    held: Held | None


def follow(
    announced: pb.Update,
    codec: Codec,
    payload: torch.Tensor,
    sizes: tuple[int, int],
    held: Held | None,
    place: Place = HOST,
    into: Destination | None = None,
) -> Followed:
    """Decode an update, and add what is held if it is a difference.

    Args:
        announced: The update's announcement.
        codec: How its payload is written.
        payload: Its bytes, uint8 [k] on the host.
        sizes: Elements of values, and elements behind them.
        held: What is held of the fragment; None: nothing.
        place: Where to decode it, and where what is held is.
        into: Where the values are written as well, in the same pass where it can be. What is held is then changed in
            place, and so are the values that were returned before. None: nowhere, and nothing that is held changes.

    Raises:
        CodecError: The payload is no valid encoding, or leads to infinity. This and the next leave behind nothing of
            use, neither in what was held nor at the destination.
        UnavailableError: It is a difference to something that is not held, or leads elsewhere than at the shard. The
            stream must end, and the next one must name nothing.
    """
    with place.stream():
        followed = _follow(announced, codec, place.from_host(payload), sizes, held, into)
        if announced.HasField("values_crc32"):
            _require_same(announced, place.to_host(followed.values))
    return followed


def _follow(
    announced: pb.Update,
    codec: Codec,
    payload: torch.Tensor,
    sizes: tuple[int, int],
    held: Held | None,
    into: Destination | None,
) -> Followed:
    num_values, num_behind = sizes
    copies = [] if into is None else into.parts
    if not announced.HasField("difference_to"):
        numbers = codecs.decode(codec, payload, num_values + num_behind)
        values, behind = numbers[:num_values], numbers[num_values:]
        write_copies(values, copies)
    elif held is None or held.version != announced.difference_to:
        raise UnavailableError(
            f"the update of fragment {announced.fragment} is a difference to values that this worker does not hold; "
            "it asks for whole ones"
        )
    else:
        values, behind = codecs.followed(
            codec, payload, num_values + num_behind, held.values, in_place=into is not None, copies=copies
        )
    named = Held(values=values, version=announced.version) if announced.HasField("version") else None
    return Followed(values=values, behind=behind, held=named)


def _require_same(announced: pb.Update, values: torch.Tensor) -> None:
    if crc32(values.numpy().data) != announced.values_crc32:
        raise UnavailableError(
            f"the differences of fragment {announced.fragment} have led to other values here than at the shard; "
            "this worker asks for whole ones"
        )
