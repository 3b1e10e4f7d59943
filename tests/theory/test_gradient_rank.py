"""Lemma 1 of AdaRankGrad: where gradients become rank one, at which rate, and where they do not.

Under plain gradient descent with step η on a loss whose gradient is G = (1/N) Σ (B_i W C_i − A_i),
B_i and C_i positive semidefinite, vec G_t = (I − η S)ᵗ vec G_0 with S = (1/N) Σ C_i ⊗ B_i. With
λ₁ < λ₂ the smallest distinct eigenvalues of S, what lies outside the λ₁-eigenspace dies out like
((1 − ηλ₂)/(1 − ηλ₁))ᵗ. The paper concludes that κ(t), the share of energy outside rank one, falls
geometrically. That holds if the λ₁-part of G_0 is itself a matrix of rank one, and only then.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from .spectra import energy_rank, kappa, stable_rank, subspace_descent

NUM_ROWS, NUM_COLS = 8, 10
STEP_SIZE = 1.0


def gaussian(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def linear_layer(input_variances: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs X (n×N) with X Xᵀ/N of exactly these eigenvalues, and targets Y = W* X."""
    num_inputs, num_samples = len(input_variances), 40
    directions = torch.linalg.qr(gaussian(num_inputs, num_inputs, seed=seed)).Q
    samples = torch.linalg.qr(gaussian(num_samples, num_inputs, seed=seed + 1)).Q
    inputs = math.sqrt(num_samples) * directions * input_variances.sqrt() @ samples.mT
    return inputs, gaussian(NUM_ROWS, num_inputs, seed=seed + 2) @ inputs


def gradients_of_descent(inputs: Tensor, targets: Tensor, num_steps: int) -> list[Tensor]:
    """Gradients of the mean squared error of one linear layer, by autograd, full batch."""
    weight = torch.zeros(len(targets), len(inputs), dtype=torch.float64, requires_grad=True)
    gradients = []
    for _ in range(num_steps):
        loss = (weight @ inputs - targets).square().sum() / (2 * inputs.shape[1])
        (grad,) = torch.autograd.grad(loss, weight)
        gradients.append(grad)
        weight = (weight - STEP_SIZE * grad).detach().requires_grad_()
    return gradients


def anisotropic_layer() -> tuple[Tensor, Tensor]:
    """Input variances 0.1, 0.2, … 1: B = I, C = Σ_x, with a simple smallest eigenvalue 0.1."""
    return linear_layer(torch.arange(1, 11, dtype=torch.float64) / 10)


# T1: where it holds.


def test_with_anisotropic_inputs_kappa_falls_at_the_predicted_rate():
    """Slope of log κ: 2 ln((1 − ηλ₂)/(1 − ηλ₁)) = 2 ln(0.8/0.9) = −0.2356.

    The λ₁-part of G_0 is g q₁ᵀ for the one eigenvector q₁: rank one. Terms of λ₃ add
    (0.7/0.8)^120 = 1e-7 at t = 60.
    """
    kappas = [kappa(grad) for grad in gradients_of_descent(*anisotropic_layer(), 101)]
    slope = math.log(kappas[100] / kappas[60]) / 40
    assert slope == pytest.approx(2 * math.log(0.8 / 0.9), rel=1e-4)
    assert kappas[0] > 0.4
    assert kappas[100] < 1e-9


def test_the_limit_is_the_slowest_direction_and_comes_when_the_gradient_is_nearly_gone():
    """G_t tends to g q₁ᵀ, with q₁ of the *smallest* input variance.

    So early shrinkage of rank is not what the lemma explains: κ first falls below 0.01 at t = 28,
    when 0.2 % of the gradient's norm is left.
    """
    inputs, targets = anisotropic_layer()
    gradients = gradients_of_descent(inputs, targets, 201)
    _, vectors = torch.linalg.eigh(inputs @ inputs.mT)
    _, _, right = torch.linalg.svd(gradients[200])
    assert abs(vectors[:, 0] @ right[0]).item() == pytest.approx(1.0, abs=1e-9)
    first_low = next(step for step, grad in enumerate(gradients) if kappa(grad) < 0.01)
    left = (gradients[first_low].norm() / gradients[0].norm()).item()
    assert first_low > 10
    assert left < 0.01


