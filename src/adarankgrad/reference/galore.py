"""GaLore (arXiv 2403.03507, Algorithm 2) for one matrix, in float64.

Letters as in the paper: W, G (m×n): weight and gradient. P (m×r) or Q (n×r): projection. R: the
gradient in the subspace. M, V: Adam's moments of R. N: Adam's direction. T: steps between
projections. η, α, λ: step size, scale, decoupled weight decay.

The place of ε (before bias correction) and of the decay (after the step) are those of the AdamW
that the authors' code copies from transformers.
"""

from __future__ import annotations

import torch
from torch import Tensor


class GaLore:
    """Algorithm 2, gradient by gradient.

    Args:
        W: initial weight; copied to float64.
        eta: step size.
        r: rank.
        T: steps between projections.
        alpha: scale of the lifted update.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        epsilon: added to √V.
        weight_decay: λ; the decay is η λ W, after the step.
    """

    def __init__(
        self,
        W: Tensor,
        *,
        eta: float,
        r: int,
        T: int,
        alpha: float = 0.25,
        beta1: float = 0.9,
        beta2: float = 0.999,
        epsilon: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        self.W = W.detach().to(torch.float64).clone()
        self.eta, self.r, self.T, self.alpha = eta, r, T, alpha
        self.beta1, self.beta2 = beta1, beta2
        self.epsilon, self.weight_decay = epsilon, weight_decay
        self.is_right = W.shape[0] >= W.shape[1]
        self.P: Tensor | None = None
        self.M: Tensor | float = 0.0
        self.V: Tensor | float = 0.0
        self.t = 0

    def step(self, G: Tensor) -> Tensor:
        """Apply one gradient and return the new weight."""
        G = G.to(torch.float64)
        if self.t % self.T == 0:
            self.P = self.projection(G)
        self.t += 1
        R = self.project(G)
        self.M = self.beta1 * self.M + (1 - self.beta1) * R
        self.V = self.beta2 * self.V + (1 - self.beta2) * R**2
        psi = self.M / (self.V.sqrt() + self.epsilon)
        correction = (1 - self.beta2**self.t) ** 0.5 / (1 - self.beta1**self.t)
        self.W = self.W - self.eta * correction * self.direction(G, R, psi)
        self.W = self.W - self.eta * self.weight_decay * self.W
        return self.W

    def direction(self, G: Tensor, R: Tensor, psi: Tensor) -> Tensor:
        """α P ψ: what lies outside the subspace is dropped."""
        return self.alpha * self.project_back(psi)

    def projection(self, G: Tensor) -> Tensor:
        """The leading singular vectors on the shorter side; P, or Q for W with m ≥ n."""
        U: Tensor
        Vh: Tensor
        U, _, Vh = torch.linalg.svd(G, full_matrices=False)
        return Vh[: self.r].T if self.is_right else U[:, : self.r]

    def project(self, G: Tensor) -> Tensor:
        """PᵀG, or G Q."""
        assert self.P is not None
        return G @ self.P if self.is_right else self.P.T @ G

    def project_back(self, R: Tensor) -> Tensor:
        """P R, or R Qᵀ."""
        assert self.P is not None
        return R @ self.P.T if self.is_right else self.P @ R
