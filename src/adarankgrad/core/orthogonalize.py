"""Orthogonalisation: the matrix with the same singular vectors and all singular values near one.

Newton-Schulz iteration as in Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/;
the quintic's coefficients are its published constants). Matrix products only, no state.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

QUINTIC = (3.4445, -4.7750, 2.0315)
"""a, b, c of x ← a·x + b·x³ + c·x⁵, which drives singular values in [0.01, 1] into [0.67, 1.21]
within five rounds."""


_ELONGATED = 2
"""Sides in this ratio or beyond: there the iteration on the short side's Gram matrix costs less."""

_CHUNK = 2**21
"""Entries of an elongated matrix in working precision at a time."""


def orthogonalize(matrix: Tensor, *, num_iterations: int = 5) -> Tensor:
    """Return U Vᵀ approximately, for ``matrix = U S Vᵀ``.

    After five iterations singular values above a hundredth of the Frobenius norm lie in about
    [0.67, 1.21]; smaller ones are raised by 3.4445 per iteration at most. A zero matrix gives zero.

    All rounds multiply from the left by a polynomial of one Gram matrix. So a matrix of twice as
    many columns as rows is read twice only, and the rounds are done on the short side.

    Args:
        matrix: (*batch, m, n), any floating dtype. Half precision is computed in bfloat16 on CUDA,
            float32 elsewhere; wider dtypes as they are.
        num_iterations: rounds of the iteration, at least 1.

    Returns:
        The same shape and dtype, newly allocated.

    Memory: at most three temporaries of the matrix's size and three of short side squared; of an
    elongated matrix that is not computed in bfloat16, six of short side squared and two of
    `_CHUNK` entries.
    """
    dtype = _working_dtype(matrix)
    is_tall = matrix.shape[-2] > matrix.shape[-1]
    wide = matrix.mT if is_tall else matrix
    is_elongated = wide.shape[-1] >= _ELONGATED * wide.shape[-2]
    # Not in bfloat16, whose roundings of the Gram matrix are too coarse for small values.
    iterate = _by_gram if is_elongated and dtype is not torch.bfloat16 else _by_products
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
    largest = _largest_entry(wide).to(dtype)
    num_cols = max(1, _CHUNK * wide.shape[-1] // max(1, wide.numel()))
    parts = torch.split(wide, num_cols, dim=-1)
    gram = wide.new_zeros(*wide.shape[:-1], wide.shape[-2], dtype=dtype)
    for part in parts:
        scaled = part.to(dtype) / largest
        gram += scaled @ scaled.mT
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    trace = trace.clamp_min(1.0)  # the largest entry's square; less is zero
    gram = gram / trace
    factor = torch.eye(gram.shape[-1], dtype=dtype, device=wide.device).expand_as(gram)
    for _ in range(num_iterations):
        step = _polynomial(gram)
        step.diagonal(dim1=-2, dim2=-1).add_(QUINTIC[0])
        factor = step @ factor
        gram = step @ gram @ step
    factor = factor / trace.sqrt()
    result = torch.empty_like(wide)
    for part, target in zip(parts, torch.split(result, num_cols, dim=-1), strict=True):
        target.copy_(factor @ (part.to(dtype) / largest))
    return result


def _polynomial(gram: Tensor) -> Tensor:
    """``b A + c A²``, what a round adds to ``a``."""
    _, cubic, quintic = QUINTIC
    return _multiply_add(gram)(gram, gram, gram, beta=cubic, alpha=quintic)


def _multiply_add(matrix: Tensor) -> Callable[..., Tensor]:
    return torch.addmm if matrix.dim() == 2 else torch.baddbmm


def _largest_entry(matrix: Tensor) -> Tensor:
    return matrix.abs().amax((-2, -1), keepdim=True).clamp_min(torch.finfo(matrix.dtype).tiny)


def _working_dtype(matrix: Tensor) -> torch.dtype:
    if matrix.dtype in (torch.float32, torch.float64):
        return matrix.dtype
    return torch.bfloat16 if matrix.is_cuda else torch.float32