def test_the_energy_rank_of_plain_gradient_descent_falls_to_one():
    gradients = gradients_of_descent(*anisotropic_layer(), 101)
    ranks = [energy_rank(grad, 0.99) for grad in gradients]
    assert ranks[0] > 4
    assert ranks[100] == 1
    assert all(later <= earlier for earlier, later in zip(ranks, ranks[1:], strict=False))


# The same layer, trained by the method instead of plain descent.


@pytest.mark.parametrize("refresh_gap", [1, 10])
def test_descent_in_adaptive_bases_lowers_the_rank_but_not_to_one(refresh_gap):
    """Lemma 1 is about plain descent; the method leaves what is outside its basis untouched.

    At energy γ a refresh ignores up to 1 − γ of the energy; the ignored part does not shrink while
    the rest does, and is the strongest part at a later refresh. On the layer of T1, where plain
    descent has κ = 1.4e-20 after 200 steps, this stays above 0.05, and ranks at energy 0.9
    fall from 4 to between 2 and 3.
    """
    inputs, targets = anisotropic_layer()
    weight = torch.nn.Parameter(torch.zeros(NUM_ROWS, NUM_COLS, dtype=torch.float64))
    optimizer = subspace_descent([weight], STEP_SIZE, energy=0.9, refresh_max_gap=refresh_gap)
    kappas, ranks, norms = [], [], []
    for _ in range(200):
        grad = (weight.detach() @ inputs - targets) @ inputs.mT / inputs.shape[1]
        weight.grad = grad
        kappas.append(kappa(grad))
        norms.append(grad.norm().item())
        optimizer.step()
        ranks.append(optimizer.report().layers[0].rank)
    assert norms[-1] < 1e-5 * norms[0]  # it does converge
    assert min(kappas) > 0.05
    assert ranks[0] == 4
    assert 2 <= sum(ranks[100:]) / 100 <= 3


# T2: isotropic inputs.


def test_with_isotropic_inputs_kappa_never_moves():
    """Σ_x = I: every eigenvalue is equal and G_t = (1 − η)ᵗ G_0, a multiple of the first gradient.

    With η = 1 and unit variance the first step would finish, hence variance 0.5.
    """
    inputs, targets = linear_layer(torch.full((NUM_COLS,), 0.5, dtype=torch.float64))
    gradients = gradients_of_descent(inputs, targets, 36)
    for step, grad in enumerate(gradients):
        assert grad.norm().item() == pytest.approx(0.5**step * gradients[0].norm().item())
        assert kappa(grad) == pytest.approx(kappa(gradients[0]), rel=1e-4)
        assert energy_rank(grad, 0.9) == energy_rank(gradients[0], 0.9)
    assert kappa(gradients[0]) > 0.4


# T3: sums of more than one term.


def psd(size: int, rank: int, seed: int) -> Tensor:
    factor = gaussian(size, rank, seed=seed)
    return factor @ factor.mT / rank


def descent_of_sum(lefts: list[Tensor], rights: list[Tensor], num_steps: int) -> list[Tensor]:
    """Unit-norm multiples of the gradients of a general sum; only their direction matters here.

    G ← G − η (1/N) Σ B_i G C_i, with η the inverse of S's largest eigenvalue.
    """
    eigenvalues, _ = eigensystem_of_sum(lefts, rights)
    gradient = gaussian(len(lefts[0]), len(rights[0]), seed=99)
    left, right = torch.stack(lefts), torch.stack(rights)
    directions = []
    for _ in range(num_steps):
        directions.append(gradient / gradient.norm())
        change = (left @ directions[-1] @ right).mean(0)
        gradient = directions[-1] - change / eigenvalues[-1]
    return directions


