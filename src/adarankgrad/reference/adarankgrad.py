"""AdaRankGrad (arXiv 2410.17881) for one matrix, in float64, equation by equation.

Letters, as in the paper, after the projected side has been brought to the left:

- W, G (m×n): weight and gradient. Q (m×r): basis. Ĝ = QᵀG (r×n): projected gradient.
- M, V (r×n): Adam's moments in the basis. N (r×n): Adam's direction.
- R = Q_newᵀ Q_old (r_new×r_old): rotation between two bases.
- η, α, λ: step size, scale of the lifted update, decoupled weight decay. ς: refresh threshold.
- γ: share of ‖G‖²_F that the basis has to capture; the paper's residual ξ gives γ = 1 − ξ².

The parts are `SSRF` (subspace selection by a randomized range finder), `IASS` (information-based
adaptive subspace selection) and `moment_transformation`; `AdaRankGrad.step` is Algorithm 1 of the
paper, one gradient at a time.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Refresh = str


def SSRF(G: Tensor, k: int, Omega: Tensor, power_iterations: int = 0) -> Tensor:
    """Subspace selection by randomized range finding: Q = qr(G Ω), m×min(k, m, n).

    Args:
        G: m×n.
        k: columns of the sketch.
        Omega: Gaussian, n×k or wider.
        power_iterations: rounds of G Gᵀ before the factorisation, with a QR in between.
    """
    k = min(k, *G.shape)
    Q: Tensor = torch.linalg.qr(G @ Omega[:, :k]).Q
    for _ in range(power_iterations):
        Q = torch.linalg.qr(G @ torch.linalg.qr(G.T @ Q).Q).Q
    return Q


def IASS(
    G: Tensor,
    Q: Tensor,
    *,
    gamma: float,
    r_min: int,
    r_max: int,
    r_old: int = 0,
    monotone: bool = False,
    rank_multiple: int = 1,
) -> Tensor:
    """Information-based adaptive subspace selection: the first r principal directions inside Q.

    r = min{ r : Σ_{i≤r} σ_i²(QᵀG) ≥ γ ‖G‖²_F }, found by walking, then rounded and clamped. The
    paper is transcribed with "sup", which would always give r_max.
    """
    U: Tensor
    sigma: Tensor
    U, sigma, _ = torch.linalg.svd(Q.T @ G, full_matrices=False)
    # γ = 1 has to be reachable: the sum of all σ² may fall short of ‖G‖² by rounding.
    wanted = gamma * G.square().sum().item() * (1 - 1e-14)
    r, captured = 1, sigma[0].item() ** 2
    while captured < wanted and r < len(sigma):
        captured += sigma[r].item() ** 2
        r += 1
    if captured < wanted:
        r = len(sigma)
    r = math.ceil(r / rank_multiple) * rank_multiple
    if monotone and r_old > 0:
        r = min(r, r_old)
    r = min(max(r, r_min), r_max, len(sigma))
    return Q @ U[:, :r]


def moment_transformation(
    M: Tensor, V: Tensor, w: Tensor, R: Tensor, second_moment: str, *, M_correction: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Carry M, V and w from the old basis to the new one.

    w (r×1) is ours: what each direction has seen of V's running average, so that V̂ = V / w.
    M̂ = M / M_correction. ``published`` is |R V|: the paper's V ← R V turns negative, and Adam
    takes its root.
    """
    r_new, r_old = R.shape
    if second_moment in ("reset", "keep"):
        shared = min(r_new, r_old) if second_moment == "keep" else 0
        carried = [X.new_zeros(r_new, X.shape[1]) for X in (M, V, w)]
        for X_new, X in zip(carried, (M, V, w), strict=True):
            X_new[:shared] = X[:shared]
        return carried[0], carried[1], carried[2]
    share = (R * R).sum(1, keepdim=True)
    w_new = ((R * R) @ w).clamp(max=1)
    if second_moment == "published":
        return R @ M, (R @ V).abs(), w_new
    if second_moment == "squared":
        return R @ M, (R * R) @ V, w_new
    if second_moment == "ldadam":
        M_hat, V_hat = M / M_correction, torch.where(w > 0, V / w, 0.0)
        variance = ((R * R) @ (V_hat - M_hat**2) + (R @ M_hat) ** 2).abs()
        return R @ M, torch.where(share > 0, variance / share * w_new, 0.0), w_new
    raise ValueError(f"unknown second_moment {second_moment!r}")


