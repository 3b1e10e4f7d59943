"""Which entries of a matrix to prune, by an importance of each."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_ROUNDING = 1e-9
"""Of share times length, so that 0.29 of 100 entries are 29 although 0.29 * 100 < 29."""


def least_important(importance: Tensor, share: float) -> Tensor:
    """Mark the least important entries of every row.

    Args:
        importance: (m, n), any real dtype. Equal entries are marked from the left, on any device.
        share: of each row to mark, in [0, 1].

    Returns:
        (m, n) bool; ``floor(share * n)`` entries of each row are True.

    Memory: two int64 and one bool of the matrix's size.
    """
    num_marked = math.floor(share * importance.shape[-1] + _ROUNDING)
    order = torch.argsort(importance, dim=-1, stable=True)
    marks = torch.zeros_like(importance, dtype=torch.bool)
    return marks.scatter_(-1, order[..., :num_marked], True)