def eigensystem_of_sum(lefts: list[Tensor], rights: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Eigenvalues of S = (1/N) Σ B_i ⊗ C_i, ascending, and its eigenvectors as matrices.

    For row-major vec, vec(B G C) = (B ⊗ C) vec G with C symmetric.
    """
    pairs = zip(lefts, rights, strict=True)
    system = sum(torch.kron(left, right) for left, right in pairs) / len(lefts)
    eigenvalues, vectors = torch.linalg.eigh(system)
    return eigenvalues, vectors.mT.reshape(-1, len(lefts[0]), len(rights[0]))


@pytest.mark.parametrize("seed", range(4))
def test_three_full_terms_converge_to_an_eigenvector_that_is_not_of_rank_one(seed):
    """The limit is S's eigenvector of the smallest eigenvalue; its κ predicts the plateau."""
    lefts = [psd(4, 12, seed=10 * seed + index) for index in range(3)]
    rights = [psd(5, 12, seed=100 + 10 * seed + index) for index in range(3)]
    eigenvalues, vectors = eigensystem_of_sum(lefts, rights)
    rate = (1 - eigenvalues[1] / eigenvalues[-1]) / (1 - eigenvalues[0] / eigenvalues[-1])
    num_steps = math.ceil(math.log(1e-10) / math.log(rate))
    directions = descent_of_sum(lefts, rights, num_steps)
    plateau = kappa(vectors[0])
    assert plateau > 1e-3
    assert kappa(directions[-1]) == pytest.approx(plateau, rel=1e-3)
    assert kappa(directions[num_steps // 2]) == pytest.approx(plateau, rel=0.05)


def test_a_single_term_does_converge_to_rank_one():
    """The control: S = B ⊗ C has the eigenvector u ⊗ v."""
    lefts, rights = [psd(4, 12, seed=1)], [psd(5, 12, seed=2)]
    eigenvalues, vectors = eigensystem_of_sum(lefts, rights)
    rate = (1 - eigenvalues[1] / eigenvalues[-1]) / (1 - eigenvalues[0] / eigenvalues[-1])
    directions = descent_of_sum(lefts, rights, math.ceil(math.log(1e-6) / math.log(rate)))
    assert kappa(vectors[0]) < 1e-12
    assert kappa(directions[-1]) < 1e-10


@pytest.mark.parametrize("num_terms", [80, 160])
def test_many_rank_one_terms_leave_the_gradient_far_from_rank_one(num_terms):
    """As in layers fed by sequences: B_i = b bᵀ and C_i = c cᵀ, each sample its own.

    Measured: κ of 0.66, 0.33, 0.41 and 0.49 for 80, 160, 320 and 640 terms, and stable ranks of
    2.9, 1.5, 1.7 and 2.0, from a thousand steps on.
    """
    lefts = [psd(NUM_ROWS, 1, seed=index) for index in range(num_terms)]
    rights = [psd(NUM_COLS, 1, seed=1000 + index) for index in range(num_terms)]
    directions = descent_of_sum(lefts, rights, 1500)
    late = [kappa(directions[step]) for step in (1000, 1499)]
    assert min(late) > 0.3
    assert stable_rank(directions[-1]) == pytest.approx(1 / (1 - late[-1]))


# T4: noise.


def test_noise_makes_the_gradient_full_again_once_it_exceeds_the_signal():
    """κ falls while signal rules and ends at the noise's own κ, 0.65 for 8×10 Gaussians.

    The signal's λ₁-part is about 0.1·√8·0.9ᵗ; it meets noise of norm 10⁻⁴·√80 near t = 54.
    """
    gradients = gradients_of_descent(*anisotropic_layer(), 301)
    noises = [gaussian(NUM_ROWS, NUM_COLS, seed=step) for step in range(301)]
    seen = [grad + 1e-4 * noise for grad, noise in zip(gradients, noises, strict=True)]
    kappas = [kappa(grad) for grad in seen]
    noise_kappa = sum(kappa(noise) for noise in noises) / len(noises)
    late = sum(kappas[200:]) / len(kappas[200:])
    assert kappas[0] > 0.4
    assert min(kappas) < 0.05
    assert 20 < kappas.index(min(kappas)) < 60
    assert noise_kappa == pytest.approx(0.65, abs=0.02)
    assert late == pytest.approx(noise_kappa, abs=0.02)


def test_rounding_alone_counts_as_noise():
    """In float32 the residual W X − Y cannot fall below its rounding, so κ rises again."""
    inputs, targets = anisotropic_layer()
    weight = torch.zeros(NUM_ROWS, NUM_COLS)
    single_inputs, single_targets = inputs.float(), targets.float()
    kappas = []
    for _ in range(400):
        grad = (weight @ single_inputs - single_targets) @ single_inputs.mT / inputs.shape[1]
        kappas.append(kappa(grad))
        weight = weight - STEP_SIZE * grad
    assert min(kappas) < 1e-3
    assert kappas[-1] > 0.1
