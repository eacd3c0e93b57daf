"""Uploads of first parameters that no honest client sends: refused with a sentence, and they leave no trace."""

from collections.abc import Iterator

import grpc
import pytest
import torch

import paceline_server
from integration.patience import PATIENCE_S
from integration.raw import Ended, RawWorker, ended, fp32_bytes, initialize_fragment, payload_of
from paceline_wire.v1 import parameter_server_pb2 as pb

FRAGMENT = 256
VALUES = {0: torch.linspace(-1, 1, FRAGMENT), 1: torch.linspace(2, 3, FRAGMENT)}


def tensor(name: str = "x", *shape: int, dtype: int = pb.DTYPE_FLOAT32, role: int = pb.ROLE_PARAMETER) -> pb.Tensor:
    """A tensor of a manifest; any numbers for dtype and role."""
    made = pb.Tensor(name=name, shape=shape or (2, FRAGMENT))
    made.dtype = dtype  # type: ignore[assignment]  # numbers outside the enum, too
    made.role = role  # type: ignore[assignment]  # likewise
    return made


def manifest(*tensors: pb.Tensor, fragment_elements: int = FRAGMENT) -> pb.Manifest:
    """A manifest of any tensors."""
    return pb.Manifest(tensors=tensors or (tensor(),), fragment_elements=fragment_elements)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A server without parameters; the last test gives it some."""
    config = {"exchange": {"uplink": "fp32", "downlink": "fp32", "fragment_elements": FRAGMENT}}
    with paceline_server.local(config) as found:
        yield found


def refusal(raw: RawWorker, *messages: pb.InitializeRequest) -> Ended:
    """How an upload of any messages is refused."""
    with pytest.raises(grpc.RpcError) as refused:
        raw.stub.Initialize(iter(messages), timeout=PATIENCE_S)
    return ended(refused.value)


MANIFESTS = {
    "another fragment size": (manifest(fragment_elements=512), "take them from Describe"),
    "no fragment size": (manifest(fragment_elements=0), "must be a multiple of 256"),
    "an odd fragment size": (manifest(fragment_elements=300), "must be a multiple of 256"),
    "an enormous fragment size": (manifest(fragment_elements=1 << 63), "must be a multiple of 256"),
    "names out of order": (manifest(tensor("b"), tensor("a")), "ascending order"),
    "a name twice": (manifest(tensor("a"), tensor("a")), "unique"),
    "no name": (manifest(tensor("")), "allowed are 1 to"),
    "a long name": (manifest(tensor("n" * 1025)), "allowed are 1 to"),
    "no dtype": (manifest(tensor(dtype=0)), "can be exchanged"),
    "an unknown dtype": (manifest(tensor(dtype=44)), "can be exchanged"),
    "an unknown role": (manifest(tensor(role=44)), "role"),
    "more elements than there are": (manifest(tensor("x", 1 << 40, 1 << 40)), "elements"),
}


@pytest.mark.parametrize("kind", MANIFESTS)
def test_a_manifest_that_breaks_the_rules_is_refused(address: str, kind: str) -> None:
    """The refusal says which rule; the run stays without parameters."""
    broken, sentence = MANIFESTS[kind]
    with RawWorker(address) as raw:
        end = refusal(raw, pb.InitializeRequest(start=raw.initialize_start(broken)))
        assert (end.error, end.code) == ("InvalidInputError", grpc.StatusCode.INVALID_ARGUMENT)
        assert sentence in end.details
        assert not raw.describe().HasField("manifest")


def test_an_upload_that_breaks_the_rules_is_refused_and_may_be_begun_again(address: str) -> None:
    """Broken uploads are refused one after the other, whatever had come of them; the next whole one counts.

    A fragment that comes twice is refused even after the run has begun: it would undo what was trained.
    """
    with RawWorker(address, "uploader") as raw:
        start = pb.InitializeRequest(start=raw.initialize_start(manifest()))
        first, second = (initialize_fragment(index, values) for index, values in VALUES.items())
        broken: list[tuple[list[pb.InitializeRequest], str]] = [
            ([], "begins with `start`"),
            ([first], "begins with `start`"),
            ([start, start], "`start` came again"),
            ([start], "before every fragment"),
            ([start, first], "before every fragment"),
            ([start, first, pb.InitializeRequest(data=b"data")], "before any payload"),
            ([start, initialize_fragment(2, VALUES[0])], "fragment 2 does not live"),
            ([start, initialize_fragment(0, torch.full((FRAGMENT,), torch.nan))], "infinite or NaN"),
            ([start, initialize_fragment(0, torch.ones(FRAGMENT + 1))], "was announced"),
            ([start, in_bf16(0)], "first parameters are sent in fp32"),
            ([start, first, damaged(second)], "damaged on the way"),
            ([start, first, cut_off(second)], "before every fragment"),
            ([start, first, cut_off(second), second], "before the one before it was complete"),
            ([start, first, first], "came twice"),
        ]
        for messages, sentence in broken:
            end = refusal(raw, *messages)
            assert end.error, end
            assert sentence in end.details
            assert not raw.describe().HasField("manifest")
            assert not raw.status().initialized
        raw.join()
        with raw.exchange() as stream:
            assert stream.end().error == "NotInitializedError"
        # All fragments, and then the first once more with other values.
        end = refusal(raw, start, first, second, initialize_fragment(0, torch.zeros(FRAGMENT)))
        assert "came twice" in end.details
        assert raw.status().initialized
        for index, values in VALUES.items():
            assert torch.equal(raw.fetch(index)[1], values)
        answer = raw.initialize(manifest(), {0: torch.zeros(FRAGMENT), 1: torch.zeros(FRAGMENT)})
        assert answer.already_initialized
        assert torch.equal(raw.fetch(0)[1], VALUES[0])


def damaged(fragment: pb.InitializeRequest) -> pb.InitializeRequest:
    """A fragment one of whose bytes changed on the way."""
    return pb.InitializeRequest(fragment=fragment.fragment, data=fragment.data[:-1] + b"!")


def cut_off(fragment: pb.InitializeRequest) -> pb.InitializeRequest:
    """A fragment whose last byte is missing."""
    return pb.InitializeRequest(fragment=fragment.fragment, data=fragment.data[:-1])


def in_bf16(fragment: int) -> pb.InitializeRequest:
    """A fragment's first values in a codec that loses."""
    data = fp32_bytes(torch.ones(FRAGMENT))[: 2 * FRAGMENT]
    announced = pb.InitializeFragment(fragment=fragment, payload=payload_of(data, pb.CODEC_BF16))
    return pb.InitializeRequest(fragment=announced, data=data)
