"""Values in several tensors: cut into runs of whole blocks, and encoded and written as if they lay in one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline_wire import codecs
from paceline_wire.codecs import kernels, parts
from paceline_wire.codecs.base import BLOCK_ELEMENTS
from paceline_wire.codecs.compiled import CompiledCodec
from paceline_wire.codecs.feedback import compensate
from paceline_wire.codecs.moves import follow_move
from paceline_wire.codecs.parts import runs
from paceline_wire.codecs.whole import encode
from paceline_wire.errors import InvalidInputError
from support_core import normal

prop = settings(deadline=None, derandomize=True, max_examples=60)
sizes = st.lists(st.integers(0, 1500), min_size=1, max_size=6)
each_codec = pytest.mark.parametrize("name", ["int8", "int4", "fp4", "bf16", "topk", "fp32"])


@pytest.fixture(autouse=True, scope="module")
def few_elements_are_many() -> object:
    """Let the compiled loops do small tensors too, and runs be short."""
    patch = pytest.MonkeyPatch()
    assert kernels.load() is not None
    patch.setattr(kernels, "LEAST_ELEMENTS", 1)
    patch.setattr(parts, "LEAST_ELEMENTS", 2 * BLOCK_ELEMENTS)
    yield
    patch.undo()


def cut(values: torch.Tensor, into: list[int]) -> list[torch.Tensor]:
    """Copies of the parts of values (float32 [sum of into])."""
    return [part.clone() for part in torch.split(values, into)]


@prop
@given(into=sizes)
def test_runs_are_the_values_in_whole_blocks(into: list[int]) -> None:
    """They follow each other without a gap from block to block, and read and write what the parts have."""
    values = normal(sum(into), 1)
    found = cut(values, into)
    of_it = runs(found)
    assert [run.first for run in of_it] == [0, *(run.end for run in of_it[:-1])]
    assert of_it[-1].end == values.numel()
    assert all(run.first % BLOCK_ELEMENTS == 0 for run in of_it)
    assert torch.equal(values, torch.cat([run.read() for run in of_it]))
    for run in of_it:
        run.write(-values[run.first : run.end], 0)
    assert torch.equal(-values, torch.cat(found))
    for run in of_it:
        run.write(values[run.first : run.end], 100)
    kept = torch.cat([torch.arange(run.end - run.first) < 100 for run in of_it])
    assert torch.equal(torch.where(kept, -values, values), torch.cat(found))


def test_a_long_part_is_not_copied() -> None:
    """A run inside a part is a view of it; what lies between two is gathered."""
    found = [torch.zeros(1000), torch.zeros(10), torch.zeros(2000)]
    of_it = runs(found)
    assert [(run.first, run.end, len(run.pieces)) for run in of_it] == [
        (0, 768, 1),
        (768, 1024, 3),
        (1024, 2816, 1),
        (2816, 3010, 1),
    ]
    assert of_it[0].read().data_ptr() == found[0].data_ptr()


@each_codec
@prop
@given(into=sizes, seed=st.integers(0, 99), has_residual=st.booleans(), has_minus=st.booleans())
def test_values_in_parts_are_encoded_as_in_one(
    name: str, into: list[int], seed: int, has_residual: bool, has_minus: bool
) -> None:
    """Whatever is in parts, payload and residual have the same bits."""
    codec, size = codecs.codec(name), sum(into)
    values, minus = normal(size, seed), normal(size, seed + 1) if has_minus else None
    residual = normal(size, seed + 2) / 100 if has_residual else None
    plain = codec.plain if isinstance(codec, CompiledCodec) else codec
    expected = compensate(plain, values, residual, minus=minus)
    in_parts = [(cut(values, into), minus)]
    if minus is not None:
        in_parts += [(values, cut(minus, into)), (cut(values, into), cut(minus, into))]  # type: ignore[list-item]  # lists are of one type
    for given_values, given_minus in in_parts:
        found = compensate(codec, given_values, residual, minus=given_minus)
        assert torch.equal(expected.payload, found.payload)
        if expected.residual is None or found.residual is None:
            assert expected.residual is found.residual
        else:
            assert torch.equal(expected.residual, found.residual)


@pytest.mark.parametrize("name", ["int8", "int4", "fp4", "bf16", "fp32"])
@prop
@given(into=sizes, seed=st.integers(0, 99))
def test_following_writes_every_part(name: str, into: list[int], seed: int) -> None:
    """Copies in parts have what is held then, blocks that straddle them and one that is not full included."""
    codec, size = codecs.codec(name), sum(into)
    payload, held = encode(codec, normal(size, seed)), normal(size, seed + 1)
    copies = cut(torch.zeros(size), into)
    moved = torch.empty_like(held)
    follow_move(codec, payload, held, moved, copies)
    assert torch.equal(codecs.decode(codec, payload, size) + held, moved)
    assert torch.equal(moved, torch.cat(copies))


def test_parts_that_do_not_belong_together_are_refused() -> None:
    """Another number of elements, or another type, in words."""
    values = [torch.zeros(300), torch.zeros(300)]
    with pytest.raises(InvalidInputError, match=r"the subtrahend torch.float32 \[500\] does not belong to values"):
        compensate(codecs.codec("int8"), values, minus=[torch.zeros(200), torch.zeros(300)])
    with pytest.raises(InvalidInputError, match=r"the residual torch.float64 \[600\] does not belong to values"):
        compensate(codecs.codec("int8"), values, torch.zeros(600, dtype=torch.float64))
    with pytest.raises(InvalidInputError, match="values must be contiguous"):
        compensate(codecs.codec("int8"), [torch.zeros(300), torch.zeros(300, requires_grad=True)])
