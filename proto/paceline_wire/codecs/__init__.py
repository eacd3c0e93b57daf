"""How numbers become bytes: fp32, bf16, int8, int4, fp4 (E3M0) and sparse topk, and error feedback for what they lose.

`base` has the interface, `floats`, `blockwise` and `topk` the formats, `registry` their names, `whole` the calls for a
whole fragment, `feedback` what carries a codec's loss over to the next message, `delta` values sent as differences.
"""

from paceline_wire.codecs.base import BLOCK_ELEMENTS, Codec
from paceline_wire.codecs.blockwise import Fp4Codec, Int4Codec, Int8Codec
from paceline_wire.codecs.delta import DIFFERENCE_CODECS, Reference, difference, followed, whole_codec
from paceline_wire.codecs.feedback import Encoded, compensate
from paceline_wire.codecs.floats import Bf16Codec, Fp32Codec
from paceline_wire.codecs.registry import CODEC_NAMES, codec, codec_of_wire, wire_value
from paceline_wire.codecs.topk import TopkCodec
from paceline_wire.codecs.whole import decode, encode, payload_tensor

__all__ = [
    "BLOCK_ELEMENTS",
    "CODEC_NAMES",
    "DIFFERENCE_CODECS",
    "Bf16Codec",
    "Codec",
    "Encoded",
    "Fp4Codec",
    "Fp32Codec",
    "Int4Codec",
    "Int8Codec",
    "Reference",
    "TopkCodec",
    "codec",
    "codec_of_wire",
    "compensate",
    "decode",
    "difference",
    "encode",
    "followed",
    "payload_tensor",
    "whole_codec",
    "wire_value",
]