def adam(
    G: Tensor,
    M: Tensor,
    V: Tensor,
    w: Tensor,
    t: int,
    beta1: float,
    beta2: float,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Adam (arXiv 1412.6980): the direction N and the new moments; t counts this step.

    w is the running average of ones: 1 − β2^t for moments that began t steps ago.
    """
    M = beta1 * M + (1 - beta1) * G
    V = beta2 * V + (1 - beta2) * G**2
    w = beta2 * w + (1 - beta2)
    M_hat = M / (1 - beta1**t)
    V_hat = V / w
    return M_hat / (V_hat.sqrt() + epsilon), M, V, w


def orthogonalized(S: Tensor) -> Tensor:
    """Ours: S with all singular values raised to about one, at the size of Adam's steps.

    Five rounds of Muon's X ← a X + (b X Xᵀ + c (X Xᵀ)²) X, from X = S / ‖S‖_F; then 0.2 √max(m, n).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    norm = torch.linalg.norm(S).item()
    X = S / norm if norm > 0 else S
    for _ in range(5):
        A = X @ X.T
        X = a * X + (b * A + c * A @ A) @ X
    return 0.2 * math.sqrt(max(S.shape)) * X


class AdamW:
    """Adam with decoupled weight decay for one tensor: what is not projected gets this."""

    def __init__(
        self,
        W: Tensor,
        *,
        eta: float,
        beta1: float = 0.9,
        beta2: float = 0.999,
        epsilon: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        self.W = W.detach().to(torch.float64).clone()
        self.eta, self.beta1, self.beta2 = eta, beta1, beta2
        self.epsilon, self.weight_decay = epsilon, weight_decay
        self.M, self.V, self.t = torch.zeros_like(self.W), torch.zeros_like(self.W), 0
        self.w = torch.zeros((), dtype=torch.float64)

    def step(self, G: Tensor) -> Tensor:
        """Apply one gradient and return the new weight."""
        self.t += 1
        N, self.M, self.V, self.w = adam(
            G.to(torch.float64),
            self.M,
            self.V,
            self.w,
            self.t,
            self.beta1,
            self.beta2,
            self.epsilon,
        )
        self.W = self.W - self.eta * N - self.eta * self.weight_decay * self.W
        return self.W


class AdaRankGrad:
    """Algorithm 1 for one matrix, gradient by gradient.

    Args:
        W: initial weight; copied to float64.
        eta: step size.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        epsilon: added to the root of the corrected second moment.
        weight_decay: λ; the decay is η λ W, not multiplied by α.
        alpha: scale of the lifted update.
        gamma: share of the energy to capture.
        r_min: floor of the rank.
        r_max: ceiling of the rank.
        monotone: never let the rank grow.
        rank_multiple: round ranks up to a multiple of this.
        side: ``std`` projects the short dimension (rows ≥ cols ⇒ right), ``reverse_std`` the long
            one, ``left`` and ``right`` the rows and the columns.
        max_gap: steps after which the basis is replaced at the latest.
        min_gap: the criteria below are consulted at multiples of this many steps.
        sigma_abs: ς: refresh when ‖Ĝ‖_F ≤ ς.
        sigma_rel: refresh when ‖Ĝ‖_F ≤ this × ‖Ĝ‖_F at the last refresh.
        tau: refresh when ‖Ĝ‖²_F / ‖G‖²_F < τ.
        second_moment: a rule of `moment_transformation`.
        per_direction: correct V's bias direction by direction (ours); otherwise by t alone.
        orthogonal: inside the basis, step along `orthogonalized` M in place of Adam's N (SUMO).
        rho: factor on the step outside the basis, `orthogonalized` (ours); 0 leaves it out.
        power_iterations: of `SSRF`, where it is used.
        generator: of Ω; None means that the basis comes from an exact decomposition.

    Attributes:
        W: the weight, as stored by the caller.
        Q: the basis (m×r), or None before the first refresh.
        M: first moment (r×n).
        V: second moment (r×n).
        w: weight of V's average (r×1).
        t: updates that the moments have seen.
        since: steps taken with the present basis.
        reason: why the last refresh happened: first, max_gap, norm, energy, or none.
        refreshes: bases found so far.
        skipped: refreshes put off because the gradient was zero or not finite.
    """

    def __init__(
        self,
        W: Tensor,
        *,
        eta: float,
        r_max: int,
        r_min: int = 1,
        gamma: float = 1.0,
        beta1: float = 0.9,
        beta2: float = 0.999,
        epsilon: float = 1e-8,
        weight_decay: float = 0.0,
        alpha: float = 1.0,
        monotone: bool = False,
        rank_multiple: int = 1,
        side: str = "std",
        max_gap: int = 200,
        min_gap: int = 1,
        sigma_abs: float | None = None,
        sigma_rel: float | None = None,
        tau: float | None = None,
        second_moment: str = "squared",
        per_direction: bool = True,
        orthogonal: bool = False,
        rho: float = 0.0,
        power_iterations: int = 2,
        generator: torch.Generator | None = None,
    ) -> None:
        self.W = W.detach().to(torch.float64).clone()
        self.eta, self.alpha, self.weight_decay = eta, alpha, weight_decay
        self.beta1, self.beta2, self.epsilon = beta1, beta2, epsilon
        self.r_min, self.r_max, self.gamma = r_min, r_max, gamma
        self.monotone, self.rank_multiple = monotone, rank_multiple
        self.max_gap, self.min_gap = max_gap, min_gap
        self.sigma_abs, self.sigma_rel, self.tau = sigma_abs, sigma_rel, tau
        self.second_moment, self.per_direction = second_moment, per_direction
        self.orthogonal, self.rho = orthogonal, rho
        self.power_iterations, self.generator = power_iterations, generator
        rows, cols = W.shape
        is_tall = rows >= cols
        right = {"left": False, "right": True, "std": is_tall, "reverse_std": not is_tall}
        self.is_right = right[side]

        self.Q: Tensor | None = None
        self.t, self.since, self.refreshes, self.skipped = 0, 0, 0, 0
        self.reason: Refresh = "none"
        self.energy_at_refresh = 0.0
        num_cols = rows if self.is_right else cols
        self.M = self.V = torch.zeros(0, num_cols, dtype=torch.float64)
        self.w = torch.zeros(0, 1, dtype=torch.float64)

    @property
    def r(self) -> int:
        """The present rank; 0 before the first refresh."""
        return 0 if self.Q is None else self.Q.shape[1]

    def step(self, G: Tensor, Q: Tensor | None = None) -> Tensor:
        """Apply one gradient and return the new weight.

        Args:
            G: gradient, shaped as W.
            Q: use this basis (m×r) wherever a refresh is due, in place of an own search, so that
                a randomized search elsewhere can be followed step by step.
        """
        G = G.to(torch.float64)
        G = G.T if self.is_right else G
        reason = self.refresh_due(G)
        if reason != "none":
            if 0.0 < G.square().sum().item() < math.inf:
                self.refresh(G, reason, Q)
            else:
                self.skipped += 1
        self.since += 1
        update, outside = torch.zeros_like(G), G
        if self.Q is not None:
            G_hat = self.Q.T @ G
            self.t += 1
            N, self.M, self.V, self.w = adam(
                G_hat, self.M, self.V, self.w, self.t, self.beta1, self.beta2, self.epsilon
            )
            update = self.alpha * self.Q @ (orthogonalized(self.M) if self.orthogonal else N)
            outside = G - self.Q @ G_hat
            if torch.linalg.norm(outside) <= 0.02 * torch.linalg.norm(G_hat):
                outside = torch.zeros_like(G)  # it may be rounding of half precision
        if self.rho > 0 and self.Q is not None:
            update = update + self.rho * orthogonalized(outside)
        update = update.T if self.is_right else update
        self.W = self.W - self.eta * update - self.eta * self.weight_decay * self.W
        return self.W

    def refresh_due(self, G: Tensor) -> Refresh:
        """End of the inner loop: ‖Ĝ‖_F ≤ ς, or one of the rules that stand beside it."""
        if self.Q is None:
            return "first"
        if self.since >= self.max_gap:
            return "max_gap"
        if self.since == 0 or self.since % self.min_gap != 0:
            return "none"
        energy = (self.Q.T @ G).square().sum().item()
        if self.sigma_abs is not None and energy <= self.sigma_abs**2:
            return "norm"
        if self.sigma_rel is not None and energy <= self.sigma_rel**2 * self.energy_at_refresh:
            return "norm"
        if self.tau is not None and energy < self.tau * G.square().sum().item():
            return "energy"
        return "none"

    def refresh(self, G: Tensor, reason: Refresh, Q: Tensor | None) -> None:
        """Find the next basis (or take the one given) and carry the moments over."""
        Q_new = self.find_basis(G) if Q is None else Q.to(torch.float64)
        Q_old = self.Q
        if Q_old is None:
            r_new, n = Q_new.shape[1], G.shape[1]
            self.M = self.V = G.new_zeros(r_new, n)
            self.w = G.new_zeros(r_new, 1)
        else:
            self.M, self.V, self.w = moment_transformation(
                self.M,
                self.V,
                self.w,
                Q_new.T @ Q_old,
                self.second_moment,
                M_correction=1 - self.beta1 ** max(1, self.t),
            )
            if self.second_moment == "reset":
                self.t = 0
            if not self.per_direction:
                self.w = torch.full_like(self.w, 1 - self.beta2**self.t)
        self.Q = Q_new
        self.since = 0
        self.refreshes += 1
        self.reason = reason
        self.energy_at_refresh = (Q_new.T @ G).square().sum().item()

    def find_basis(self, G: Tensor) -> Tensor:
        """SSRF, or the exact decomposition, followed by IASS."""
        if self.generator is None:
            Q = torch.linalg.svd(G, full_matrices=False).U[:, : self.r_max]
        else:
            k = 2 * self.r_max  # as in the one public projector in the authors' style
            Omega = torch.randn(G.shape[1], k, generator=self.generator, dtype=torch.float64)
            Q = SSRF(G, k, Omega, self.power_iterations)
        return IASS(
            G,
            Q,
            gamma=self.gamma,
            r_min=self.r_min,
            r_max=self.r_max,
            r_old=self.r,
            monotone=self.monotone,
            rank_multiple=self.rank_multiple,
        )
