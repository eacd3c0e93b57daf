"""Between named tensors and flat fragments: what is exchanged, and that gathering and scattering are inverse."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.fragments import empty_tensors, exchanged, gather, manifest_of, require_values, scatter
from paceline_wire.errors import InvalidInputError, ManifestMismatchError
from paceline_wire.manifest import Manifest
from support_core import normal

prop = settings(deadline=None, derandomize=True, max_examples=60)
LAYOUTS = ("contiguous", "transposed", "strided", "offset")


def laid_out(shape: tuple[int, ...], layout: str, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """A tensor of that shape whose elements lie in memory as the layout says."""
    num_elements = math.prod(shape)
    if layout == "transposed":
        return normal(num_elements, seed).to(dtype).reshape(shape[::-1]).permute(tuple(range(len(shape)))[::-1])
    if layout == "strided":
        return normal(2 * num_elements, seed).to(dtype).reshape(*shape, 2)[..., 1]
    if layout == "offset":
        return normal(num_elements + 3, seed).to(dtype)[3:].reshape(shape)
    return normal(num_elements, seed).to(dtype).reshape(shape)


tensor_dicts = st.dictionaries(
    st.text("abc.", min_size=1, max_size=4),
    st.builds(
        laid_out,
        st.lists(st.integers(0, 9), max_size=4).map(tuple),
        st.sampled_from(LAYOUTS),
        st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
        st.integers(0, 99),
    ),
    max_size=6,
)


# --- What is exchanged.


def test_tied_tensors_are_exchanged_once_under_their_first_name() -> None:
    """Two names of one memory make one tensor; another tensor of the same values is another."""
    weight = normal(6, 0).reshape(2, 3)
    kept = exchanged({"head": weight, "embedding": weight, "view": weight.view(2, 3), "twin": weight.clone()})
    assert list(kept) == ["head", "twin"]
    assert kept["head"].data_ptr() == weight.data_ptr()


def test_parts_of_one_memory_are_not_tied() -> None:
    """Slices of one tensor, and tensors without elements, are exchanged each for itself."""
    whole = normal(6, 0)
    kept = exchanged({"first": whole[:3], "last": whole[3:], "none": torch.empty(0), "empty": torch.empty(0)})
    assert list(kept) == ["first", "last", "none", "empty"]


def test_tied_modules_are_exchanged_once() -> None:
    """A model whose output layer shares its embedding's weight exchanges that weight once."""
    embedding, head = torch.nn.Embedding(7, 4), torch.nn.Linear(4, 7, bias=False)
    head.weight = embedding.weight
    model = torch.nn.ModuleDict({"embedding": embedding, "head": head})
    assert list(exchanged(model.state_dict(keep_vars=True))) == ["embedding.weight"]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool])
def test_integers_stay_local(dtype: torch.dtype) -> None:
    """Counters and masks are not exchanged, and are no error."""
    assert list(exchanged({"count": torch.zeros(3, dtype=dtype), "weight": torch.zeros(3)})) == ["weight"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.float8_e4m3fn])
def test_numbers_that_cannot_be_exchanged_are_refused(dtype: torch.dtype) -> None:
    """A dtype that would silently stay behind or lose digits is refused, with the tensor's name and what to do."""
    with pytest.raises(InvalidInputError, match=r"'weight' is torch\..*convert it"):
        exchanged({"bias": torch.zeros(3), "weight": torch.zeros(3, dtype=dtype)})


def test_what_is_exchanged_is_detached_and_shares_memory() -> None:
    """Writing to an exchanged tensor changes the parameter, without a gradient in the way."""
    parameter = torch.nn.Parameter(torch.zeros(3))
    kept = exchanged({"weight": parameter})["weight"]
    assert not kept.requires_grad
    kept.fill_(2.0)
    assert torch.equal(torch.full((3,), 2.0), parameter.detach())


def test_the_manifest_says_dtype_shape_and_role() -> None:
    """Every tensor is listed as it is, buffers that are averaged under their own role."""
    tensors = {"w": torch.zeros(2, 3, dtype=torch.bfloat16), "mean": torch.zeros(()), "v": torch.zeros(0)}
    manifest = manifest_of(tensors, averaged={"mean"}, fragment_elements=256)
    assert [str(spec) for spec in manifest.tensors] == [
        "mean float32[] (averaged)",
        "v float32[0] (parameter)",
        "w bfloat16[2, 3] (parameter)",
    ]


