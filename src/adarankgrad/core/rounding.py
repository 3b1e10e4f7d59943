"""Float32 numbers in bfloat16 without loss on average, or with eight more bits beside it.

bfloat16 is float32 without its last 16 bits: neighbours lie 2⁻⁷ apart at 1, so that an update of
less than 2⁻⁹ of a weight is lost when the sum is rounded to the nearest.
"""

from __future__ import annotations

import torch
from torch import Tensor


def round_stochastically(values: Tensor, generator: torch.Generator) -> Tensor:
    """Round to one of the two nearest bfloat16 numbers, so that the mean is the value.

    A number that bfloat16 holds stays as it is, zero and infinity included.

    Args:
        values: float32, any shape.
        generator: on the values' device.

    Returns:
        bfloat16, newly allocated.

    Memory: the result, and four bytes a value.
    """
    dropped = torch.randint(
        0, 1 << 16, values.shape, generator=generator, dtype=torch.int32, device=values.device
    )
    bits = dropped.add_(values.view(torch.int32)).bitwise_and_(-(1 << 16))
    return bits.view(torch.float32).to(torch.bfloat16)


def split_correction(values: Tensor) -> tuple[Tensor, Tensor]:
    """Split into the nearest bfloat16 number and what it lacks of the first 24 bits of float32.

    The two together are the value rounded to 16 significant bits, at most 2⁻¹⁶ of it away.

    Args:
        values: float32, any shape.

    Returns:
        bfloat16 values, and an int8 correction in units of 1/256 of their last place.

    Memory: twelve bytes a value, of which the result is three.
    """
    bits = values.view(torch.int32)
    # Ties to even: away from zero, every step would lengthen the weights a little.
    bits = (bits + (0x7F + ((bits >> 8) & 1))) >> 8
    high = (bits + 0x80) >> 8
    correction = bits.sub_(high << 8).to(torch.int8)
    return high.to(torch.int16).view(torch.bfloat16), correction


def join_correction(weight: Tensor, correction: Tensor) -> Tensor:
    """Put together what `split_correction` split, exactly: float32, newly allocated.

    Of a weight that was changed since, the result is at most half a unit in its last place away.

    Args:
        weight: bfloat16, any shape.
        correction: int8, of the same shape.

    Memory: seventeen bytes a value, of which the result is four.
    """
    bits = weight.view(torch.int16).to(torch.int32)
    # A zero has no smaller neighbour of its own sign; infinity has nothing to correct.
    is_left_alone = ((weight == 0) & (correction < 0)) | ~weight.isfinite()
    more = correction.to(torch.int32).masked_fill_(is_left_alone, 0)
    return (bits << 16).add_(more << 8).view(torch.float32)
