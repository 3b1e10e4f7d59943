"""The sign-keeping power x |x|^(a-1), its inverse and its slope, elementwise.

All compute in float32 or wider: |x|^3 of a float16 number of 1e-3 would underflow.
"""

from __future__ import annotations

import torch
from torch import Tensor


def signed_power(base: Tensor, exponent: float) -> Tensor:
    """Return sign(x) |x|^exponent, in float32 or wider.

    Args:
        base: x, any shape and floating dtype.
        exponent: above 0.

    Memory: one float32 tensor of the base's size, and one as a temporary.
    """
    wide = _widened(base)
    return wide.abs().pow_(exponent).copysign_(wide)


def signed_root(power: Tensor, exponent: float) -> Tensor:
    """Return sign(w) |w|^(1/exponent), the inverse of `signed_power`, in float32 or wider."""
    return signed_power(power, 1.0 / exponent)


def signed_power_slope(base: Tensor, exponent: float) -> Tensor:
    """Return the derivative exponent |x|^(exponent-1), in float32 or wider.

    Finite at 0 for an exponent of at least 1: 0 above 1, and 1 at 1.
    """
    return _widened(base).abs().pow_(exponent - 1.0).mul_(exponent)


def _widened(values: Tensor) -> Tensor:
    return values.detach().to(torch.promote_types(values.dtype, torch.float32))
