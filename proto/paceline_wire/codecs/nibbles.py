"""Two 4-bit codes in a byte, in planes: a block's first half in the low nibbles, its second half in the high ones."""

import torch


def pack_nibbles(codes: torch.Tensor, out: torch.Tensor) -> None:
    """Write the low 4 bits of codes (int8 [B, 2 C]) to out (int8 [B, C])."""
    half = codes.shape[1] // 2
    torch.bitwise_left_shift(codes[:, half:], 4, out=out)
    out.bitwise_or_(codes[:, :half].bitwise_and(0x0F))


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Return the nibbles of packed (int8 [B, C]), sign-extended, as int8 [B, 2 C]."""
    half = packed.shape[1]
    codes = packed.new_empty(packed.shape[0], 2 * half)
    low, high = codes[:, :half], codes[:, half:]
    torch.bitwise_left_shift(packed, 4, out=low).bitwise_right_shift_(4)
    torch.bitwise_right_shift(packed, 4, out=high)
    return codes
