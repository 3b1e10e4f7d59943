"""Orthogonalisation: the matrix with the same singular vectors and all singular values near one.

Newton-Schulz iteration as in Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/;
the quintic's coefficients are its published constants). Matrix products only, no state.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

QUINTIC = (3.4445, -4.7750, 2.0315)
"""a, b, c of x ← a·x + b·x³ + c·x⁵, which drives singular values in [0.01, 1] into [0.67, 1.21]
within five rounds."""


_ELONGATED = 8
"""Sides in this ratio or beyond, as of embeddings: the iteration on the short side's Gram matrix
then costs less, in time and memory."""

_MOST_ROUNDS_BY_GRAM = 5
"""Rounding leaves a Gram matrix tiny negative eigenvalues, which a round raises up to twelvefold:
harmless after five, and ruinous after ten."""

_CHUNK = 2**21
"""Entries of an elongated matrix in working precision at a time."""


def orthogonalize(matrix: Tensor, *, num_iterations: int = 5) -> Tensor:
    """Return U Vᵀ approximately, for ``matrix = U S Vᵀ``.

    After five iterations singular values above a hundredth of the Frobenius norm lie in about
    [0.67, 1.21]; smaller ones are raised by 3.4445 per iteration at most. A zero matrix gives zero.

    All rounds multiply from the left by polynomials of one Gram matrix. So the rounds of an
    elongated matrix are done on its short side, and it is multiplied once.

    Args:
        matrix: (*batch, m, n), any floating dtype. Half precision is computed in bfloat16 on CUDA,
            float32 elsewhere; wider dtypes as they are.
        num_iterations: rounds of the iteration, at least 1.

    Returns:
        The same shape and dtype, newly allocated.

    Memory: at most three temporaries of the matrix's size and three of short side squared; of a
    matrix eight times as long as it is wide that is not computed in bfloat16, its result, six of
    short side squared and three of `_CHUNK` entries.
    """
    dtype = _working_dtype(matrix)
    is_tall = matrix.shape[-2] > matrix.shape[-1]
    wide = matrix.mT if is_tall else matrix
    is_elongated = wide.shape[-1] >= _ELONGATED * wide.shape[-2]
    # Not in bfloat16, whose roundings of the Gram matrix are too coarse for small values.
    is_exact = dtype is not torch.bfloat16 and num_iterations <= _MOST_ROUNDS_BY_GRAM
    iterate = _by_gram if is_elongated and is_exact else _by_products
    result = iterate(wide, dtype, num_iterations)
    return result.mT if is_tall else result


def _by_products(wide: Tensor, dtype: torch.dtype, num_iterations: int) -> Tensor:
    """Every round on the matrix itself."""
    normed = wide.to(dtype)
    # Twice, since squares of tiny or huge entries may leave the range that the entries are in.
    normed = normed / _largest_entry(normed)
    normed = normed / torch.linalg.vector_norm(normed, dim=(-2, -1), keepdim=True).clamp_min(
        torch.finfo(dtype).tiny
    )
    for _ in range(num_iterations):
        polynomial = _polynomial(normed @ normed.mT)
        normed = _multiply_add(normed)(normed, polynomial, normed, beta=QUINTIC[0])
    return normed.to(wide.dtype)


def _by_gram(wide: Tensor, dtype: torch.dtype, num_iterations: int) -> Tensor:
    """All rounds on the Gram matrix ``A``: with ``X ← (a + p(A)) X`` it becomes ``(a + p)² A``."""
    num_cols = max(1, _CHUNK * wide.shape[-1] // max(1, wide.numel()))
    parts = torch.split(wide, num_cols, dim=-1)
    largest = torch.stack([_largest_entry(part.to(dtype)) for part in parts]).amax(0)
    gram = wide.new_zeros(*wide.shape[:-1], wide.shape[-2], dtype=dtype)
    for part in parts:
        scaled = part.to(dtype) / largest
        gram += scaled @ scaled.mT
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True).unsqueeze(-1)
    trace = trace.clamp_min(torch.finfo(dtype).tiny)
    gram = gram / trace
    factor = step = _step(gram)
    for _ in range(num_iterations - 1):
        gram = step @ gram @ step
        step = _step(gram)
        factor = step @ factor
    factor = factor / trace.sqrt()
    result = torch.zeros_like(wide)
    for part, target in zip(parts, torch.split(result, num_cols, dim=-1), strict=True):
        target.add_(factor @ (part.to(dtype) / largest))
    return result


def _step(gram: Tensor) -> Tensor:
    """``a + b A + c A²``, by which a round multiplies."""
    step = _polynomial(gram)
    step.diagonal(dim1=-2, dim2=-1).add_(QUINTIC[0])
    return step


def _polynomial(gram: Tensor) -> Tensor:
    """``b A + c A²``."""
    _, cubic, quintic = QUINTIC
    return _multiply_add(gram)(gram, gram, gram, beta=cubic, alpha=quintic)


def _multiply_add(matrix: Tensor) -> Callable[..., Tensor]:
    return torch.addmm if matrix.dim() == 2 else torch.baddbmm


def _largest_entry(matrix: Tensor) -> Tensor:
    largest: Tensor = torch.linalg.vector_norm(matrix, math.inf, dim=(-2, -1), keepdim=True)
    return largest.clamp_min(torch.finfo(matrix.dtype).tiny)


def _working_dtype(matrix: Tensor) -> torch.dtype:
    if matrix.dtype in (torch.float32, torch.float64):
        return matrix.dtype
    return torch.bfloat16 if matrix.is_cuda else torch.float32
