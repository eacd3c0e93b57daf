"""The compiled loops against the plain way: the same bits for all numbers, sizes and addresses, in every operation."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline_server.fragment import FragmentValues
from paceline_server.ledger import Decision, Outcome
from paceline_server.rules.base import Contribution
from paceline_server.rules.ordered_momentum import OrderedMomentum
from paceline_server.rules.rates import Rates
from paceline_wire.codecs import Codec, codec, compensate, encode, kernels, squares
from paceline_wire.codecs.compiled import CompiledCodec
from paceline_wire.codecs.moves import encode_move, follow_move
from paceline_wire.errors import CodecError

pytest.importorskip("numba")

DENSE = ("fp32", "bf16", "int8", "int4", "fp4")
SIZES = (1, 255, 256, 257, 511, 512, 513, 1000, 1280)
LARGEST = float(np.finfo(np.float32).max)
RULE = OrderedMomentum(rates=Rates(peak_lr=0.7, full_momentum=0.9))

each_dense = pytest.mark.parametrize("name", DENSE)
prop = settings(deadline=None, derandomize=True, max_examples=40)


@pytest.fixture(autouse=True, scope="module")
def compiled() -> Iterator[None]:
    """Have the kernels loaded, and used for fragments of any size."""
    assert kernels.load() is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "LEAST_ELEMENTS", 1)
        yield


def pair(name: str) -> tuple[CompiledCodec, Codec]:
    """Return a codec with loops, and the one that defines its bytes."""
    fast = codec(name)
    assert isinstance(fast, CompiledCodec)
    return fast, fast.plain


@st.composite
def numbers(draw: st.DrawFn, size: int | None = None, largest_exponent: int = 126) -> torch.Tensor:
    """Draw finite float32 numbers: each block of its own magnitude, some all zero or subnormal, some full of ties."""
    size = draw(st.sampled_from(SIZES)) if size is None else size
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    exponents = generator.integers(-150, largest_exponent, size=-(-size // 256))
    scales = np.ldexp(1.0, exponents) * generator.integers(0, 4, size=exponents.shape).clip(max=1)
    if draw(st.booleans()):
        values = generator.integers(-254, 255, size=size) / 2  # halves of whole codes: ties, where 127 is among them
        values[::64] = 127
    else:
        values = generator.standard_normal(size)
    with np.errstate(over="ignore"):
        scaled = np.clip(values * np.repeat(scales, 256)[:size], -LARGEST, LARGEST).astype(np.float32)
    return torch.from_numpy(scaled)


def bits(tensor: torch.Tensor | None) -> bytes | None:
    """Return a tensor's memory."""
    return None if tensor is None else tensor.contiguous().view(torch.uint8).numpy().tobytes()


def at_byte(payload: torch.Tensor, offset: int) -> torch.Tensor:
    """Return a copy of a payload that starts at an address which suits no number."""
    moved = torch.empty(payload.numel() + 16, dtype=torch.uint8)[offset : offset + payload.numel()]
    return moved.copy_(payload)


