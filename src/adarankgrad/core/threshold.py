"""Shrinking numbers towards zero, with exact zeros: the proximal step of an L1 term."""

from __future__ import annotations

import torch
from torch import Tensor


def soft_threshold(values: Tensor, amount: float) -> Tensor:
    """Return sign(x) max(|x| − amount, 0).

    Args:
        values: any shape.
        amount: at least 0; 0 changes nothing.
    """
    return torch.nn.functional.softshrink(values, amount)


def dead_zone_threshold(values: Tensor, amount: float) -> Tensor:
    """Return SoRA's threshold as its authors' code computes it.

    It shrinks as `soft_threshold` does, and then also sets to zero what is left below ``amount``:
    all of amount < |x| < 2 amount. What is exactly ±amount stays as it is.

    Args:
        values: any shape.
        amount: at least 0; 0 changes nothing.
    """
    shrunk = torch.where(values.abs() > amount, values - amount * values.sign(), values)
    return torch.where(shrunk.abs() < amount, 0.0, shrunk)
