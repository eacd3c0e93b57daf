"""The dense codecs with compiled loops: what a plain codec does, bit for bit, in one pass over memory.

The plain codec stays what defines the bytes. It does what the loops do not: small tensors, a last block that is not
full, and everything as long as the kernels are not there. The methods beyond the codec interface do in one pass what
their callers (`feedback`, `moves`, the server's fragments) would otherwise do in several, on a GPU by `fused`; they
return None where the caller must go its own, plain way.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from paceline_wire.codecs import fused, kernels
from paceline_wire.codecs.base import BLOCK_ELEMENTS, Codec
from paceline_wire.codecs.blockwise import BlockwiseCodec
from paceline_wire.codecs.buffers import (
    byte_view,
    require_encodable,
    require_flat,
    require_payload,
    require_range,
    typed_view,
)
from paceline_wire.codecs.kernels import Kernels
from paceline_wire.codecs.parts import Parts, runs, whole
from paceline_wire.codecs.whole import encode

_NUMBERS = {"fp32": 0, "bf16": 1, "int8": 2, "int4": 3, "fp4": 4}
_BLOCK_BYTES = {"fp32": 1024, "bf16": 512, "int8": 256, "int4": 128, "fp4": 128}
_FLOAT_BYTES = 4


class Compensated(NamedTuple):
    """What error feedback makes of values: the payload (uint8 [m]), and what that lacks (float32 [n])."""

    payload: torch.Tensor
    lost: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class MomentumStep:
    """What a push g does to parameters w and a momentum u.

    Attributes:
        before: The coefficients of the bins that open first; each: u *= it, w -= u.
        u_rate: u += u_rate g.
        w_rate: w -= w_rate g.
        after: The coefficients of the bins that open last.
    """

    before: Sequence[float]
    u_rate: float
    w_rate: float
    after: Sequence[float]


class CompiledCodec:
    """A dense codec that uses the compiled loops where they are ready.

    Args:
        plain: The codec that defines the bytes.
    """

    def __init__(self, plain: Codec) -> None:
        self.plain = plain
        self.name = plain.name
        self.lossless = plain.lossless
        self.sparse = plain.sparse
        self.residual_decay = plain.residual_decay
        self._number = _NUMBERS[plain.name]
        self._block_bytes = _BLOCK_BYTES[plain.name]
        self._scaled = plain.name not in ("fp32", "bf16")

    def encoded_bytes(self, num_elements: int) -> int:
        """Size in bytes of the encoding of that many elements."""
        return self.plain.encoded_bytes(num_elements)

    def encode(self, values: torch.Tensor, out: torch.Tensor) -> None:
        """Write the encoding of values (float32 [n]) to out (uint8 [encoded_bytes(n)]).

        Raises:
            InvalidInputError: values and out do not fit each other.
        """
        compiled = self._kernels(values.numel(), values, out)
        if compiled is None:
            self.plain.encode(values, out)
            return
        require_encodable(self.name, values, out, self.encoded_bytes(values.numel()))
        coded, full = self._split(out, values.numel()), _full(values.numel())
        compiled.encode(self._number, values[:full].numpy(), coded.scales, coded.codes)
        coded.finish(encode(self.plain, values[full:]))

    def check(self, payload: torch.Tensor, num_elements: int) -> None:
        """Refuse a payload (uint8 [any]) that is not the finite encoding of num_elements elements.

        Raises:
            CodecError: The size is wrong, or some value would not be finite.
        """
        self.plain.check(payload, num_elements)

    def decode_range(self, payload: torch.Tensor, num_elements: int, start: int, out: torch.Tensor) -> None:
        """Decode elements start, start + 1, ... of a checked payload into out (float32 [m], start + m <= n).

        Raises:
            CodecError: The range or the payload's size does not fit num_elements.
        """
        compiled = self._kernels(out.numel(), out, payload)
        if compiled is None:
            self.plain.decode_range(payload, num_elements, start, out)
            return
        require_payload(self.name, payload, num_elements, self.encoded_bytes(num_elements))
        require_range(self.name, num_elements, start, out)
        coded, full, block = self._split(payload, num_elements), _full(out.numel()), start // BLOCK_ELEMENTS
        codes = coded.codes[block * self._block_bytes :]
        compiled.decode(self._number, coded.scales[block:], codes, out[:full].numpy())
        self.plain.decode_range(payload, num_elements, start + full, out[full:])

    def block_squares(self, payload: torch.Tensor, num_elements: int) -> torch.Tensor:
        """See `Codec.block_squares`.

        Raises:
            CodecError: The payload's size does not fit num_elements.
        """
        compiled = self._kernels(num_elements, payload)
        if compiled is None:
            return self.plain.block_squares(payload, num_elements)
        require_payload(self.name, payload, num_elements, self.encoded_bytes(num_elements))
        coded, full = self._split(payload, num_elements), num_elements // BLOCK_ELEMENTS
        sums = torch.empty(full, dtype=torch.float64)
        compiled.squares(self._number, coded.scales, coded.codes, sums.numpy())
        rest = num_elements % BLOCK_ELEMENTS
        return torch.cat((sums, self.plain.block_squares(coded.rest(), rest))) if rest else sums

    # --- Beyond the codec interface.

    def compensate(self, values: Parts, minus: Parts, residual: torch.Tensor | None) -> Compensated | None:
        """Encode c = values - minus + residual (float32 [n] each, the last two if given), and subtract that from c.

        Returns:
            The payload, and what it lacks; None if it cannot.

        Raises:
            InvalidInputError: A tensor of values is not contiguous float32 [any] without gradient.
        """
        if values[0].device.type != "cpu" and isinstance(self.plain, BlockwiseCodec):
            whole_minus = whole(minus) if minus else None
            return Compensated(*fused.compensate(self.plain, whole(values), whole_minus, residual))
        num_elements = sum(part.numel() for part in values)
        compiled = self._kernels(num_elements, *values, *minus, *(() if residual is None else (residual,)))
        if compiled is None:
            return None
        for part in values:
            require_flat(self.name, "values", part, torch.float32)
        if len(values) > 1 and len(minus) > 1:
            minus = (whole(minus),)
        scattered = values if len(values) > 1 else minus or values
        payload, lost = self._empty(num_elements), torch.empty(num_elements)
        coded, nothing = self._split(payload, num_elements), lost[:0]
        for run in runs(scattered):
            block, full = run.first // BLOCK_ELEMENTS, _full(run.end) - run.first
            added = run.read() if values is scattered else values[0][run.first : run.end]
            subtracted = run.read() if minus is scattered else (minus or (nothing,))[0][run.first : run.end]
            carried = nothing if residual is None else residual[run.first : run.end]
            compiled.compensate(
                self._number,
                added[:full].numpy(),
                subtracted[:full].numpy(),
                carried[:full].numpy(),
                coded.scales[block:],
                coded.codes[block * self._block_bytes :],
                lost[run.first : run.first + full].numpy(),
            )
        # What the last run has of a block that is not full.
        rest = added[full:] - subtracted[full:] if minus else added[full:]
        rest = rest if residual is None else rest + carried[full:]
        coded.finish(encode(self.plain, rest))
        lacked = lost[_full(num_elements) :]
        self.plain.decode_range(payload, num_elements, _full(num_elements), lacked)
        torch.sub(rest, lacked, out=lacked)
        return Compensated(payload, lost)

    def encode_move(
        self, values: torch.Tensor, reference: torch.Tensor, moved: torch.Tensor
    ) -> tuple[torch.Tensor, bool] | None:
        """Encode values - reference, and write reference plus what that decodes to (float32 [n] each) to moved.

        Returns:
            The payload and whether moved is finite; None if it cannot, and then nothing was written.

        Raises:
            InvalidInputError: values are not contiguous or need a gradient.
        """
        compiled = self._kernels(values.numel(), values, reference, moved)
        if compiled is None:
            return None
        full, payload = _full(values.numel()), self._empty(values.numel())
        require_encodable(self.name, values, payload, payload.numel())
        coded = self._split(payload, values.numel())
        finite = compiled.move(
            self._number,
            values[:full].numpy(),
            reference[:full].numpy(),
            coded.scales,
            coded.codes,
            moved[:full].numpy(),
        )
        coded.finish(encode(self.plain, values[full:] - reference[full:]))
        return payload, self._follow_rest(payload, reference, moved) and finite

    def follow_move(
        self, payload: torch.Tensor, reference: torch.Tensor, moved: torch.Tensor, copies: Sequence[torch.Tensor] = ()
    ) -> bool | None:
        """Write reference plus what a checked payload decodes to (float32 [n] each) to moved, and to copies if given.

        Args:
            payload: The payload.
            reference: The reference.
            moved: May be reference itself.
            copies: Each float32 [any], one behind the other n elements. Those too small for a loop are written last.

        Returns:
            Whether moved is finite; None if it cannot, and then nothing was written.
        """
        if reference.device.type != "cpu" and isinstance(self.plain, BlockwiseCodec) and not copies:
            return fused.follow_move(self.plain, payload, reference, moved)
        compiled = self._kernels(reference.numel(), payload, reference, moved, *copies)
        if compiled is None:
            return None
        coded, finite, nowhere = self._split(payload, reference.numel()), True, reference[:0]
        cut = runs(copies or (reference,))
        for run in cut:
            here, block, full = (
                slice(run.first, _full(run.end)),
                run.first // BLOCK_ELEMENTS,
                _full(run.end) - run.first,
            )
            copy = nowhere if run.inside is None or not copies else run.inside[:full]
            scales, codes = coded.scales[block:], coded.codes[block * self._block_bytes :]
            parts = (part.numpy() for part in (reference[here], moved[here], copy))
            finite &= compiled.follow(self._number, scales, codes, *parts)
        finite &= self._follow_rest(payload, reference, moved)
        for run in cut if copies else ():
            run.write(moved[run.first : run.end], 0 if run.inside is None else _full(run.end) - run.first)
        return finite

    def step(self, payload: torch.Tensor, w: torch.Tensor, u: torch.Tensor, step: MomentumStep) -> int:
        """Let a checked push enter w and u (float32 [n] each) in one pass.

        Returns:
            How many elements, from the first on, have been changed: the caller does the others.
        """
        compiled = self._kernels(w.numel(), payload, w, u)
        if compiled is None:
            return 0
        coded, full = self._split(payload, w.numel()), _full(w.numel())
        compiled.step(
            self._number,
            coded.scales,
            coded.codes,
            w[:full].numpy(),
            u[:full].numpy(),
            np.array(step.before, np.float32),
            np.float32(step.u_rate),
            np.float32(step.w_rate),
            np.array(step.after, np.float32),
        )
        return full

    def _follow_rest(self, payload: torch.Tensor, reference: torch.Tensor, moved: torch.Tensor) -> bool:
        full = _full(reference.numel())
        decoded = torch.empty_like(reference[full:])
        self.plain.decode_range(payload, reference.numel(), full, decoded)
        return bool(torch.add(decoded, reference[full:], out=moved[full:]).isfinite().all())

    def _kernels(self, num_elements: int, *tensors: torch.Tensor) -> Kernels | None:
        """The kernels, if they are ready and can be given these tensors."""
        usable = all(tensor.device.type == "cpu" and tensor.is_contiguous() for tensor in tensors)
        if usable and not self._scaled:
            usable = all(tensor.data_ptr() % _FLOAT_BYTES == 0 for tensor in tensors)
        return kernels.ready(num_elements) if usable else None

    def _empty(self, num_elements: int) -> torch.Tensor:
        return torch.empty(self.encoded_bytes(num_elements), dtype=torch.uint8)

    def _split(self, payload: torch.Tensor, num_elements: int) -> "_Coded":
        num_blocks = -(-num_elements // BLOCK_ELEMENTS) if self._scaled else 0
        return _Coded(payload, _FLOAT_BYTES * num_blocks, num_elements // BLOCK_ELEMENTS * self._block_bytes)


class _Coded:
    """A payload in the parts that kernels take.

    Attributes:
        scales: float32 [B], or [0].
        codes: uint8 [m].
    """

    def __init__(self, payload: torch.Tensor, num_scale_bytes: int, num_full_bytes: int) -> None:
        self._scale_bytes, self._code_bytes = payload[:num_scale_bytes], payload[num_scale_bytes:]
        # A copy if they start at any byte; whoever writes them calls finish.
        self._scales = typed_view(self._scale_bytes, torch.float32)
        self._num_full_bytes = num_full_bytes
        self.scales: npt.NDArray[np.float32] = self._scales.numpy()
        self.codes: npt.NDArray[np.uint8] = self._code_bytes.numpy()

    def rest(self) -> torch.Tensor:
        """The payload of the last block alone if that is not full; else an empty one."""
        codes = self._code_bytes[self._num_full_bytes :]
        return torch.cat((self._scale_bytes[-_FLOAT_BYTES:], codes)) if codes.numel() else codes

    def finish(self, rest: torch.Tensor) -> None:
        """Write the scales back, and the payload of the last block if that is not full; else rest is empty."""
        num_scale_bytes = min(self._scale_bytes.numel(), _FLOAT_BYTES) if rest.numel() else 0
        if self._scales.data_ptr() != self._scale_bytes.data_ptr():
            self._scale_bytes.copy_(byte_view(self._scales))
        if rest.numel():
            self._scale_bytes[self._scale_bytes.numel() - num_scale_bytes :].copy_(rest[:num_scale_bytes])
            self._code_bytes[self._num_full_bytes :].copy_(rest[num_scale_bytes:])


def _full(num_elements: int) -> int:
    """Elements in full blocks: the next lower multiple of a block's."""
    return num_elements - num_elements % BLOCK_ELEMENTS
