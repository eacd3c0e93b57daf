"""The live model as fragments: reading and changing parameters in place, whatever their layout, dtype and device."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.fragments import exchanged, gather, manifest_of
from paceline.model_state import FragmentState
from paceline.place import HOST, Handed, Place
from paceline_wire.manifest import Fragment
from support_core import ACCELERATOR, PLACES, Where, needs_gpu, normal

prop = settings(deadline=None, derandomize=True, max_examples=40)
each_place = pytest.mark.parametrize("where", PLACES)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def layouts(device: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Tensors of 0 to 4 dimensions, most of them not contiguous, 1011 elements in all."""
    tensors = {
        "channels_last": normal(2 * 3 * 4 * 5, 1).reshape(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        "column": normal(60, 2).reshape(30, 2)[:, 1],
        "contiguous": normal(300, 3).reshape(20, 15),
        "every_other": normal(100, 4)[::2],
        "scalar": normal(1, 5).reshape(()),
        "transposed": normal(510, 6).reshape(17, 30).T,
        "void": torch.empty(3, 0),
    }
    moved = {}
    for name, tensor in tensors.items():
        moved[name] = torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device=device)
        moved[name].copy_(tensor)
    return moved


def states(
    tensors: dict[str, torch.Tensor], fragment_elements: int = 256, place: Place = HOST
) -> list[tuple[Fragment, FragmentState]]:
    """The fragments of tensors, each with its state."""
    manifest = manifest_of(tensors, averaged=(), fragment_elements=fragment_elements)
    return [(fragment, FragmentState(fragment, tensors, place)) for fragment in manifest.fragments]


def sent(place: Place, values: torch.Tensor) -> Handed:
    """Values (float32 [n] on the host) on their way to the model, as the exchange sends them."""
    with place.stream():
        return place.to_model(place.from_host(values))


@each_place
@each_dtype
def test_reading_gives_the_values_in_row_major_order(where: Where, dtype: torch.dtype) -> None:
    """A fragment is read as float32 at its place, the same as gathering it, for every layout."""
    tensors, place = layouts(where.device, dtype), where.place
    for fragment, state in states(tensors, place=place):
        values = state.read().take()
        assert (values.dtype, values.device.type) == (torch.float32, place.device.type)
        assert torch.equal(gather(fragment, tensors), values.cpu())


@each_place
@each_dtype
def test_writing_sets_exactly_the_fragment(where: Where, dtype: torch.dtype) -> None:
    """After a write the model holds the values, rounded to its dtype, and every other fragment is as it was."""
    tensors, place = layouts(where.device, dtype), where.place
    everything = states(tensors, place=place)
    for written, state in everything:
        before = [gather(fragment, tensors) for fragment, _ in everything]
        values = normal(written.num_elements, 50 + written.index)
        held = state.write(values).take()
        for (fragment, _), earlier in zip(everything, before, strict=True):
            expected = values.to(dtype).float() if fragment is written else earlier
            assert torch.equal(expected, gather(fragment, tensors))
        assert held.device.type == place.device.type
        assert torch.equal(values.to(dtype).float(), held.cpu())


@each_place
@each_dtype
def test_adding_shifts_exactly_the_fragment(where: Where, dtype: torch.dtype) -> None:
    """After an addition the fragment has moved by the values, rounded once, and every other one is as it was."""
    tensors, place = layouts(where.device, dtype), where.place
    everything = states(tensors, place=place)
    for shifted, state in everything:
        before = [gather(fragment, tensors) for fragment, _ in everything]
        shift = normal(shifted.num_elements, 50 + shifted.index)
        state.add(sent(place, shift))
        for (fragment, _), earlier in zip(everything, before, strict=True):
            expected = (earlier + shift).to(dtype).float() if fragment is shifted else earlier
            assert torch.equal(expected, gather(fragment, tensors))


@each_place
def test_parameters_stay_where_they_are(where: Where) -> None:
    """The model is changed in place: the optimizer goes on with the very memory it knows, layout and all."""
    model, place = torch.nn.Conv2d(3, 4, 2).to(where.device), where.place
    model.weight.data = model.weight.data.contiguous(memory_format=torch.channels_last)
    places = [(parameter.data_ptr(), parameter.stride()) for parameter in model.parameters()]
    for fragment, state in states(exchanged(dict(model.named_parameters())), place=place):
        state.write(normal(fragment.num_elements, 1))
        state.add(sent(place, normal(fragment.num_elements, 2)))
    assert places == [(parameter.data_ptr(), parameter.stride()) for parameter in model.parameters()]
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in model.parameters())


