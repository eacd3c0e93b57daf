"""The manifest and its plan: a pure cut that covers every element once, and hostile manifests that are refused."""

import math
from contextlib import suppress
from random import Random

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline_wire.codecs.base import BLOCK_ELEMENTS
from paceline_wire.errors import InvalidInputError
from paceline_wire.manifest import (
    DEFAULT_FRAGMENT_ELEMENTS,
    EXCHANGED_DTYPES,
    MAX_DIMENSIONS,
    MAX_ELEMENTS,
    MAX_FRAGMENT_ELEMENTS,
    MAX_NAME_BYTES,
    Manifest,
    TensorSpec,
)
from paceline_wire.v1 import parameter_server_pb2 as pb

ROLES = ("parameter", "averaged")
prop = settings(deadline=None, derandomize=True, max_examples=100)

shapes = st.lists(st.integers(0, 40), max_size=3).map(tuple)
specs = st.lists(
    st.builds(
        TensorSpec,
        name=st.text("abc.é", min_size=1, max_size=6),
        shape=shapes,
        dtype=st.sampled_from(EXCHANGED_DTYPES),
        role=st.sampled_from(ROLES),
    ),
    unique_by=lambda spec: spec.name,
    max_size=8,
)
sizes = st.integers(1, 16).map(lambda blocks: blocks * BLOCK_ELEMENTS)


def spec(name: str, *shape: int, dtype: str = "float32", role: str = "parameter") -> TensorSpec:
    """A tensor of a manifest."""
    return TensorSpec(name=name, shape=shape, dtype=dtype, role=role)


def wire(name: str, *shape: int, dtype: int = pb.DTYPE_FLOAT32, role: int = pb.ROLE_PARAMETER) -> pb.Tensor:
    """A tensor as a peer may send it, also one of a newer version."""
    return pb.Tensor(name=name, shape=shape, dtype=pb.Dtype.ValueType(dtype), role=pb.Role.ValueType(role))


# --- The plan.


@prop
@given(tensors=specs, size=sizes, random=st.randoms(use_true_random=False))
def test_the_plan_does_not_depend_on_the_order_of_the_tensors(
    tensors: list[TensorSpec], size: int, random: Random
) -> None:
    """Manifests of the same tensors in any order are equal, with equal plans and digests."""
    shuffled = list(tensors)
    random.shuffle(shuffled)
    one, other = Manifest.of(tensors, size), Manifest.of(shuffled, size)
    assert one == other
    assert one.fragments == other.fragments
    assert one.digest == other.digest


@prop
@given(tensors=specs, size=sizes)
def test_every_element_is_in_exactly_one_fragment(tensors: list[TensorSpec], size: int) -> None:
    """The segments of each tensor, in the order of the plan, are its elements from first to last, once each."""
    manifest = Manifest.of(tensors, size)
    covered = {tensor.name: 0 for tensor in tensors}
    for fragment in manifest.fragments:
        filled = 0
        for segment in fragment.segments:
            assert segment.length >= 1
            assert segment.fragment_start == filled
            assert segment.tensor_start == covered[segment.tensor]
            filled += segment.length
            covered[segment.tensor] += segment.length
        assert filled == fragment.num_elements
    assert covered == {tensor.name: math.prod(tensor.shape) for tensor in tensors}
    assert manifest.num_elements == sum(covered.values())


