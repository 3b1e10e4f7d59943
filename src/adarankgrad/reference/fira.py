"""Fira (arXiv 2410.01623) for one matrix, in float64: GaLore, and a step outside its subspace.

Letters as in the paper: ψ: Adam's direction in the subspace. φ_i = ‖ψ_i‖ / ‖R_i‖, column by column.
S = φ ⊙ (G − P R): the step outside. γ: how much ‖S‖ may grow a step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .galore import GaLore

GAMMA = 1.01


class Fira(GaLore):
    """Algorithm 1 of the paper, gradient by gradient; arguments as for `GaLore`.

    Args:
        W: initial weight.
        is_official: subtract α P R, as the authors' code does, instead of P R.
        settings: as for `GaLore`.
    """

    def __init__(self, W: Tensor, *, is_official: bool = False, **settings: float) -> None:
        super().__init__(W, **settings)  # type: ignore[arg-type]
        self.is_official = is_official
        self.S_norm = 0.0

    def direction(self, G: Tensor, R: Tensor, psi: Tensor) -> Tensor:
        """α P ψ + S."""
        axis = 1 if self.is_right else 0
        phi = psi.norm(dim=axis, keepdim=True) / (R.norm(dim=axis, keepdim=True) + 1e-8)
        outside = G - (self.alpha if self.is_official else 1.0) * self.project_back(R)
        S = self.limited(phi * outside)
        return self.alpha * self.project_back(psi) + S

    def limited(self, S: Tensor) -> Tensor:
        """The norm-growth limiter; a norm of zero limits nothing (ours)."""
        norm = torch.linalg.norm(S).item()
        limit = GAMMA * self.S_norm
        if self.S_norm > 0 and norm > limit:
            S, norm = S * (limit / norm), limit
        self.S_norm = norm
        return S
