"""Eight bits for a number of optimizer state, and a scale for every block of them.

A code q counts evenly spaced levels of a root of the share x / max|x| of its block: the square root
for values with a sign, the fourth root for a second moment. So codes are dense near zero, where
most values of a block lie, and a second moment's root, by which Adam divides, is finer than a first
moment. Neighbouring codes differ by 2/q and 4/q of the value: at the top of a block by 1.6 %,
at a thousandth of its largest value by 50 % of a first and 9 % of a second moment.

An average that moves by 0.1 % a step would never leave its code if it were rounded to the nearest.
So values are rounded up or down at random, in proportion: the code's value is right on average.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 256
"""Values along the last axis that share a scale."""


class Code(NamedTuple):
    """How a share in [0, 1] of a block's largest value becomes an integer, and back.

    Attributes:
        levels: the code of 1.
        num_roots: square roots taken before levels are counted.
        dtype: of the codes.
    """

    levels: int
    num_roots: int
    dtype: torch.dtype

    @property
    def is_signed(self) -> bool:
        """Whether codes have the sign of their values."""
        return self.dtype is torch.int8


SIGNED = Code(levels=127, num_roots=1, dtype=torch.int8)
"""For a first moment or a basis. Values below 1/16129 of their block's largest are zero or that."""

UNSIGNED = Code(levels=255, num_roots=2, dtype=torch.uint8)
"""For a second moment, down to 2.4e-10 of its block's largest value: 1.5e-5 of the largest root."""


class Quantized(NamedTuple):
    """Values in eight bits.

    Attributes:
        codes: (..., n), int8 or uint8.
        scale: (..., ⌈n / 256⌉) float32, the largest absolute value of each block.
    """

    codes: Tensor
    scale: Tensor


def quantize(values: Tensor, code: Code, generator: torch.Generator | None = None) -> Quantized:
    """Round values to codes, block by block along the last axis.

    Zero stays zero. A positive value under an unsigned code never becomes zero, since a step that
    divides by its root would explode: below the smallest code it is rounded up. A block with a
    value that is not finite has no finite value afterwards.

    Args:
        values: (..., n), any floating dtype; not negative under an unsigned code.
        code: `SIGNED` or `UNSIGNED`.
        generator: on the values' device, for rounding up or down in proportion; None rounds to
            the nearest code.

    Memory: the result, and six float32 temporaries of the values' size.
    """
    num_cols = values.shape[-1]
    blocks = _in_blocks(values.float())
    share = blocks.abs()
    scale = share.amax(-1) if num_cols else share.new_zeros(blocks.shape[:-1])
    share.div_(scale.unsqueeze(-1)).nan_to_num_(0.0, 0.0)  # 0/0 in a block of zeros
    codes = _round(share, code, generator)
    if code.is_signed:
        codes.mul_(blocks.sign())
    else:
        codes = torch.where(blocks > 0, codes.clamp_min(1.0), codes)
    whole = codes.to(code.dtype).flatten(-2)
    # A copy, since a single row counts as contiguous with its padding behind.
    return Quantized(whole[..., :num_cols].clone(memory_format=torch.contiguous_format), scale)


def dequantize(quantized: Quantized, code: Code, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the values (..., n) that codes stand for.

    Under an unsigned code no value but zero is below the smallest normal number of float32.
    """
    codes, scale = quantized
    share = _in_blocks(codes).to(dtype) / code.levels
    share = share * share.abs() if code.is_signed else _value_of(share, code)
    values = share.mul_(scale.unsqueeze(-1)).flatten(-2)[..., : codes.shape[-1]]
    if code.is_signed:
        return values
    return torch.where(codes > 0, values.clamp_min(torch.finfo(torch.float32).tiny), values)


def num_blocks(num_values: int) -> int:
    """Scales of so many values along the last axis."""
    return -(-num_values // BLOCK)


def _round(share: Tensor, code: Code, generator: torch.Generator | None) -> Tensor:
    """Codes of shares in [0, 1], as floats; replaces ``share``."""
    root = share
    for _ in range(code.num_roots):
        root = root.sqrt()
    low = root.mul_(code.levels).floor_()
    low_value = _value_of(low, code)
    gap = _value_of(low + 1.0, code).sub_(low_value)
    above = share.mul_(code.levels ** (2**code.num_roots)).sub_(low_value).div_(gap)
    if generator is None:
        return low.add_(above > 0.5)
    coins = torch.rand(share.shape, generator=generator, device=share.device)
    return low.add_(coins < above)


def _value_of(codes: Tensor, code: Code) -> Tensor:
    """Undo the roots of codes that are not negative; ``pow`` would be several times slower."""
    for _ in range(code.num_roots):
        codes = codes.square()
    return codes


def _in_blocks(values: Tensor) -> Tensor:
    """See (..., n) as (..., blocks, block), with zeros behind; no longer than they need to be."""
    num_cols = values.shape[-1]
    size = min(BLOCK, num_cols)
    padding = num_blocks(num_cols) * size - num_cols
    if padding:
        values = torch.nn.functional.pad(values, (0, padding))
    return values.reshape(*values.shape[:-1], num_blocks(num_cols), size)
