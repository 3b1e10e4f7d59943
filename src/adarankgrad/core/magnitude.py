"""A threshold under which a given share of many numbers lies."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def count_below(tensors: Sequence[Tensor], threshold: float) -> int:
    """Return how many entries x of all tensors have |x| < threshold.

    Compares in float32 (float64 for float64 tensors). Memory: one such copy of the largest tensor.
    """
    return sum(int(torch.count_nonzero(is_below(each, threshold))) for each in tensors)


def is_below(values: Tensor, threshold: float) -> Tensor:
    """Return where |x| < threshold, compared in float32 or wider, whatever the values' dtype."""
    dtype = torch.promote_types(values.dtype, torch.float32)
    return values.detach().abs().to(dtype) < threshold


def magnitude_threshold(tensors: Sequence[Tensor], share: float) -> float:
    """Return the smallest float32 number that at least a share of all entries lies below.

    Bisects over the bits of positive float32 numbers, which are ordered as the numbers are, so
    that nothing is sorted or gathered: at most 31 passes over the tensors.

    Args:
        tensors: any shapes and floating dtypes, on any devices.
        share: of the entries of all tensors together, in (0, 1].

    Returns:
        A threshold; NaN entries lie below none.
    """
    wanted = math.ceil(share * sum(each.numel() for each in tensors) - 1e-9)
    low, high = 0, _bits(math.inf)
    while high - low > 1:
        middle = (low + high) // 2
        if count_below(tensors, _number(middle)) >= wanted:
            high = middle
        else:
            low = middle
    return _number(high)


def _bits(number: float) -> int:
    return int(torch.tensor(number, dtype=torch.float32).view(torch.int32))


def _number(bits: int) -> float:
    return float(torch.tensor(bits, dtype=torch.int32).view(torch.float32))