def test_a_name_that_breaks_the_manifests_rules_is_refused() -> None:
    """The manifest's own checks apply to a model's tensors."""
    with pytest.raises(InvalidInputError, match="name of 2000 bytes"):
        manifest_of({"x" * 2000: torch.zeros(1)}, averaged=(), fragment_elements=256)


# --- Gathering and scattering.


@prop
@given(tensors=tensor_dicts)
def test_scattering_what_was_gathered_gives_the_tensors_back(tensors: dict[str, torch.Tensor]) -> None:
    """For any shapes, dtypes and layouts, the fragments hold every element, in row-major order, as float32."""
    manifest = manifest_of(tensors, averaged=(), fragment_elements=256)
    back = empty_tensors(manifest)
    for fragment in manifest.fragments:
        flat = gather(fragment, tensors)
        assert (flat.dtype, flat.device.type) == (torch.float32, "cpu")
        assert flat.shape == (fragment.num_elements,)
        assert flat.is_contiguous()
        scatter(fragment, flat, back)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor.float(), back[name])


@prop
@given(tensors=tensor_dicts, seed=st.integers(0, 99))
def test_gathering_what_was_scattered_gives_the_fragments_back(tensors: dict[str, torch.Tensor], seed: int) -> None:
    """Values written through the fragments are read through the fragments."""
    manifest = manifest_of(tensors, averaged=(), fragment_elements=256)
    held = empty_tensors(manifest)
    written = [normal(fragment.num_elements, seed + fragment.index) for fragment in manifest.fragments]
    for fragment, values in zip(manifest.fragments, written, strict=True):
        scatter(fragment, values, held)
    for fragment, values in zip(manifest.fragments, written, strict=True):
        assert torch.equal(values, gather(fragment, held))


def test_gathering_takes_other_dtypes_than_the_manifests() -> None:
    """Outer gradients may be of any floating dtype, mixed ones too: they are converted, not reinterpreted."""
    manifest = manifest_of({"a": torch.zeros(2), "b": torch.zeros(3)}, averaged=(), fragment_elements=256)
    (fragment,) = manifest.fragments
    flat = gather(fragment, {"a": torch.tensor([1.0, 2.0], dtype=torch.float64), "b": torch.ones(3).bfloat16()})
    assert torch.equal(torch.tensor([1.0, 2.0, 1.0, 1.0, 1.0]), flat)


def test_gathering_needs_no_gradient() -> None:
    """A parameter that requires gradients is gathered as values."""
    parameter = torch.nn.Parameter(normal(4, 0))
    (fragment,) = manifest_of({"w": parameter}, averaged=(), fragment_elements=256).fragments
    assert not gather(fragment, {"w": parameter}).requires_grad


# --- What is given must fit.


def _manifest() -> Manifest:
    return manifest_of({"a": torch.zeros(2, 3), "b": torch.zeros(())}, averaged=(), fragment_elements=256)


def test_values_of_the_manifests_names_and_shapes_fit() -> None:
    """Names and shapes count; dtypes may differ."""
    require_values(_manifest(), {"b": torch.zeros((), dtype=torch.float64), "a": torch.zeros(2, 3)})


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        ({"a": torch.zeros(2, 3)}, "'b' of the run is missing"),
        ({"a": torch.zeros(3, 2), "b": torch.zeros(())}, r"'a' has shape \[3, 2\]; in the run it has \[2, 3\]"),
        ({"a": torch.zeros(2, 3), "b": torch.zeros(1)}, r"'b' has shape \[1\]; in the run it has \[\]"),
        ({"a": torch.zeros(2, 3), "b": torch.zeros(()), "c": torch.zeros(1)}, "the run has no tensor 'c'"),
    ],
)
def test_values_that_do_not_fit_are_refused_by_name(tensors: dict[str, torch.Tensor], sentence: str) -> None:
    """A tensor that is missing, too many or of another shape is named, before anything is sent."""
    with pytest.raises(ManifestMismatchError, match=sentence):
        require_values(_manifest(), tensors)
