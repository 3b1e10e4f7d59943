"""Which carry is closest to the second moment that Adam would hold in the new basis."""

from __future__ import annotations

import pytest
import torch

from adarankgrad.core.carry import CARRIES, carry_moments

from .moments import BETAS, correction, moments_of_age


def second_moment_errors(rotation, mean_size, num_steps=2000, rank=8, num_cols=40):
    """Relative error of each carried v against the v that Adam would hold in the new basis.

    Gradients have a mean, and noise whose size differs from direction to direction.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (rank, num_cols)
    mean = mean_size * torch.randn(shape, generator=generator, dtype=torch.float64)
    noise_size = torch.logspace(0, -1, rank, dtype=torch.float64).unsqueeze(-1)
    exp_avg, exp_avg_sq, true_sq = torch.zeros(3, *shape, dtype=torch.float64).unbind()
    for _ in range(num_steps):
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        grad = mean + noise_size * noise
        exp_avg = BETAS[0] * exp_avg + (1 - BETAS[0]) * grad
        exp_avg_sq = BETAS[1] * exp_avg_sq + (1 - BETAS[1]) * grad.square()
        true_sq = BETAS[1] * true_sq + (1 - BETAS[1]) * (rotation @ grad).square()
    true_norm = torch.linalg.vector_norm(true_sq)
    errors = {}
    moments = moments_of_age(exp_avg, exp_avg_sq, num_steps)
    for method in CARRIES:
        carried = carry_moments(moments, rotation, method, first_correction=correction(num_steps))
        error = torch.linalg.vector_norm(carried.exp_avg_sq - true_sq) / true_norm
        errors[method] = error.item()
    return errors


def rotation_by(angle, rank=8):
    """exp(angle · A) for a random skew matrix A of norm 1."""
    generator = torch.Generator().manual_seed(5)
    gaussian = torch.randn(rank, rank, generator=generator, dtype=torch.float64)
    skew = gaussian - gaussian.mT
    return torch.linalg.matrix_exp(angle * skew / torch.linalg.matrix_norm(skew, 2))


# Measured: angle, size of the mean -> error of each carry; the tests below hold the ordering.
#   0.1, 0   squared .001  ldadam .002  published .032  keep .004  reset 1
#   1.5, 0   squared .021  ldadam .045  published .496  keep .703  reset 1
#   0.1, 1   squared .065  ldadam .008  published .088  keep .066  reset 1
#   1.5, 1   squared .604  ldadam .087  published .745  keep .801  reset 1
@pytest.mark.parametrize("angle", [0.1, 1.5])
def test_without_a_mean_squared_is_closest_and_published_far_off(angle):
    """Noise without mean, independent by direction, has exactly the variances (R∘R) v.

    What is left is the spread of an average over 1/(1 − β₂) squares, weighted by how much turns.
    """
    errors = second_moment_errors(rotation_by(angle), mean_size=0.0)
    assert errors["squared"] < errors["ldadam"] < 0.1
    assert errors["published"] > 5 * errors["squared"]
    assert errors["keep"] > 2 * errors["squared"]
    assert errors["reset"] == 1.0


@pytest.mark.parametrize("angle", [0.1, 1.5])
def test_with_a_mean_as_large_as_the_noise_ldadam_is_closest(angle):
    """Means rotate as a whole and interfere; squared takes them for noise."""
    errors = second_moment_errors(rotation_by(angle), mean_size=1.0)
    assert errors["ldadam"] < 0.1
    assert 2 * errors["ldadam"] < errors["squared"] < errors["published"] < errors["reset"]
