"""The codecs by name, as configurations write them, and by number, as the protocol does."""

import difflib
import sys
from typing import Final

from paceline_wire.codecs.base import Codec
from paceline_wire.codecs.blockwise import Fp4Codec, Int4Codec, Int8Codec
from paceline_wire.codecs.compiled import CompiledCodec
from paceline_wire.codecs.floats import Bf16Codec, Fp32Codec
from paceline_wire.codecs.topk import TopkCodec
from paceline_wire.errors import CodecError, InvalidInputError
from paceline_wire.v1 import parameter_server_pb2 as pb

if sys.byteorder != "little":
    raise ImportError("payloads are little-endian and are read in place: this machine is big-endian")

_DENSE: Final[tuple[Codec, ...]] = (Fp32Codec(), Bf16Codec(), Int8Codec(), Int4Codec(), Fp4Codec())
_CODECS: Final[tuple[Codec, ...]] = (*(CompiledCodec(plain) for plain in _DENSE), TopkCodec())
_BY_NAME: Final[dict[str, Codec]] = {codec.name: codec for codec in _CODECS}
# Fails at import if the protocol names a codec that is not here; the other way round, wire_value does.
_BY_WIRE_VALUE: Final[dict[int, Codec]] = {
    value: _BY_NAME[name.removeprefix("CODEC_").lower()]
    for name, value in pb.Codec.items()
    if value != pb.CODEC_UNSPECIFIED
}

CODEC_NAMES: Final[tuple[str, ...]] = tuple(_BY_NAME)
"""The names of all codecs, from the most bytes to the fewest."""


def codec(name: str) -> Codec:
    """Return the codec of that name.

    Example:
        >>> codec("int8").encoded_bytes(256)
        260

    Raises:
        InvalidInputError: There is none; the message names the nearest ones.
    """
    found = _BY_NAME.get(name)
    if found is None:
        near = difflib.get_close_matches(name, CODEC_NAMES)
        hint = f"did you mean {' or '.join(near)}? The codecs" if near else "the codecs"
        raise InvalidInputError(f"there is no codec {name!r}: {hint} are {', '.join(CODEC_NAMES)}")
    return found


def codec_of_wire(value: int) -> Codec:
    """Return the codec that the protocol's enum `Codec` gives this number.

    Raises:
        CodecError: The number is CODEC_UNSPECIFIED or stands for no codec of this version.
    """
    found = _BY_WIRE_VALUE.get(value)
    if found is None:
        what = "does not say its codec" if value == pb.CODEC_UNSPECIFIED else f"has the unknown codec number {value}"
        raise CodecError(f"the payload {what}; the codecs are {', '.join(CODEC_NAMES)}")
    return found


def wire_value(codec: Codec) -> pb.Codec.ValueType:
    """Return the number of a codec in the protocol's enum `Codec`.

    Raises:
        InvalidInputError: The protocol has no codec of this name.
    """
    try:
        return pb.Codec.Value(f"CODEC_{codec.name.upper()}")
    except ValueError:
        raise InvalidInputError(f"the protocol has no codec {codec.name!r}") from None
