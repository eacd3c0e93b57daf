"""The blockwise codecs' passes over a whole fragment on a GPU: torch operations, compiled where that can be.

`loops` does the same on the processor. torch.compile makes kernels of these functions where Triton is, in a thread of
its own that begins with the first large fragment; until then, and without it, torch runs operation by operation. What
comes out is the same in every bit: divisions, which compilers for GPUs round otherwise, stay outside of what is
compiled, and v * step is exact, so that a fused multiply-add changes nothing. What was compiled is tried against the
operations before it is used.
"""

import logging
import threading
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple, TypeVar

import torch
from threadpoolctl import threadpool_limits

from paceline_wire.codecs.base import BLOCK_ELEMENTS
from paceline_wire.codecs.blockwise import BlockwiseCodec, Fp4Codec, Int4Codec, Int8Codec, blocks_of
from paceline_wire.codecs.buffers import byte_view, require_encodable, typed_view

_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")

LEAST_BLOCKS = 256
"""Blocks from which the compiled passes are used: fewer take no time, and each other shape would be compiled anew."""

_TRIED_MAGNITUDES = (1.0, 0.0, 1e-3, 1e-42, 1e-36, 1e20)
"""Of the numbers on which compiled passes are tried, block after block: ordinary, zero, subnormal, nearly so, large."""

# Shapes: n elements in B blocks of E = BLOCK_ELEMENTS, the last one padded with zeros; C code bytes in a block.


class _Passes(NamedTuple):
    combined: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    quantized: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    followed: Callable[..., torch.Tensor]


