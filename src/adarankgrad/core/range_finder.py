"""An orthonormal basis for the strongest directions of a matrix, and the energy each one captures.

Randomized range finder with power iterations (Halko, Martinsson and Tropp, arXiv 0909.4061,
algorithms 4.4 and 5.1), as AdaRankGrad's subspace search uses it (arXiv 2410.17881, "SSRF").
Differs from the paper: it sketches once at the rank ceiling and reads the captured energy of
*every* rank off a small Gram matrix, where the paper searches over ranks.

Both finders return a `Subspace`, ordered by energy, so that the basis for rank r is its first r
columns and the coordinates are its first r rows.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .projection import project

# Columns that are orthonormal to within this come out orthonormal from one more pass.
_REPAIRABLE = 1e-2
# ‖G‖² below this, or above its inverse, is near the end of float32's range once squared again.
_SMALLEST_TOTAL = 1e-24


class Subspace(NamedTuple):
    """Leading directions of a matrix (m, n), strongest first.

    Attributes:
        basis: (*batch, m, k) orthonormal columns.
        coords: (*batch, k, n), ``basis.mT @ matrix``; its rows are orthogonal.
        energies: (*batch, k) float64, squared norms of the rows of ``coords``, descending, not
            negative. Their sum over the first r entries is the energy that rank r captures.
        total: (*batch,) float64, the squared Frobenius norm of the whole matrix.
    """

    basis: Tensor
    coords: Tensor
    energies: Tensor
    total: Tensor


def find_range(
    matrix: Tensor,
    num_directions: int,
    *,
    oversampling: int = 8,
    power_iterations: int = 1,
    start: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Subspace:
    """Find the leading directions of a matrix by a randomized range finder.

    Cold, the sketch is ``matrix @ Gaussian``. Warm, it is ``matrix @ start.mT``, where the rows of
    ``start`` are an estimate of the matrix's strongest row space: a power iteration for half its
    price, from where the last search ended, since the strong directions of a gradient move slowly.
    Directions that ``start`` does not fill are random. A start whose rows are not independent, a
    zero one among them, is set aside: too much of the sketch would be spent on what they share.

    Args:
        matrix: (*batch, m, n), float32 or float64, finite. Any shape, rank-deficient and zero
            matrices included.
        num_directions: k, the most directions to return; clamped to min(m, n).
        oversampling: extra sketch columns, dropped from the result.
        power_iterations: rounds of ``matrix @ (matrix.mT @ sketch)``, re-orthonormalised between
            the two products; a warm start counts as one of them. More rounds sharpen a slowly
            decaying spectrum.
        start: (*batch, j, n), such as the first moment in an older basis, or an older matrix's
            ``coords``; None for a cold start.
        generator: source of the random columns, on the matrix's device; None uses torch's own.

    Returns:
        The `Subspace` of min(k, m, n) directions. Directions beyond the matrix's rank are
        orthonormal and have energy 0 to rounding.

    Raises:
        ValueError: if ``num_directions`` is below 1, or oversampling or iterations are negative.

    Memory: two sketches, (m + n)(k + oversampling) elements. No copy of the matrix, unless its
    largest entry is so large or small that squares would leave float32.
    """
    _check_counts(num_directions, oversampling, power_iterations)
    total = torch.linalg.vector_norm(matrix, dim=(-2, -1)).square()
    size = _size_to_divide_by(matrix, total)
    if size is not None:
        scaled = find_range(
            matrix / size,
            num_directions,
            oversampling=oversampling,
            power_iterations=power_iterations,
            start=start,
            generator=generator,
        )
        square = size.double().square().squeeze(-1)
        energies, total = scaled.energies * square, scaled.total * square.squeeze(-1)
        return Subspace(scaled.basis, scaled.coords * size, energies, total)
    short_side = min(matrix.shape[-2:])
    num_sketched = min(num_directions + oversampling, short_side)
    columns, is_warm = sketching_columns(matrix, num_sketched, start=start, generator=generator)
    sketch = matrix @ columns
    for _ in range(power_iterations - is_warm):
        rough_basis = orthonormalize(sketch, only_roughly=True)
        sketch = matrix @ orthonormalize(matrix.mT @ rough_basis, only_roughly=True)
    range_basis = orthonormalize(sketch)
    range_coords = project(matrix, range_basis)
    return directions_within(range_basis, range_coords, min(num_directions, short_side), total)


def find_range_exactly(
    matrix: Tensor,
    num_directions: int,
    *,
    oversampling: int = 0,
    power_iterations: int = 0,
    start: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Subspace:
    """Find the leading directions of a matrix by a full singular value decomposition.

    Same signature as `find_range`, so that one can stand for the other; everything that only a
    sketch needs is ignored. A transposed view is decomposed as it lies in memory: the signs that
    LAPACK picks then do not depend on which side is projected.

    Args:
        matrix: (*batch, m, n), float32 or float64, finite.
        num_directions: k, the most directions to return; clamped to min(m, n).
        oversampling: ignored.
        power_iterations: ignored.
        start: ignored.
        generator: ignored.

    Returns:
        The `Subspace` of min(k, m, n) directions; no basis captures more energy.

    Raises:
        ValueError: if ``num_directions`` is below 1.

    Memory: the full factors, (m + n)·min(m, n) elements.
    """
    _check_counts(num_directions, oversampling, power_iterations)
    num_kept = min(num_directions, *matrix.shape[-2:])
    if matrix.stride(-1) != 1 and matrix.mT.stride(-1) == 1:
        _, values, left_transposed = torch.linalg.svd(matrix.mT, full_matrices=False)
        left = left_transposed.mT
    else:
        left, values, _ = torch.linalg.svd(matrix, full_matrices=False)
    basis = left[..., :num_kept].contiguous()
    energies = values.double().square()
    return Subspace(basis, project(matrix, basis), energies[..., :num_kept], energies.sum(-1))


def orthonormalize(columns: Tensor, *, only_roughly: bool = False) -> Tensor:
    """Return orthonormal columns that span those given.

    Cholesky QR: a Gram matrix and a product with a small triangular inverse run at the speed of
    matrix products, where Householder QR walks column by column. Its error grows with the squared
    condition number, so a float64 Gram matrix takes over where float32 is not enough, and a second
    pass repairs what is left. Householder QR does the rest: sets that are deficient to rounding,
    which it completes with arbitrary orthonormal columns.

    Args:
        columns: (*batch, m, k) with k <= m, float32 or float64, finite.
        only_roughly: to 1e-2 is enough; between power iterations only the span matters.

    Returns:
        (*batch, m, k), orthonormal to a hundred units of rounding, or roughly.

    Memory: two or three more sets of columns. A device synchronisation a pass on an accelerator.
    """
    limit = _REPAIRABLE if only_roughly else 100 * torch.finfo(columns.dtype).eps
    whitening, error = _whitening(columns, columns.dtype)
    if not error < limit and columns.dtype != torch.float64:
        whitening, error = _whitening(columns, torch.float64)
    if error < limit:
        return columns @ whitening
    if error < _REPAIRABLE:
        return orthonormalize(columns @ whitening)
    householder: Tensor = torch.linalg.qr(columns).Q
    return householder


def _whitening(columns: Tensor, dtype: torch.dtype) -> tuple[Tensor, float]:
    """The (*batch, k, k) matrix that orthonormalises the columns, and an estimate of its error.

    The columns are scaled to unit length first, so that only their angles count. With λ the largest
    eigenvalue of their inverse Gram matrix A, the Gram matrix's rounding is enlarged λ times and
    that of the final product √λ times. λ is bounded by (tr A⁴)^¼, at most k^¼ times too large. The
    error is NaN or infinite if the factorisation broke down, or a column is so short that its
    square loses digits or its inverse overflows.
    """
    exact = columns.to(dtype)
    gram = exact.mT @ exact
    squared_norms = gram.diagonal(dim1=-2, dim2=-1)
    inverse_norms = squared_norms.rsqrt()
    scaled = gram * inverse_norms.unsqueeze(-1) * inverse_norms.unsqueeze(-2)
    factor, info = torch.linalg.cholesky_ex(scaled)
    identity = torch.eye(gram.shape[-1], dtype=dtype, device=gram.device)
    inverse = torch.linalg.solve_triangular(factor.mT, identity.expand_as(gram), upper=True)
    inverse_gram = inverse @ inverse.mT
    squared_bound = torch.linalg.vector_norm(inverse_gram @ inverse_gram, dim=(-2, -1))
    inner, outer = torch.finfo(dtype), torch.finfo(columns.dtype)
    shortest = max(inner.tiny / inner.eps**2, outer.tiny**1.5)
    is_sound = (info == 0) & (squared_norms.amin(-1) > shortest)
    bound = math.sqrt(torch.where(is_sound, squared_bound, torch.nan).amax().item())
    error = bound * inner.eps + math.sqrt(bound) * outer.eps
    return (inverse_norms.unsqueeze(-1) * inverse).to(columns.dtype), error


def _warm_columns(start: Tensor, num_columns: int) -> tuple[Tensor, Tensor] | None:
    """The start's rows as columns, and the matrix that orthonormalises them; None if they depend.

    Their largest entries are 1, so that a tiny or huge start stays within float32 when squared.
    """
    rows = start[..., :num_columns, :]
    columns = (rows / rows.abs().amax(-1, keepdim=True)).mT
    whitening, error = _whitening(columns, columns.dtype)
    return (columns, whitening) if error < _REPAIRABLE else None


def sketching_columns(
    like: Tensor,
    num_columns: int,
    *,
    start: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, bool]:
    """Columns whose images under a matrix make its sketch, and whether ``start`` is among them.

    Args:
        like: a tensor (*batch, any, n) of the columns' dtype and device; its values are not read.
        num_columns: how many.
        start: (*batch, j, n), rows to begin with; see `find_range`.
        generator: of the random columns.

    Returns:
        (*batch, n, num_columns), and False if there is no start or it was set aside.
    """
    warm = None if start is None else _warm_columns(start, num_columns)
    num_warm = 0 if warm is None else warm[0].shape[-1]
    random = torch.randn(
        *like.shape[:-2],
        like.shape[-1],
        num_columns - num_warm,
        generator=generator,
        device=like.device,
        dtype=like.dtype,
    )
    if warm is None:
        return random, False
    # Without their share of the strong directions, the random columns' images stand apart from
    # those of the warm ones, and float32 suffices more often.
    columns, whitening = warm
    shared = columns @ (whitening @ (whitening.mT @ (columns.mT @ random)))
    return torch.cat([columns, random - shared], dim=-1), True


def directions_within(
    range_basis: Tensor, range_coords: Tensor, num_directions: int, total: Tensor
) -> Subspace:
    """Rayleigh-Ritz: a matrix's strongest directions within a range, from its coordinates there.

    Args:
        range_basis: (*batch, m, p), orthonormal columns.
        range_coords: (*batch, p, n), ``range_basis.mT @ matrix``.
        num_directions: k, the most directions to return; clamped to p.
        total: (*batch,), the matrix's squared Frobenius norm.
    """
    num_kept = min(num_directions, range_basis.shape[-1])
    energies, rotation = torch.linalg.eigh(range_coords @ range_coords.mT)
    strongest_first = rotation.flip(-1)[..., :num_kept]
    return Subspace(
        basis=range_basis @ strongest_first,
        coords=(range_coords.mT @ strongest_first).mT,
        energies=energies.flip(-1)[..., :num_kept].clamp_min(0.0).double(),
        total=total.double(),
    )


def _size_to_divide_by(matrix: Tensor, total: Tensor) -> Tensor | None:
    """Largest entries (*batch, 1, 1) of matrices whose squares leave float32's range, 1 for others.

    None if no matrix needs it.
    """
    is_moderate = (total > _SMALLEST_TOTAL) & (total < 1 / _SMALLEST_TOTAL)
    if is_moderate.all():
        return None
    largest = torch.linalg.vector_norm(matrix, math.inf, dim=(-2, -1))
    needs_none = is_moderate | (largest == 0) | ~largest.isfinite() | (largest == 1)
    if needs_none.all():
        return None
    return torch.where(needs_none, torch.ones_like(largest), largest)[..., None, None]


def _check_counts(num_directions: int, oversampling: int, power_iterations: int) -> None:
    if num_directions < 1:
        raise ValueError(f"num_directions must be at least 1, got {num_directions}")
    if oversampling < 0:
        raise ValueError(f"oversampling must not be negative, got {oversampling}")
    if power_iterations < 0:
        raise ValueError(f"power_iterations must not be negative, got {power_iterations}")
