"""Orthogonalisation: the matrix with the same singular vectors and all singular values near one.

Newton-Schulz iteration as in Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/;
the quintic's coefficients are its published constants). Matrix products only, no state.
"""

from __future__ import annotations

import torch
from torch import Tensor

QUINTIC = (3.4445, -4.7750, 2.0315)
"""a, b, c of x ← a·x + b·x³ + c·x⁵, which drives singular values in [0.01, 1] into [0.67, 1.21]
within five rounds."""


def orthogonalize(matrix: Tensor, *, num_iterations: int = 5) -> Tensor:
    """Return U Vᵀ approximately, for ``matrix = U S Vᵀ``.

    After five iterations singular values above a hundredth of the Frobenius norm lie in about
    [0.67, 1.21]; smaller ones are raised by 3.4445 per iteration at most. A zero matrix gives zero.

    Args:
        matrix: (*batch, m, n), any floating dtype. Half precision is computed in bfloat16 on CUDA,
            float32 elsewhere; wider dtypes as they are.
        num_iterations: rounds of the iteration, at least 1.

    Returns:
        The same shape and dtype, newly allocated.

    Memory: at most three temporaries of the matrix's size and three of short side squared.
    """
    dtype = _working_dtype(matrix)
    is_tall = matrix.shape[-2] > matrix.shape[-1]
    wide = (matrix.mT if is_tall else matrix).to(dtype)
    # Twice, since squares of tiny or huge entries may leave the range that the entries are in.
    wide = wide / wide.abs().amax((-2, -1), keepdim=True).clamp_min(torch.finfo(dtype).tiny)
    wide = wide / torch.linalg.vector_norm(wide, dim=(-2, -1), keepdim=True).clamp_min(
        torch.finfo(dtype).tiny
    )
    linear, cubic, quintic = QUINTIC
    multiply_add = torch.addmm if wide.dim() == 2 else torch.baddbmm
    for _ in range(num_iterations):
        gram = wide @ wide.mT
        polynomial = multiply_add(gram, gram, gram, beta=cubic, alpha=quintic)
        wide = multiply_add(wide, polynomial, wide, beta=linear)
    return (wide.mT if is_tall else wide).to(matrix.dtype)


def _working_dtype(matrix: Tensor) -> torch.dtype:
    if matrix.dtype in (torch.float32, torch.float64):
        return matrix.dtype
    return torch.bfloat16 if matrix.is_cuda else torch.float32