@prop
@given(tensors=specs, size=sizes)
def test_a_fragment_has_one_role_one_dtype_and_a_bounded_size(tensors: list[TensorSpec], size: int) -> None:
    """Fragments never cross groups; a group is cut into as few as it can be, equal ones but for the last."""
    manifest = Manifest.of(tensors, size)
    by_name = {tensor.name: tensor for tensor in tensors}
    groups: dict[tuple[str, str], list[int]] = {}
    for number, fragment in enumerate(manifest.fragments):
        assert fragment.index == number
        kinds = {(by_name[s.tensor].role, by_name[s.tensor].dtype) for s in fragment.segments}
        assert kinds == {(fragment.role, fragment.dtype)}
        groups.setdefault((fragment.role, fragment.dtype), []).append(fragment.num_elements)
    for (role, dtype), group in groups.items():
        total = sum(t.num_elements for t in tensors if (t.role, t.dtype) == (role, dtype))
        assert len(group) == -(-total // size)
        assert len({*group[:-1]}) <= 1
        assert all(n % BLOCK_ELEMENTS == 0 for n in group[:-1])
        assert 1 <= group[-1] <= max(group) <= size


def test_groups_are_in_the_order_of_the_wire_and_tensors_in_that_of_their_names() -> None:
    """Parameters come before averaged buffers, float32 before bfloat16 before float16, then by name."""
    manifest = Manifest.of(
        [
            spec("a", 1, dtype="float16"),
            spec("b", 1, role="averaged"),
            spec("d", 1),
            spec("c", 1),
            spec("e", 1, dtype="bfloat16"),
        ]
    )
    plan = [(f.role, f.dtype, [s.tensor for s in f.segments]) for f in manifest.fragments]
    assert plan == [
        ("parameter", "float32", ["c", "d"]),
        ("parameter", "bfloat16", ["e"]),
        ("parameter", "float16", ["a"]),
        ("averaged", "float32", ["b"]),
    ]


def test_a_cut_by_hand() -> None:
    """1300 elements in fragments of at most 512: three of 512, 512 and 276, the second across two tensors."""
    manifest = Manifest.of([spec("a", 30, 20), spec("b", 700), spec("scalar")], 512)
    plan = [[(s.tensor, s.tensor_start, s.fragment_start, s.length) for s in f.segments] for f in manifest.fragments]
    assert plan == [
        [("a", 0, 0, 512)],
        [("a", 512, 0, 88), ("b", 0, 88, 424)],
        [("b", 424, 0, 276), ("scalar", 0, 276, 1)],
    ]


@pytest.mark.parametrize(
    "tensors", [[], [spec("empty", 0)], [spec("empty", 3, 0, 2), spec("none", 0, role="averaged")]]
)
def test_a_manifest_without_elements_has_no_fragments(tensors: list[TensorSpec]) -> None:
    """Tensors without elements are legal, and there is nothing to exchange of them."""
    manifest = Manifest.of(tensors)
    assert manifest.fragments == ()
    assert manifest.num_elements == 0
    assert Manifest.from_wire(manifest.to_wire()) == manifest


def test_the_message_is_made_once() -> None:
    """Whoever asks a shard what it hosts costs it no walk over the tensors, of which there may be a million."""
    manifest = Manifest.of([TensorSpec(name="x", shape=(3,), dtype="float32", role="parameter")], 256)
    assert manifest.wire is manifest.wire
    assert manifest.wire == manifest.to_wire()


def test_a_0_d_tensor_is_one_element() -> None:
    """A scalar parameter is exchanged like any other."""
    (fragment,) = Manifest.of([spec("scale")]).fragments
    assert (fragment.num_elements, len(fragment.segments)) == (1, 1)


@prop
@given(tensors=specs, num_shards=st.integers(1, 5))
def test_fragments_live_on_shards_in_turn(tensors: list[TensorSpec], num_shards: int) -> None:
    """Fragment f lives on shard f modulo the number of shards, and nowhere else."""
    manifest = Manifest.of(tensors, BLOCK_ELEMENTS)
    hosted = {
        fragment.index: shard
        for shard in range(num_shards)
        for fragment in manifest.fragments_of_shard(shard, num_shards)
    }
    assert hosted == {fragment.index: fragment.index % num_shards for fragment in manifest.fragments}


def test_a_large_model_is_cut_evenly() -> None:
    """67 G parameters in 1000 tensors make 16 000 fragments of exactly the default size."""
    manifest = Manifest.of(spec(f"layer.{number:04}.weight", 8192, 8192) for number in range(1000))
    assert {fragment.num_elements for fragment in manifest.fragments} == {DEFAULT_FRAGMENT_ELEMENTS}
    assert len(manifest.fragments) == 16_000


# --- On the wire.


@prop
@given(tensors=specs, size=sizes)
def test_the_wire_gives_the_manifest_back(tensors: list[TensorSpec], size: int) -> None:
    """Through bytes and back, a manifest is equal, and so are its plan and digest."""
    manifest = Manifest.of(tensors, size)
    received = Manifest.from_wire(pb.Manifest.FromString(manifest.to_wire().SerializeToString()))
    assert received == manifest
    assert received.fragments == manifest.fragments
    assert received.digest == manifest.digest


hostile_tensors = st.builds(
    lambda name, shape, dtype, role: wire(name, *shape, dtype=dtype, role=role),
    name=st.text(max_size=5) | st.just("x" * (MAX_NAME_BYTES + 1)),
    shape=st.lists(st.integers(0, 3) | st.integers(0, 2**64 - 1), max_size=5)
    | st.integers(1, 500).map(lambda n: [2**64 - 1] * n),
    dtype=st.integers(0, 3) | st.integers(-(2**31), 2**31 - 1),
    role=st.integers(0, 2) | st.integers(-(2**31), 2**31 - 1),
)
hostile_manifests = st.builds(
    pb.Manifest,
    tensors=st.lists(hostile_tensors, max_size=4),
    fragment_elements=st.sampled_from([256, 4096, MAX_FRAGMENT_ELEMENTS]) | st.integers(0, 2**64 - 1),
)


@settings(deadline=None, derandomize=True, max_examples=400)
@given(message=hostile_manifests)
def test_a_hostile_manifest_is_refused_or_sound(message: pb.Manifest) -> None:
    """Whatever fields a peer sends, the manifest is either refused with InvalidInputError or keeps every rule."""
    try:
        manifest = Manifest.from_wire(message)
    except InvalidInputError:
        return
    assert [tensor.name for tensor in manifest.tensors] == sorted({tensor.name for tensor in manifest.tensors})
    assert manifest.num_elements <= MAX_ELEMENTS
    assert manifest.to_wire() == message


@settings(deadline=None, derandomize=True, max_examples=200)
@given(data=st.binary(max_size=200))
def test_bytes_that_parse_are_refused_or_sound(data: bytes) -> None:
    """Garbage that protobuf takes for a manifest raises nothing else than InvalidInputError."""
    message = pb.Manifest()
    try:
        message.ParseFromString(data)
    except DecodeError:
        return
    with suppress(InvalidInputError):
        Manifest.from_wire(message)


def test_a_shape_of_a_million_dimensions_is_refused_at_once() -> None:
    """The number of elements of a hostile shape, a product of a million factors, is never computed."""
    message = pb.Manifest(fragment_elements=256, tensors=[wire("a", *[2**64 - 1] * 1_000_000)])
    with pytest.raises(InvalidInputError, match="1000000 dimensions"):
        Manifest.from_wire(message)


@pytest.mark.parametrize(
    ("tensors", "size", "reason"),
    [
        ([wire("")], 256, "name of 0 bytes"),
        ([wire("é" * 600)], 256, "name of 1200 bytes"),
        ([wire("a", dtype=0)], 256, "'a' is dtype 0"),
        ([wire("a", dtype=99)], 256, "'a' is dtype 99"),
        ([wire("a", role=0)], 256, "'a' has role"),
        ([wire("a", *[1] * (MAX_DIMENSIONS + 1))], 256, "'a' has 65 dimensions"),
        ([wire("b"), wire("a")], 256, "'a' follows 'b'"),
        ([wire("a"), wire("a")], 256, "'a' follows 'a'"),
        ([wire("a", 2**63, 4)], 256, "elements, more than"),
        ([wire("a", 1_000_000, 257)], 256, "257000000 elements"),
        ([], 0, "fragment_elements is 0"),
        ([], 300, "fragment_elements is 300"),
        ([], MAX_FRAGMENT_ELEMENTS + 256, "fragment_elements is"),
    ],
)
def test_the_sentence_says_which_tensor_and_why(tensors: list[pb.Tensor], size: int, reason: str) -> None:
    """Each broken rule is refused in a sentence that names what broke it."""
    with pytest.raises(InvalidInputError, match=reason):
        Manifest.from_wire(pb.Manifest(tensors=tensors, fragment_elements=size))


def test_a_negative_extent_is_refused() -> None:
    """Extents of a manifest made here, not on the wire, are checked too."""
    with pytest.raises(InvalidInputError, match="negative extent"):
        spec("a", 2, -1)


# --- Differences.


@prop
@given(tensors=specs, others=specs, size=sizes, other_size=sizes)
def test_equal_manifests_have_no_difference_and_others_have_one(
    tensors: list[TensorSpec], others: list[TensorSpec], size: int, other_size: int
) -> None:
    """There is a difference exactly if the manifests differ, and digests tell the same."""
    one, other = Manifest.of(tensors, size), Manifest.of(others, other_size)
    assert (one.difference(other) is None) == (one == other) == (one.digest == other.digest)
    assert one.difference(Manifest.of(tensors, size)) is None


@pytest.mark.parametrize(
    ("other", "phrase"),
    [
        (spec("weight", 4, 4), "tensor 'weight' is weight float32[4, 5] (parameter) here and weight float32[4, 4]"),
        (
            spec("weight", 4, 5, dtype="bfloat16"),
            "'weight' is weight float32[4, 5] (parameter) here and weight bfloat16",
        ),
        (spec("weight", 4, 5, role="averaged"), "here and weight float32[4, 5] (averaged) there"),
        (spec("wait", 4, 5), "tensor wait float32[4, 5] (parameter) is missing here"),
        (spec("zoo", 4, 5), "tensor weight float32[4, 5] (parameter) is missing there"),
    ],
)
def test_a_difference_names_the_first_tensor(other: TensorSpec, phrase: str) -> None:
    """The phrase names the tensor, what it is on each side, and on which side it is missing."""
    common = spec("bias", 5)
    difference = Manifest.of([common, spec("weight", 4, 5)]).difference(Manifest.of([common, other]))
    assert difference is not None
    assert phrase in difference


def test_another_cut_is_a_difference() -> None:
    """Equal tensors in fragments of another size are another manifest, and the phrase says both sizes."""
    difference = Manifest.of([spec("a", 5)], 256).difference(Manifest.of([spec("a", 5)], 512))
    assert difference == "fragment_elements is 256 here and 512 there"
