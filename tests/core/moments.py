"""Adam's moments as training makes them, for the tests of carries."""

from __future__ import annotations

import torch

from adarankgrad.core.carry import Moments

BETAS = (0.9, 0.999)


def trained_moments(rank, num_cols, num_steps=20, seed=0, mean=0.5):
    """Moments as Adam makes them: averages of the same gradients, whose mean is not zero."""
    generator = torch.Generator().manual_seed(seed)
    exp_avg, exp_avg_sq = torch.zeros(2, rank, num_cols, dtype=torch.float64).unbind()
    for _ in range(num_steps):
        grad = mean + torch.randn(rank, num_cols, generator=generator, dtype=torch.float64)
        exp_avg = BETAS[0] * exp_avg + (1 - BETAS[0]) * grad
        exp_avg_sq = BETAS[1] * exp_avg_sq + (1 - BETAS[1]) * grad.square()
    return moments_of_age(exp_avg, exp_avg_sq, num_steps)


def moments_of_age(exp_avg, exp_avg_sq, num_steps):
    """Moments whose directions have all been there for this many steps."""
    seen = torch.full_like(exp_avg[..., :1], 1 - BETAS[1] ** num_steps)
    return Moments(exp_avg, exp_avg_sq, seen)


def correction(num_steps):
    return 1 - BETAS[0] ** num_steps
