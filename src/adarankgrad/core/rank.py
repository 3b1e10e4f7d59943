"""How many directions a basis keeps: the smallest rank that captures enough energy.

AdaRankGrad's subspace selection (arXiv 2410.17881, "IASS"). The paper bounds the residual that is
allowed; here ``energy`` is the fraction of ‖G‖²_F that is *kept*. A published residual threshold
ξ = ‖G − G_r‖_F / ‖G‖_F corresponds to ``energy = 1 − ξ²``, so ξ = 0.2 is energy 0.96
(`energy_from_residual`).
"""

from __future__ import annotations

import torch
from torch import Tensor


def choose_rank(
    energies: Tensor,
    total: Tensor,
    *,
    energy: float,
    min_rank: int,
    max_rank: int,
    previous_rank: int | None = None,
    monotone: bool = False,
    rank_multiple: int = 1,
    rounding: float | None = None,
) -> int:
    """Return the smallest rank whose captured energy reaches the fraction asked for.

    The energy threshold proposes; the bounds, in this order, decide: rounding up to
    ``rank_multiple``, ``monotone``, then [min_rank, max_rank]. A threshold that no rank on offer
    reaches gives the largest. A stack of matrices shares one rank, read from its summed energy.

    Args:
        energies: (*batch, k), squared norms along orthonormal directions, descending.
        total: (*batch,), squared Frobenius norms of the whole matrices.
        energy: fraction of the total to capture, in (0, 1].
        min_rank: smallest rank, at least 1; gives way to ``max_rank`` and to k.
        max_rank: largest rank, at least 1; gives way to k.
        previous_rank: rank of the basis that is replaced, or None.
        monotone: never exceed ``previous_rank``.
        rank_multiple: round the rank up to a multiple of this (hardware likes 8 or 16).
        rounding: relative rounding error of an energy, by which a threshold may be missed; None is
            that of their dtype.

    Returns:
        A rank in [1, k].

    Raises:
        ValueError: if ``energy`` is outside (0, 1], or a rank or the multiple is below 1.

    Costs one device synchronisation on an accelerator.
    """
    _check(energy, min_rank, max_rank, rank_multiple)
    num_directions = energies.shape[-1]
    per_direction = energies.detach().double().reshape(-1, num_directions).sum(0).cpu()
    captured = per_direction.cumsum(0)
    # Full energy is reached up to the rounding of the sums that it is compared with.
    rounding = torch.finfo(energies.dtype).eps if rounding is None else rounding
    slack = 1.0 - num_directions * rounding
    wanted = energy * slack * total.detach().double().sum().item()
    rank = int(torch.searchsorted(captured, wanted)) + 1

    rank = -(-rank // rank_multiple) * rank_multiple
    if monotone and previous_rank is not None:
        rank = min(rank, previous_rank)
    return max(1, min(max(rank, min_rank), max_rank, num_directions))


def energy_from_residual(residual: float) -> float:
    """Convert a published residual threshold ξ = ‖G − G_r‖_F / ‖G‖_F to the energy kept, 1 − ξ².

    Args:
        residual: ξ in [0, 1), not squared.

    Raises:
        ValueError: if ``residual`` is outside [0, 1).
    """
    if not 0.0 <= residual < 1.0:
        raise ValueError(f"residual must be in [0, 1), got {residual}")
    return 1.0 - residual * residual


def _check(energy: float, min_rank: int, max_rank: int, rank_multiple: int) -> None:
    if not 0.0 < energy <= 1.0:
        raise ValueError(f"energy must be in (0, 1], got {energy}")
    for name, value in (
        ("min_rank", min_rank),
        ("max_rank", max_rank),
        ("rank_multiple", rank_multiple),
    ):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