def hostile(name: str, size: int, seed: int) -> torch.Tensor:
    """Return a payload that its codec's check accepts, with codes and scales that no encoder writes."""
    _, plain = pair(name)
    generator = torch.Generator().manual_seed(seed)
    payload = torch.randint(0, 256, (plain.encoded_bytes(size),), dtype=torch.uint8, generator=generator)
    if name in ("fp32", "bf16"):
        return encode(plain, torch.randn(size, generator=generator))
    num_scales = -(-size // 256)
    payload[: 4 * num_scales] = torch.rand(num_scales, generator=generator).view(torch.uint8)
    plain.check(payload, size)
    return payload


# --- Encoding and decoding.


@each_dense
@prop
@given(values=numbers(), offset=st.integers(0, 5))
def test_encoding_has_the_same_bits(name: str, values: torch.Tensor, offset: int) -> None:
    """Whatever the numbers and wherever the payload goes, its bytes are those of the plain codec."""
    fast, plain = pair(name)
    out = at_byte(torch.full((plain.encoded_bytes(values.numel()),), 7, dtype=torch.uint8), offset)
    fast.encode(values, out)
    assert bits(encode(plain, values)) == bits(out)


@each_dense
@prop
@given(size=st.sampled_from(SIZES), seed=st.integers(0, 1000), offset=st.integers(0, 5), data=st.data())
def test_decoding_has_the_same_bits(name: str, size: int, seed: int, offset: int, data: st.DataObject) -> None:
    """Any part of any payload that passes the check decodes to the plain codec's numbers, wherever it lies."""
    fast, plain = pair(name)
    payload = at_byte(hostile(name, size, seed), offset)
    start = 256 * data.draw(st.integers(0, size // 256))
    expected, decoded = torch.empty(size - start), torch.empty(size - start)
    plain.decode_range(payload, size, start, expected)
    fast.decode_range(payload, size, start, decoded)
    assert bits(expected) == bits(decoded)


@each_dense
@prop
@given(size=st.sampled_from(SIZES), seed=st.integers(0, 1000), offset=st.integers(0, 5))
def test_norms_have_the_same_bits(name: str, size: int, seed: int, offset: int) -> None:
    """The norm of any payload that passes the check is the same to the last bit."""
    fast, plain = pair(name)
    payload = at_byte(hostile(name, size, seed), offset)
    assert squares.norm(plain, payload, size).hex() == squares.norm(fast, payload, size).hex()


@each_dense
@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 200, 513])
def test_numbers_that_are_not_finite_are_refused(name: str, bad: float, place: int) -> None:
    """Wherever one is, the payload is refused, and error feedback and moves say so too."""
    fast, _ = pair(name)
    values = torch.ones(514).index_fill(0, torch.tensor([place]), bad)
    with pytest.raises(CodecError, match="finite"):
        fast.check(encode(fast, values), 514)
    assert not compensate(fast, values, torch.ones(514)).finite
    with pytest.raises(CodecError):
        encode_move(fast, values, torch.ones(514))


# --- Error feedback and moves.


@each_dense
@prop
@given(data=st.data(), has_residual=st.booleans(), is_difference=st.booleans())
def test_error_feedback_has_the_same_bits(
    name: str, data: st.DataObject, has_residual: bool, is_difference: bool
) -> None:
    """The payload, what it decodes to and what it lacks are those of the plain way; what is given is not changed."""
    fast, plain = pair(name)
    values = data.draw(numbers())
    residual = data.draw(numbers(size=values.numel())) if has_residual else None
    minus = data.draw(numbers(size=values.numel())) if is_difference else None
    before = bits(values), bits(residual), bits(minus)
    expected, encoded = (compensate(each, values, residual, minus=minus) for each in (plain, fast))
    assert expected.finite == encoded.finite
    assert bits(expected.decode()) == bits(encoded.decode())
    assert bits(expected.residual) == bits(encoded.residual)
    if expected.finite:
        assert bits(expected.payload) == bits(encoded.payload)
    assert before == (bits(values), bits(residual), bits(minus))


@each_dense
@prop
@given(data=st.data(), in_place=st.booleans())
def test_moves_have_the_same_bits(name: str, data: st.DataObject, in_place: bool) -> None:
    """A difference has the plain way's bytes, and both sides move to the same place, in place or not."""
    fast, plain = pair(name)
    values = data.draw(numbers(largest_exponent=120))
    start = data.draw(numbers(size=values.numel(), largest_exponent=120))
    expected, sender, receiver = start.clone(), start.clone(), start.clone()
    moved, followed = (sender, receiver) if in_place else (torch.empty_like(start), torch.empty_like(start))
    cuts = sorted(data.draw(st.lists(st.integers(0, values.numel()), max_size=4)))
    sizes = [end - first for first, end in pairwise([0, *cuts, values.numel()])]
    copies = [torch.empty(size) for size in sizes]
    payload = encode_move(plain, values, expected)
    assert bits(payload) == bits(encode_move(fast, values, sender, moved))
    follow_move(fast, payload, receiver, followed, copies)
    assert bits(expected) == bits(moved) == bits(followed) == bits(torch.cat(copies))
    if not in_place:
        assert bits(start) == bits(sender) == bits(receiver)


@each_dense
@pytest.mark.parametrize("place", [3, 513])
def test_a_move_beyond_float32_is_refused(name: str, place: int) -> None:
    """A difference that is finite and leads to infinity is refused, in full blocks as in the last one."""
    fast, plain = pair(name)
    reference = torch.zeros(514).index_fill(0, torch.tensor([place]), 3e38)
    with pytest.raises(CodecError, match="beyond"):
        follow_move(fast, encode(plain, reference), reference)


# --- Ordered momentum.


@each_dense
@prop
@given(
    w=numbers(),
    history=st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 2), st.integers(0, 1000)), max_size=4
    ),
)
def test_following_decisions_has_the_same_bits(
    name: str, w: torch.Tensor, history: list[tuple[int, int, int, int]]
) -> None:
    """Parameters and momentum after any pushes and bins are those of the plain way."""
    fast, plain = pair(name)
    ends = [FragmentValues(w.clone(), RULE) for _ in range(2)]
    for before, late, after, seed in history:
        decision = Decision(
            outcome=Outcome.APPLIED,
            reason="",
            bins_opened_before=before,
            contribution=Contribution(bins_late=late, share=1 / 3),
            bins_opened_after=after,
        )
        payload = hostile(name, w.numel(), seed)
        for values, written in zip(ends, (fast, plain), strict=True):
            values.follow(decision, written, payload)
    expected, followed = (torch.cat((values.w, values.state["u"])) for values in ends)
    # What overflowed is NaN for both, with a sign that no rule fixes.
    assert bits(torch.nan_to_num(expected)) == bits(torch.nan_to_num(followed))


