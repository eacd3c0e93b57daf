"""The codecs' arithmetic as loops that numba compiles to vector instructions. Imports numba: `kernels` loads it lazily.

`blockwise` and `floats` say what is computed, `feedback`, `moves`, `squares` and the server's fragments what else is
done on the way. Any difference in a bit is an error. One pass over memory does all there is to do: everything goes
block by block of E = 256 elements, and what is between the steps stays in a core's first cache.

What lets the compiler vectorize, and fuse nothing: a slice for each block and loops of constant length over it, no
run-time sizes inside; int32 said at every step where numbers are seen as bits (numba's own integers have 64); sums and
maxima of integers only, whose order does not matter; fastmath off, so that every operation rounds once.

All compiled code is in this one module: numba's cache sees changes of the file that a kernel is in, and of no other.

Shapes: n elements in B = ceil(n / E) blocks. `scales` is float32 [B], or [0] for the codecs without. `codes` is uint8
[m]: each block's code bytes (1024 for fp32, 256 for int8 ...) one after the other; fp32 and bf16 end with the last
element, and start at an address that suits a float.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, register_jitable
from numba.np import arrayobj

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Bytes = npt.NDArray[np.uint8]
_Function = TypeVar("_Function", bound=Callable[..., Any])

FP32, BF16, INT8, INT4, FP4 = range(5)
"""The codecs' numbers here. A kernel asks for the codec once a block, which costs nothing, and is compiled once."""

_E, _HALF, _LANES = 256, 128, 16
_CACHE_LINE_BYTES = 64
_MAGNITUDE = np.int32(0x7FFFFFFF)
_INFINITY = np.int32(0x7F800000)
_SCALE_MASK = np.int32(~0x7F)
_ZERO, _ONE = np.float32(0), np.float32(1)
_SMALLEST_ABSMAX = np.float32(2.0**-119)
_DIVISOR_INT8, _DIVISOR_INT4 = np.float32(127), np.float32(7)
_STEP_FP4 = np.float32(2.0**-6)
# y + 1.5 * 2^23 is rounded to a whole number, ties to even, whose two's complement are the sum's lowest bits.
_TO_INTEGER = np.float32(1.5 * 2.0**23)


def _jit(function: _Function) -> _Function:
    """Let compiled functions call this one."""
    registered: _Function = register_jitable(error_model="numpy")(function)
    return registered


def _inlined(function: _Function) -> _Function:
    """Put this function's own code into compiled functions that call it.

    For the two that choose by codec: a fifth to a third less time. Whatever they call is compiled by itself: if all of
    it were inlined, compiling would take ten times as long.
    """
    registered: _Function = register_jitable(error_model="numpy", inline="always")(function)
    return registered


