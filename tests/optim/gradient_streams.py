"""Gradients that do not depend on the weight, so that two optimizers see the very same ones."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def drifting_gradients(
    num_rows: int, num_cols: int, num_steps: int, *, seed: int = 0, noise: float = 0.05
) -> Iterator[Tensor]:
    """Yield float64 gradients of slowly turning directions, whose number falls and rises again.

    Between one and all directions of the short side are strong; the rest is noise, so that an
    energy threshold picks another rank from time to time.
    """
    generator = torch.Generator().manual_seed(seed)
    short_side = min(num_rows, num_cols)

    def gaussian(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    left, right = gaussian(num_rows, short_side), gaussian(num_cols, short_side)
    for step in range(num_steps):
        left = 0.98 * left + 0.2 * gaussian(num_rows, short_side)
        right = 0.98 * right + 0.2 * gaussian(num_cols, short_side)
        progress = abs(2.0 * step / max(1, num_steps - 1) - 1.0)
        num_strong = 1 + round(progress * (short_side - 1))
        # All singular values differ, so that singular vectors are determined up to their signs.
        index = torch.arange(short_side, dtype=torch.float64)
        strength = torch.where(index < num_strong, 1.0 - 0.05 * index, noise / (1.0 + index))
        yield torch.linalg.qr(left).Q * strength @ torch.linalg.qr(right).Q.mT
