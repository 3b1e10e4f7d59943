"""What is done with the part of a gradient that the basis does not hold.

All rules return a step shaped as the gradient, to be subtracted at the learning rate beside the
lifted step of the basis. None keeps state, but for one number of Fira's.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from .orthogonalize import orthogonalize
from .projection import norm_of

Residual = Literal["none", "fira", "fira_official", "normalized", "orthogonalized"]
RESIDUALS: tuple[str, ...] = get_args(Residual)
STATELESS_RESIDUALS = ("normalized", "orthogonalized")

ADAM_RMS = 0.2
"""Root mean square of an entry of Adam's step over the learning rate, as commonly observed; Muon's
updates are scaled to it so that Adam's rates carry over (Liu et al. 2025, arXiv 2502.16982)."""

LARGEST_ROUNDING = 2e-2
"""A residual this much smaller than what the basis holds, 1/2500 of the energy, may be rounding:
two to four roundings of bfloat16."""

NORM_GROWTH = 1.01
"""Fira's γ: how much the norm of its residual step may grow from one step to the next."""


def outside_basis(matrix: Tensor, basis: Tensor, coords: Tensor, *, factor: float = 1.0) -> Tensor:
    """Return ``matrix − factor · basis @ coords`` (*batch, m, n), newly allocated.

    In the matrix's dtype, but for float16, whose range coordinates may leave: then in the basis's.

    Args:
        matrix: (*batch, m, n), the gradient.
        basis: (*batch, m, r).
        coords: (*batch, r, n), ``basis.mT @ matrix``.
        factor: 1 but in Fira's official code (`scaled_like_adam`).
    """
    if matrix.dtype is torch.float16:
        matrix = matrix.to(basis.dtype)
    basis, coords = basis.to(matrix.dtype), coords.to(matrix.dtype)
    if matrix.dim() == 2:
        return torch.addmm(matrix, basis, coords, alpha=-factor)
    return torch.baddbmm(matrix, basis, coords, alpha=-factor)


def without_rounding(
    residual: Tensor, coords: Tensor, *, dim: int | tuple[int, int] = (-2, -1)
) -> Tensor:
    """Zero a residual that is but rounding, where the basis holds the whole gradient.

    Rules that normalise would otherwise turn it into steps of full size. A gradient's dtype does
    not tell how it was rounded (float32 under autocast or TF32), so the bound is for bfloat16.

    Args:
        residual: (*batch, m, n); modified in place and returned.
        coords: (*batch, r, n), the gradient in the basis.
        dim: axes over which the two are compared: whole matrices, or -2 for column by column.
    """
    sizes = [norm_of(part, dim=dim, keepdim=True) for part in (residual, coords)]
    return residual.mul_(sizes[0] > LARGEST_ROUNDING * sizes[1])


def scaled_like_adam(residual: Tensor, coords: Tensor, direction: Tensor) -> Tensor:
    """Scale every column as Adam scaled the same column inside the basis (arXiv 2410.01623, §4).

    Args:
        residual: (*batch, m, n); modified in place and returned.
        coords: (*batch, r, n), the gradient in the basis.
        direction: (*batch, r, n), what Adam made of it.
    """
    sizes = torch.linalg.vector_norm(coords, dim=-2, keepdim=True).add_(1e-8)
    factors = torch.linalg.vector_norm(direction, dim=-2, keepdim=True).div_(sizes)
    return residual.mul_(factors.to(residual.dtype))


def limit_growth(residual: Tensor, last_norm: Tensor, *, unit: float = 1.0) -> Tensor:
    """Let the norm grow by `NORM_GROWTH` a step at most (Fira's norm-growth limiter).

    Differs from the authors' code: a norm of zero limits nothing. There one step without gradient
    stops the residual for about two thousand steps, since it may then grow from 1e-8 only.

    Args:
        residual: (*batch, m, n); modified in place and returned.
        last_norm: (*batch, 1, 1), norm of the last limited residual, infinite at first; replaced
            in place.
        unit: the norms are compared in this unit; Fira's code leaves Adam's bias correction out.
    """
    norm = torch.linalg.vector_norm(residual, dim=(-2, -1), keepdim=True, dtype=last_norm.dtype)
    norm /= unit
    limit = torch.where(last_norm > 0, NORM_GROWTH * last_norm, math.inf)
    is_above = norm > limit
    last_norm.copy_(torch.where(is_above, limit, norm))
    return residual.mul_(torch.where(is_above, limit / norm, 1.0).to(residual.dtype))


def stateless_residual(kind: str, matrix: Tensor, basis: Tensor, coords: Tensor) -> Tensor:
    """Return the step of a rule that depends on nothing but the gradient's direction.

    Args:
        kind: one of `STATELESS_RESIDUALS`.
        matrix: (*batch, m, n), the gradient.
        basis: (*batch, m, r).
        coords: (*batch, r, n), ``basis.mT @ matrix``.

    Raises:
        ValueError: if ``kind`` is none of them.
    """
    residual = outside_basis(matrix, basis, coords)
    if kind == "orthogonalized":
        return orthogonalized(without_rounding(residual, coords))
    if kind == "normalized":
        return normalized(without_rounding(residual, coords, dim=-2))
    raise ValueError(f"residual must be one of {', '.join(STATELESS_RESIDUALS)}, got {kind!r}")


def normalized(residual: Tensor) -> Tensor:
    """Scale every column to the size of Adam's steps, `ADAM_RMS` an entry; zeros stay zero.

    Args:
        residual: (*batch, m, n); modified in place and returned.
    """
    tiny = torch.finfo(residual.dtype).tiny
    # Twice, since squares of tiny or huge entries may leave the range that the entries are in.
    residual.div_(residual.abs().amax(-2, keepdim=True).clamp_min(tiny))
    residual.div_(torch.linalg.vector_norm(residual, dim=-2, keepdim=True).clamp_min(tiny))
    return residual.mul_(ADAM_RMS * math.sqrt(residual.shape[-2]))


def orthogonalized(residual: Tensor) -> Tensor:
    """Raise all singular values to one, in steps of the size of Adam's (`ADAM_RMS` an entry).

    Newton-Schulz as in Muon, but of one gradient's residual and with no momentum, hence no state.

    Args:
        residual: (*batch, m, n).
    """
    return orthogonalize(residual).mul_(ADAM_RMS * math.sqrt(max(residual.shape[-2:])))
