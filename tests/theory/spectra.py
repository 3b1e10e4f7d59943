"""What the theory tests measure, and plain gradient descent inside AdaRankGrad's bases."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from adarankgrad import AdaRankGrad

NEVER = 10**9


def kappa(gradient: Tensor) -> float:
    """κ: share of the energy outside the best rank-one approximation (the paper's Lemma 1)."""
    energies = torch.linalg.svdvals(gradient.double()).square()
    return (energies[1:].sum() / energies.sum()).item()


def stable_rank(gradient: Tensor) -> float:
    """‖G‖²_F / σ₁², between 1 and the rank; 1/(1 − κ)."""
    energies = torch.linalg.svdvals(gradient.double()).square()
    return (energies.sum() / energies[0]).item()


def energy_rank(gradient: Tensor, energy: float) -> int:
    """The smallest rank that captures this share of the energy, by counting."""
    energies = torch.linalg.svdvals(gradient.double()).square()
    shares = energies.cumsum(0) / energies.sum()
    return int((shares < energy * (1 - 1e-12)).sum()) + 1


def log_log_slope(values: Sequence[float], early: int, late: int) -> float:
    """Slope of log(value) over log(step), between two steps counted from 1."""
    return math.log(values[late - 1] / values[early - 1]) / math.log(late / early)


def running_means(values: Sequence[float]) -> list[float]:
    """Mean of the first 1, 2, … values."""
    tensor = torch.tensor(values, dtype=torch.float64)
    return (tensor.cumsum(0) / torch.arange(1, len(values) + 1)).tolist()


def subspace_descent(params: Sequence[torch.nn.Parameter], step_size: float, **options: object):
    """AdaRankGrad with plain gradient descent in its bases, as the convergence proof has it.

    With both betas 0 and eps = scale = E, Adam's direction times the scale is g / (1 + |g|/E):
    the gradient, to a relative |g|/E = 10⁻⁹ for gradients of size 1 and 10⁻¹⁶ units below.
    """
    size = 1e9
    chosen = {
        "basis": "exact",
        "max_rank": 1.0,
        "min_rank": 1,
        "energy": 1.0,
        "carry": "squared",
        "bias_correction": "global",
        "side": "short",
        "refresh_max_gap": NEVER,
        "refresh_min_gap": 1,
        "refresh_norm": None,
        "refresh_relative_norm": None,
        "refresh_energy": None,
        "residual": "none",
        **options,
    }
    return AdaRankGrad(
        params,
        lr=step_size,
        betas=(0.0, 0.0),
        eps=size,
        scale=size,
        weight_decay=0.0,
        **chosen,
    )