@each_place
def test_a_snapshot_does_not_change_when_training_goes_on(where: Where) -> None:
    """What was read is a copy: later steps, writes and additions leave it as it was."""
    tensors, place = {"w": normal(300, 1).to(where.device)}, where.place
    ((_, state),) = states(tensors, 512, place)
    snapshot = state.read()
    tensors["w"].add_(1.0)
    state.write(normal(300, 2))
    assert torch.equal(normal(300, 1), snapshot.take().cpu())


@each_place
@each_dtype
def test_a_model_that_stands_still_lends_its_values(where: Where, dtype: torch.dtype) -> None:
    """What is lent is what would be read, for every layout; float32 tensors in one piece lend their own memory."""
    tensors, place = layouts(where.device, dtype), where.place
    for _, state in states(tensors, place=place):
        place.lend_model()
        with place.stream():
            assert torch.equal(state.read().take(), torch.cat(list(state.lent())))
        place.take_model_back()
    whole = {"w": torch.zeros(300, dtype=dtype, device=where.device)}
    ((_, state),) = states(whole, 512, place)
    place.lend_model()
    with place.stream():
        shares = state.lent()[0].data_ptr() == whole["w"].data_ptr()
    place.take_model_back()
    assert shares == (dtype is torch.float32 and not where.on_host)


@each_place
def test_values_given_are_not_changed(where: Where) -> None:
    """Neither a write nor an addition changes what it is given, nor lets the model share it."""
    tensors, place = {"w": normal(300, 1).to(where.device)}, where.place
    ((_, state),) = states(tensors, 512, place)
    written, shift = normal(300, 2), normal(300, 3)
    state.write(written)
    shifting = sent(place, shift)
    state.add(shifting)
    tensors["w"].add_(1.0)
    assert torch.equal(normal(300, 2), written)
    assert torch.equal(normal(300, 3), shift)
    assert torch.equal(normal(300, 3), shifting.take().cpu())


@each_dtype
@prop
@given(cuts=st.integers(1, 8), seed=st.integers(0, 99))
def test_written_values_are_read_back(dtype: torch.dtype, cuts: int, seed: int) -> None:
    """However the model is cut, writing every fragment and reading them gives the values that the model can hold."""
    tensors = layouts("cpu", dtype)
    everything = states(tensors, 256 * cuts)
    values = [normal(fragment.num_elements, seed + fragment.index) for fragment, _ in everything]
    held = [state.write(each).take() for (_, state), each in zip(everything, values, strict=True)]
    for (_, state), each, kept in zip(everything, values, held, strict=True):
        assert torch.equal(each.to(dtype).float(), state.read().take())
        assert torch.equal(each.to(dtype).float(), kept)


def test_precision_is_the_models() -> None:
    """Only a float32 model takes every shift; the others round it."""
    expected = {torch.float32: True, torch.bfloat16: False, torch.float16: False}
    for dtype, full in expected.items():
        ((_, state),) = states({"w": torch.zeros(3, dtype=dtype)})
        assert state.is_full_precision is full


@needs_gpu
@pytest.mark.parametrize("on_host", [False, True])
def test_the_exchange_on_its_own_stream_is_in_order_with_training(on_host: bool) -> None:
    """On a GPU, reads see the kernels before them, additions come before the kernels after them, and nobody waits."""
    tensors = {"w": torch.zeros(4_000_000, device=ACCELERATOR)}
    place = Place(torch.device(ACCELERATOR), on_host=on_host)
    ((_, state),) = states(tensors, 1 << 24, place)
    read = []
    for _ in range(20):
        tensors["w"].add_(1.0)
        read.append(state.read())
        state.add(sent(place, torch.full((4_000_000,), 2.0)))
    extremes = [torch.stack(torch.aminmax(each.take())).tolist() for each in read]
    assert [[3.0 * number + 1.0] * 2 for number in range(20)] == extremes
    assert float(tensors["w"].min()) == float(tensors["w"].max()) == 60.0
