"""The nuclear norm of a matrix, the sum of its singular values, and its gradient."""

from __future__ import annotations

import torch
from torch import Tensor


def nuclear_norm_gradient(matrix: Tensor) -> Tensor:
    """Return U Vᵀ for ``matrix = U S Vᵀ``, over the singular values that are not rounding.

    At a matrix of lower rank it is the subgradient of least norm; at zero it is zero.

    Args:
        matrix: (m, n), finite, float32 or wider.

    Returns:
        (m, n), newly allocated.

    Cost: one singular value decomposition. Memory: about three matrices of the size of this one.
    """
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    rounding = values[0] * max(matrix.shape) * torch.finfo(matrix.dtype).eps
    gradient: Tensor = (left * (values > rounding)) @ right
    return gradient