def test_a_changed_rule_is_not_taken_for_ordered_momentum() -> None:
    """A rule that is made from ordered momentum and does something else with a push goes its own way."""

    class Unmoved(OrderedMomentum):
        def apply(self, numbers: object, g: torch.Tensor, push: Contribution) -> None:
            """Ignore the push."""

    fast, _ = pair("int8")
    values = FragmentValues(torch.zeros(512), Unmoved(rates=RULE.rates))
    decision = Decision(outcome=Outcome.APPLIED, reason="", contribution=Contribution(bins_late=0, share=1.0))
    values.follow(decision, fast, encode(fast, torch.ones(512)))
    assert not values.w.any()
    values.take_rule(RULE, None)
    values.follow(replace(decision, reason="again"), fast, encode(fast, torch.ones(512)))
    assert values.w.all()


# --- Loading.

SMALL_AND_LARGE = """
import sys, torch
from paceline_wire.codecs import codec, encode, kernels
values = torch.randn(kernels.LEAST_ELEMENTS)
encode(codec("int8"), values[1:])
print("numba" in sys.modules, kernels.ready(kernels.LEAST_ELEMENTS - 1))
first = encode(codec("int8"), values)
loaded = kernels.load()
print(loaded is not None, torch.equal(first, encode(codec("int8"), values)))
"""


def printed(script: str, **variables: str) -> list[str]:
    """Return the lines that a fresh interpreter prints."""
    environment = {**os.environ, **variables}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_small_fragments_do_not_load_numba() -> None:
    """Numba is imported for the first large fragment, which does not wait for it and has the same bytes."""
    assert printed(SMALL_AND_LARGE) == ["False None", "True True"]


def test_without_a_compiler_everything_goes_the_plain_way() -> None:
    """Where numba may not compile, nothing is loaded, and large fragments are encoded all the same."""
    assert printed(SMALL_AND_LARGE, NUMBA_DISABLE_JIT="1") == ["False None", "False True"]