def _cast(source: Any, target: Any) -> Callable[[Any, Any], Any]:
    """The typing and code of a function that sees a number's bits as another type's."""

    def typed(_context: Any, _number: Any) -> Any:
        def code(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            return builder.bitcast(arguments[0], context.get_value_type(target))

        return target(source), code

    return typed


_bits: Callable[[np.float32], np.int32] = intrinsic(_cast(types.float32, types.int32))
_float: Callable[[np.int32], np.float32] = intrinsic(_cast(types.int32, types.float32))


def _scratch(element: Any, count: int) -> Callable[[], Any]:
    """A function that gives a kernel an array of its own on the stack, of any content, as long as the kernel runs.

    np.empty would ask numba's counted memory for it, which the kernels do without.
    """

    def typed(_context: Any) -> Any:
        array = types.Array(element, 1, "C")

        def code(context: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
            value, index = context.get_value_type(element), context.get_value_type(types.intp)
            num_bytes = context.get_abi_sizeof(value)
            memory = cgutils.alloca_once(builder, ir.ArrayType(value, count))
            memory.align = _CACHE_LINE_BYTES
            made = arrayobj.make_array(array)(context, builder)
            arrayobj.populate_array(
                made,
                data=builder.bitcast(memory, value.as_pointer()),
                shape=[index(count)],
                strides=[index(num_bytes)],
                itemsize=index(num_bytes),
                meminfo=None,
            )
            return made._getvalue()

        return array(), code

    made: Callable[[], Any] = intrinsic(typed)
    return made


_block: Callable[[], Floats] = _scratch(types.float32, _E)
_sums: Callable[[], Doubles] = _scratch(types.float64, _LANES)


@_jit
def _block_bytes(kind: int) -> int:
    if kind == FP32:
        return 4 * _E
    if kind == BF16:
        return 2 * _E
    return _E if kind == INT8 else _HALF


# --- One block: codes to numbers.


@_jit
def _decode_int8(codes: Bytes, step: np.float32, out: Floats) -> None:
    c, o = codes[:_E], out[:_E]
    for i in range(_E):
        o[i] = np.float32(np.int8(c[i])) * step


@_jit
def _decode_int4(codes: Bytes, step: np.float32, out: Floats) -> None:
    c, low, high = codes[:_HALF], out[:_HALF], out[_HALF:_E]
    for i in range(_HALF):
        low[i] = np.float32(np.int8(c[i] << 4) >> 4) * step
        high[i] = np.float32(np.int8(c[i]) >> 4) * step


@_jit
def _power(code: np.int32) -> np.int32:
    """The integer that the lower 4 bits of an fp4 code stand for."""
    magnitude = np.int32(np.int32(1 << (code & 7)) >> 1)
    return np.int32(-magnitude) if code & 8 else magnitude


@_jit
def _decode_fp4(codes: Bytes, step: np.float32, out: Floats) -> None:
    c, low, high = codes[:_HALF], out[:_HALF], out[_HALF:_E]
    for i in range(_HALF):
        low[i] = np.float32(_power(np.int32(c[i]))) * step
        high[i] = np.float32(_power(np.int32(c[i] >> 4))) * step


@_jit
def _decode_bf16(codes: Bytes, out: Floats) -> None:
    v, o = codes.view(np.uint16)[:_E], out[:_E]
    for i in range(_E):
        o[i] = _float(np.int32(np.int32(v[i]) << 16))


@_jit
def _copy(source: Floats, out: Floats) -> None:
    s, o = source[:_E], out[:_E]
    for i in range(_E):
        o[i] = s[i]


@_inlined
def _decode_block(kind: int, scale: np.float32, codes: Bytes, out: Floats) -> None:
    if kind == INT8:
        _decode_int8(codes, scale, out)
    elif kind == INT4:
        _decode_int4(codes, scale, out)
    elif kind == FP4:
        _decode_fp4(codes, scale * _STEP_FP4, out)
    elif kind == BF16:
        _decode_bf16(codes, out)
    else:
        _copy(codes.view(np.float32), out)


# --- One block: numbers to codes.


@_jit
def _absmax(x: Floats) -> np.float32:
    """The largest magnitude; NaN is above infinity. As integers: they have an order that a maximum can be split by."""
    v, top = x[:_E], np.int32(0)
    for i in range(_E):
        top = max(top, np.int32(_bits(v[i]) & _MAGNITUDE))
    return _float(top)


@_jit
def _short_quotient(absmax: np.float32, divisor: np.float32) -> np.float32:
    return _float(np.int32(_bits(absmax / divisor) & _SCALE_MASK))


@_jit
def _encode_int8(x: Floats, inverse: np.float32, codes: Bytes) -> None:
    v, c = x[:_E], codes[:_E]
    for i in range(_E):
        c[i] = np.uint8(_bits(v[i] * inverse + _TO_INTEGER))


@_jit
def _encode_int4(x: Floats, inverse: np.float32, codes: Bytes) -> None:
    low, high, c = x[:_HALF], x[_HALF:_E], codes[:_HALF]
    for i in range(_HALF):
        lower, upper = _bits(low[i] * inverse + _TO_INTEGER), _bits(high[i] * inverse + _TO_INTEGER)
        c[i] = np.uint8((lower & 15) | (upper << 4))


@_jit
def _fp4_code(y: np.float32) -> np.int32:
    upper = np.int32(_bits(y) >> 22)
    halves = np.int32(min(max(np.int32(upper & 0x1FF), np.int32(251)), np.int32(266)) - 251)
    magnitude = max(np.int32(halves >> 1), min(halves, np.int32(1)))
    return np.int32(magnitude | ((upper >> 6) & 8))


@_jit
def _encode_fp4(x: Floats, inverse: np.float32, codes: Bytes) -> None:
    low, high, c = x[:_HALF], x[_HALF:_E], codes[:_HALF]
    for i in range(_HALF):
        c[i] = np.uint8(_fp4_code(low[i] * inverse) | (_fp4_code(high[i] * inverse) << 4))


@_jit
def _encode_bf16(x: Floats, codes: Bytes) -> None:
    v, c = x[:_E], codes.view(np.uint16)[:_E]
    for i in range(_E):
        bits = _bits(v[i])
        rounded = np.int32(np.int32(bits + 0x7FFF) + np.int32((bits >> 16) & 1)) >> 16
        c[i] = np.uint16(0x7FC0 if np.int32(bits & _MAGNITUDE) > _INFINITY else rounded)


@_jit
def _scale(kind: int, x: Floats) -> np.float32:
    absmax = _absmax(x)
    if absmax < _SMALLEST_ABSMAX:
        return _ZERO
    if kind == INT8:
        return _short_quotient(absmax, _DIVISOR_INT8)
    return _short_quotient(absmax, _DIVISOR_INT4) if kind == INT4 else absmax


@_inlined
def _encode_block(kind: int, x: Floats, codes: Bytes) -> np.float32:
    """Write the codes; returns the scale, 0 if the codec has none."""
    if kind == FP32:
        _copy(x, codes.view(np.float32))
        return _ZERO
    if kind == BF16:
        _encode_bf16(x, codes)
        return _ZERO
    scale = _scale(kind, x)
    inverse = _ZERO if scale == 0 else _ONE / (scale * _STEP_FP4 if kind == FP4 else scale)
    if kind == INT8:
        _encode_int8(x, inverse, codes)
    elif kind == INT4:
        _encode_int4(x, inverse, codes)
    else:
        _encode_fp4(x, inverse, codes)
    return scale


# --- One block: sums of squares.


@_jit
def _squares_int8(codes: Bytes) -> np.int32:
    c, total = codes[:_E], np.int32(0)
    for i in range(_E):
        integer = np.int32(np.int8(c[i]))
        total = np.int32(total + np.int32(integer * integer))
    return total


@_jit
def _squares_int4(codes: Bytes) -> np.int32:
    c, total = codes[:_HALF], np.int32(0)
    for i in range(_HALF):
        low, high = np.int32(np.int8(c[i] << 4) >> 4), np.int32(np.int8(c[i]) >> 4)
        total = np.int32(total + np.int32(low * low) + np.int32(high * high))
    return total


@_jit
def _squares_fp4(codes: Bytes) -> np.int32:
    c, total = codes[:_HALF], np.int32(0)
    for i in range(_HALF):
        low, high = _power(np.int32(c[i])), _power(np.int32(c[i] >> 4))
        total = np.int32(total + np.int32(low * low) + np.int32(high * high))
    return total


@_jit
def _squares_floats(x: Floats, lanes: Doubles) -> np.float64:
    """In the order that `squares` says: any other would round otherwise."""
    sums = lanes[:_LANES]
    sums[:] = 0
    for row in range(_E // _LANES):
        v = x[row * _LANES : (row + 1) * _LANES]
        for i in range(_LANES):
            sums[i] += np.float64(v[i]) * np.float64(v[i])
    half = _LANES // 2
    while half:
        for i in range(half):
            sums[i] += sums[i + half]
        half //= 2
    return np.float64(sums[0])


@_jit
def _squared(integers: np.int32, step: np.float32) -> np.float64:
    """The sum of (v step)^2 from that of v^2; the step's square is exact."""
    return np.float64(integers) * (np.float64(step) * np.float64(step))


# --- One block: what else is done with its numbers.


@_jit
def _open_bin(w: Floats, u: Floats, beta: np.float32) -> None:
    v, m = w[:_E], u[:_E]
    for i in range(_E):
        m[i] = m[i] * beta
        v[i] = v[i] - m[i]


@_jit
def _enter(
    w: Floats,
    u: Floats,
    g: Floats,
    u_rate: np.float32,
    w_rate: np.float32,
    opens_before: bool,
    before: np.float32,
    opens_after: bool,
    after: np.float32,
) -> None:
    """Let g enter, in one loop with the bins next to it, which costs them nothing."""
    v, m, x = w[:_E], u[:_E], g[:_E]
    for i in range(_E):
        momentum, parameter = m[i], v[i]
        if opens_before:
            momentum = momentum * before
            parameter = parameter - momentum
        momentum = momentum + x[i] * u_rate
        parameter = parameter - x[i] * w_rate
        if opens_after:
            momentum = momentum * after
            parameter = parameter - momentum
        m[i] = momentum
        v[i] = parameter


@_jit
def _add(x: Floats, y: Floats, out: Floats) -> None:
    a, b, o = x[:_E], y[:_E], out[:_E]
    for i in range(_E):
        o[i] = a[i] + b[i]


@_jit
def _subtract(x: Floats, y: Floats, out: Floats) -> None:
    a, b, o = x[:_E], y[:_E], out[:_E]
    for i in range(_E):
        o[i] = a[i] - b[i]


@_jit
def _move(d: Floats, reference: Floats, moved: Floats) -> np.int32:
    """Write reference + d, by way of d: a loop over arrays that may be one and the same is not vectorized.

    Returns the largest magnitude's bits, as `_absmax` has them.
    """
    a, b, o, top = d[:_E], reference[:_E], moved[:_E], np.int32(0)
    for i in range(_E):
        a[i] = b[i] + a[i]
        top = max(top, np.int32(_bits(a[i]) & _MAGNITUDE))
    for i in range(_E):
        o[i] = a[i]
    return top


# --- Kernels: what is done with a whole fragment.


def encode(kind: int, values: Floats, scales: Floats, codes: Bytes) -> None:
    """Write the scales and codes of values (float32 [n])."""
    size = _block_bytes(kind)
    for block in range(len(values) // _E):
        scale = _encode_block(kind, values[block * _E : (block + 1) * _E], codes[block * size : (block + 1) * size])
        if kind >= INT8:
            scales[block] = scale


def decode(kind: int, scales: Floats, codes: Bytes, out: Floats) -> None:
    """Write the numbers (float32 [n]) that scales and codes stand for."""
    size = _block_bytes(kind)
    for block in range(len(out) // _E):
        scale = scales[block] if kind >= INT8 else _ONE
        _decode_block(kind, scale, codes[block * size : (block + 1) * size], out[block * _E : (block + 1) * _E])


def squares(kind: int, scales: Floats, codes: Bytes, out: Doubles) -> None:
    """Write the sum of the squares of each block's numbers (float64 [B])."""
    x, lanes = _block(), _sums()
    size = _block_bytes(kind)
    for block in range(len(out)):
        c = codes[block * size : (block + 1) * size]
        if kind < INT8:
            _decode_block(kind, _ONE, c, x)
            out[block] = _squares_floats(x, lanes)
        elif kind == INT8:
            out[block] = _squared(_squares_int8(c), scales[block])
        elif kind == INT4:
            out[block] = _squared(_squares_int4(c), scales[block])
        else:
            out[block] = _squared(_squares_fp4(c), scales[block] * _STEP_FP4)


def step(
    kind: int,
    scales: Floats,
    codes: Bytes,
    w: Floats,
    u: Floats,
    before: Floats,
    u_rate: np.float32,
    w_rate: np.float32,
    after: Floats,
) -> None:
    """Let a push g enter ordered momentum (w, u: float32 [n]), and bins open before and after it.

    Each of before: u *= it, w -= u. The push: u += u_rate g, w -= w_rate g. Each of after: as before.
    """
    g = _block()
    last_before = before[-1] if len(before) else _ZERO
    first_after = after[0] if len(after) else _ZERO
    size = _block_bytes(kind)
    for block in range(len(w) // _E):
        scale = scales[block] if kind >= INT8 else _ONE
        _decode_block(kind, scale, codes[block * size : (block + 1) * size], g)
        v, m = w[block * _E : (block + 1) * _E], u[block * _E : (block + 1) * _E]
        for opened in range(len(before) - 1):
            _open_bin(v, m, before[opened])
        _enter(v, m, g, u_rate, w_rate, len(before) > 0, last_before, len(after) > 0, first_after)
        for opened in range(1, len(after)):
            _open_bin(v, m, after[opened])


def compensate(
    kind: int,
    values: Floats,
    minus: Floats,
    residual: Floats,
    scales: Floats,
    codes: Bytes,
    lost: Floats,
) -> None:
    """Encode c = values - minus + residual; write c less what that decodes to (float32 [n] each).

    minus and residual may be empty: then c is without them.
    """
    c, d, size = _block(), _block(), _block_bytes(kind)
    for block in range(len(values) // _E):
        first, end = block * _E, (block + 1) * _E
        if len(minus) and len(residual):
            _subtract(values[first:end], minus[first:end], d)
            _add(d, residual[first:end], c)
        elif len(minus):
            _subtract(values[first:end], minus[first:end], c)
        elif len(residual):
            _add(values[first:end], residual[first:end], c)
        else:
            _copy(values[first:end], c)
        block_codes = codes[block * size : (block + 1) * size]
        scale = _encode_block(kind, c, block_codes)
        if kind >= INT8:
            scales[block] = scale
        _decode_block(kind, scale, block_codes, d)
        _subtract(c, d, lost[first:end])


def move(kind: int, values: Floats, reference: Floats, scales: Floats, codes: Bytes, moved: Floats) -> bool:
    """Encode values - reference; write reference plus what that decodes to (float32 [n] each).

    moved may be reference itself. Returns whether all of it is finite.
    """
    x, size, top = _block(), _block_bytes(kind), np.int32(0)
    for block in range(len(values) // _E):
        first, end = block * _E, (block + 1) * _E
        _subtract(values[first:end], reference[first:end], x)
        block_codes = codes[block * size : (block + 1) * size]
        scale = _encode_block(kind, x, block_codes)
        if kind >= INT8:
            scales[block] = scale
        _decode_block(kind, scale, block_codes, x)
        top = max(top, _move(x, reference[first:end], moved[first:end]))
    return bool(top < _INFINITY)


def follow(kind: int, scales: Floats, codes: Bytes, reference: Floats, moved: Floats, copy: Floats) -> bool:
    """Write reference plus what scales and codes stand for (float32 [n] each), and that once more to copy.

    moved may be reference itself, and copy may be empty: nothing is written to it then. Returns whether all of it is
    finite.
    """
    x, size, top = _block(), _block_bytes(kind), np.int32(0)
    for block in range(len(moved) // _E):
        first, end = block * _E, (block + 1) * _E
        scale = scales[block] if kind >= INT8 else _ONE
        _decode_block(kind, scale, codes[block * size : (block + 1) * size], x)
        top = max(top, _move(x, reference[first:end], moved[first:end]))
        if len(copy):
            _copy(x, copy[first:end])
    return bool(top < _INFINITY)