def compensate(
    codec: BlockwiseCodec, values: torch.Tensor, minus: torch.Tensor | None, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode c = values - minus + residual (contiguous float32 [n] each, the last two if given).

    Returns:
        The payload (uint8 [m]), and c less what it decodes to (float32 [n]).

    Raises:
        InvalidInputError: values are not as said.
    """
    return _done(values, lambda passes: _compensated(passes, codec, values, minus, residual))


def follow_move(codec: BlockwiseCodec, payload: torch.Tensor, reference: torch.Tensor, moved: torch.Tensor) -> bool:
    """Write reference plus what a checked payload decodes to (contiguous float32 [n] each) to moved.

    Returns:
        Whether moved is finite.
    """
    return _done(reference, lambda passes: _moved(passes, codec, payload, reference, moved))


def _done(values: torch.Tensor, work: Callable[[_Passes], _Result]) -> _Result:
    """Do work on values with the passes that can be had now; once more, by operations, if compiled ones fail."""
    passes = _passes(values.device, values.numel())
    try:
        return work(passes)
    except Exception:
        if not _gave_up(passes, values.device):
            raise
        return work(_OPERATIONS)


def _compensated(
    passes: _Passes,
    codec: BlockwiseCodec,
    values: torch.Tensor,
    minus: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    num_elements = values.numel()
    payload = torch.empty(codec.encoded_bytes(num_elements), dtype=torch.uint8, device=values.device)
    require_encodable(codec.name, values, payload, payload.numel())
    others = (None if other is None else blocks_of(other) for other in (minus, residual))
    blocks, absmax = passes.combined(blocks_of(values), *others)
    scales, inverses = codec.factors(absmax)
    codes, lost = passes.quantized(codec, blocks, inverses, codec.steps(scales))
    out_scales, out_codes = codec.split(payload, num_elements)
    out_scales.copy_(byte_view(scales))
    out_codes.copy_(codes)
    return payload, lost.view(-1)[:num_elements]


def _moved(
    passes: _Passes, codec: BlockwiseCodec, payload: torch.Tensor, reference: torch.Tensor, moved: torch.Tensor
) -> bool:
    num_elements = reference.numel()
    scales, codes = codec.split(payload, num_elements)
    steps = codec.steps(typed_view(scales, torch.float32))
    followed = passes.followed(codec, codes, steps, blocks_of(reference))
    moved.copy_(followed.view(-1)[:num_elements])
    return num_elements == 0 or bool(torch.stack(torch.aminmax(moved)).isfinite().all())


def _combined(
    values: torch.Tensor, minus: torch.Tensor | None, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values - minus + residual (float32 [B, E] each), and the largest magnitude of each block (float32 [B])."""
    combined = values if minus is None else values - minus
    combined = combined if residual is None else combined + residual
    return combined, combined.abs().amax(dim=1)


def _quantized(
    codec: BlockwiseCodec, blocks: torch.Tensor, inverses: torch.Tensor, steps: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The code bytes (int8 [B, C]) of blocks (float32 [B, E]), and what they lack of them (float32 [B, E])."""
    codes = codec.codes(blocks * inverses[:, None])
    lost = blocks - codec.integers(_sign_extended(codes) if codec.packed else codes) * steps[:, None]
    if not codec.packed:
        return codes, lost
    half = BLOCK_ELEMENTS // 2
    return (codes[:, half:] << 4) | (codes[:, :half] & 0x0F), lost


def _followed(codec: BlockwiseCodec, codes: torch.Tensor, steps: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
    """Held (float32 [B, E]) plus what code bytes (int8 [B, C]) stand for, float32 [B, E]."""
    if codec.packed:
        codes = torch.cat((_sign_extended(codes), codes >> 4), dim=1)
    return codec.integers(codes) * steps[:, None] + held


def _sign_extended(codes: torch.Tensor) -> torch.Tensor:
    """The low 4 bits of codes (int8 [...]) as numbers of -8..7."""
    return (codes << 4) >> 4


# --- Compiling.

_OPERATIONS = _Passes(_combined, _quantized, _followed)
_lock = threading.Lock()
_begun: set[torch.device] = set()
_compiled: dict[torch.device, _Passes] = {}


def _passes(device: torch.device, num_elements: int) -> _Passes:
    """The passes that can be had now. Returns at once; the first call for many elements on a GPU begins to compile."""
    if device.type == "cpu" or num_elements < LEAST_BLOCKS * BLOCK_ELEMENTS:
        return _OPERATIONS
    with _lock:
        if device not in _begun:
            _begun.add(device)
            threading.Thread(target=_load, args=(device,), name="paceline-compile", daemon=True).start()
        return _compiled.get(device, _OPERATIONS)


def _gave_up(passes: _Passes, device: torch.device) -> bool:
    """Whether it was compiled passes that failed; nobody gets them any more."""
    if passes is _OPERATIONS:
        return False
    _log.warning("what torch compiled for %s failed; it encodes there operation by operation", device, exc_info=True)
    with _lock:
        _compiled.pop(device, None)
    return True


def _load(device: torch.device) -> None:
    if find_spec("triton") is None:
        _log.info("Triton is not installed, so torch encodes and decodes on %s operation by operation", device)
        return
    # Torch compiles anew for a thread with another number of threads below it; those that encode have none.
    torch.get_num_threads()
    threadpool_limits(limits=1, user_api="openmp")
    try:
        passes = compiled(device)
        with _lock:
            _compiled[device] = passes
    except Exception:  # noqa: BLE001  # whatever a compiler raises: the operations do the same
        _log.warning("torch cannot compile for %s and encodes there operation by operation", device, exc_info=True)


def compiled(device: torch.device) -> _Passes:
    """Compile the passes for a device, and try them against the operations.

    Raises:
        RuntimeError: A bit differs.
        Exception: What the compiler raises.
    """
    passes = _Passes(combined=_kernel(_combined), quantized=_kernel(_quantized), followed=_kernel(_followed))
    generator = torch.Generator().manual_seed(0)
    for codec in (Int8Codec(), Int4Codec(), Fp4Codec()):
        for num_blocks in (LEAST_BLOCKS, LEAST_BLOCKS + 1):
            magnitudes = torch.tensor(_TRIED_MAGNITUDES).repeat(num_blocks)[:num_blocks, None]
            drawn = (torch.randn(num_blocks, BLOCK_ELEMENTS, generator=generator) * magnitudes for _ in range(3))
            _require_same(passes, codec, *(each.to(device) for each in drawn))
    return passes


def _kernel(operations: Callable[..., Any]) -> Callable[..., Any]:
    # With more than one thread the compiler starts processes.
    compiled: Callable[..., Any] = torch.compile(
        operations, dynamic=True, fullgraph=True, options={"compile_threads": 1}
    )
    return compiled


def _require_same(
    passes: _Passes, codec: BlockwiseCodec, values: torch.Tensor, minus: torch.Tensor, residual: torch.Tensor
) -> None:
    for others in ((minus, residual), (minus, None), (None, residual), (None, None)):
        _require_equal(passes.combined(values, *others), _combined(values, *others))
    scales, inverses = codec.factors(values.abs().amax(dim=1))
    quantized = _quantized(codec, values, inverses, codec.steps(scales))
    _require_equal(passes.quantized(codec, values, inverses, codec.steps(scales)), quantized)
    following = (codec, quantized[0], codec.steps(scales), minus)
    _require_equal((passes.followed(*following),), (_followed(*following),))


def _require_equal(given: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    if not all(torch.equal(*pair) for pair in zip(given, expected, strict=True)):
        raise RuntimeError("what torch has compiled gives other bits than its operations")
