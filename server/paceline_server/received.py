"""A push that has arrived whole: what becomes of its numbers, and what is kept of it if it is refused."""

import time
from dataclasses import dataclass

import torch

from paceline_server.buffers import Room
from paceline_server.evidence import Evidence
from paceline_server.fragment import FragmentValues
from paceline_server.held import Form, HeldMemory
from paceline_server.ledger import Decision, PushRequest
from paceline_server.updates import Written, write
from paceline_wire.codecs.base import Codec


@dataclass(frozen=True, kw_only=True)
class ReceivedPush:
    """A push that has arrived whole.

    Attributes:
        fragment: The fragment's index.
        request: Who pushes what.
        codec: How it is written.
        payload: Its bytes (uint8 [m]); m is the codec's size for the fragment.
        room: What they take of the shard's buffer; the engine gives it back.
        norm: Its L2 norm, once it was looked at; None before, and if it is not finite.
    """

    fragment: int
    request: PushRequest
    codec: Codec
    payload: torch.Tensor
    room: Room
    norm: float | None = None


def evidence_of(push: ReceivedPush, problem: str, median: float | None) -> Evidence:
    """What is kept aside of a refused push; median is that of the fragment's recent norms."""
    return Evidence(
        worker=push.request.worker,
        incarnation=push.request.incarnation,
        fragment=push.fragment,
        seq=push.request.seq,
        problem=problem,
        codec=push.codec.name,
        payload=push.payload,
        norm=push.norm,
        median=median,
    )


def follow_and_encode(
    values: FragmentValues,
    decision: Decision,
    push: ReceivedPush | None,
    forms: set[Form],
    memory: HeldMemory,
    *,
    with_momentum: bool,
) -> tuple[float, dict[Form, Written]]:
    """Change the numbers as decided, then write them in every form that is due; what is held then is in memory.

    Returns:
        The processor seconds that the change took, and the values by form.
    """
    began_s = time.thread_time()
    if push is None:
        values.follow(decision)
    else:
        values.follow(decision, push.codec, push.payload)
    followed_s = time.thread_time() - began_s
    return followed_s, {form: write(values, form, memory, with_momentum=with_momentum) for form in forms}
