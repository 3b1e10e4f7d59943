"""Gradient noise from sums: against brute force, and against what the authors' code gets wrong."""

import math

import pytest
import torch

from adarankgrad.core.gradient_noise import (
    GradientNoise,
    inner_product,
    inner_product_test_size,
    noise_of_samples,
    noise_of_shares,
    norm_test_size,
    orthogonality_test_size,
    pool,
    squared_norm,
    sums_of_samples,
)

NUM_SAMPLES = 64
# Two layers, one float32: gradients of a sample, the covariance between layers included.
SHAPES = ((5, 7), (7,))
# Sums of 64 x 42 products in float64; cancellation loses less than another factor of 100.
FLOAT64 = 1e-12


def sample_grads(noise=1.0):
    generator = torch.Generator().manual_seed(1)
    common = torch.randn(NUM_SAMPLES, 1, generator=generator, dtype=torch.float64)
    grads = []
    for shape in SHAPES:
        flat = math.prod(shape)
        mean, direction = torch.randn(2, flat, generator=generator, dtype=torch.float64)
        own = torch.randn(NUM_SAMPLES, flat, generator=generator, dtype=torch.float64)
        grads.append((mean + noise * (own + common * direction)).view(NUM_SAMPLES, *shape))
    return grads


def flat(grads):
    return torch.cat([grad.flatten(1) for grad in grads], dim=1)


def sums_of(grads, mean):
    norms = torch.stack([squared_norm(each) for each in zip(*grads, strict=True)])
    inner = torch.stack([inner_product(each, mean) for each in zip(*grads, strict=True)])
    return sums_of_samples(norms, inner)


def noise_of(grads):
    mean = [grad.mean(0) for grad in grads]
    return noise_of_samples(sums_of(grads, mean), float(squared_norm(mean)))


def test_all_numbers_equal_those_of_the_covariance_matrix():
    grads = sample_grads()
    noise, rows = noise_of(grads), flat(grads)
    mean, covariance = rows.mean(0), torch.cov(rows.T)
    squared = float(mean @ mean)
    projector = torch.eye(len(mean), dtype=torch.float64) - torch.outer(mean, mean) / squared
    assert noise.num_samples == NUM_SAMPLES
    assert noise.squared_mean == pytest.approx(squared, rel=FLOAT64)
    assert noise.variance == pytest.approx(float(covariance.trace()), rel=FLOAT64)
    along = float(mean @ covariance @ mean)
    assert noise.inner_variance == pytest.approx(along, rel=FLOAT64)
    across = float((projector @ covariance @ projector).trace())
    assert noise.orthogonal_variance == pytest.approx(across, rel=FLOAT64)
    assert noise.variance == pytest.approx(across + along / squared, rel=FLOAT64)


@pytest.mark.parametrize("size", [64, 16, 4, 2])
def test_splitting_the_batch_changes_nothing(size):
    # The authors' code mixes variances of divisor m - 1 and m: 1.48 times too much for 32 x 2.
    grads = sample_grads()
    whole = noise_of(grads)
    mean = [grad.mean(0) for grad in grads]
    chunks = zip(*(grad.split(size) for grad in grads), strict=True)
    first, *others = (sums_of(chunk, mean) for chunk in chunks)
    for sums in others:
        first = pool(first, sums)
    pooled = noise_of_samples(first, whole.squared_mean)
    assert pooled == pytest.approx(whole, rel=FLOAT64)


def test_layers_are_tested_together():
    # Layer by layer and summed, as the authors' code does it, drops covariance between layers.
    grads = sample_grads()
    noise = noise_of(grads)
    parts = [noise_of([grad]) for grad in grads]
    assert sum(part.variance for part in parts) == pytest.approx(noise.variance, rel=FLOAT64)
    # Layers share a random factor, so that their inner products are correlated.
    assert sum(part.inner_variance for part in parts) != pytest.approx(
        noise.inner_variance, rel=0.05
    )
    assert sum(part.orthogonal_variance for part in parts) != pytest.approx(
        noise.orthogonal_variance, rel=0.01
    )


def test_norms_alone_give_the_variance():
    grads = sample_grads()
    rows = flat(grads)
    shares = float((rows / NUM_SAMPLES).square().sum())
    noise = noise_of_shares(shares, noise_of(grads).squared_mean, NUM_SAMPLES, NUM_SAMPLES)
    assert noise.variance == pytest.approx(noise_of(grads).variance, rel=FLOAT64)


def test_micro_batches_estimate_the_variance_without_bias():
    rows, num_parts, num_draws = flat(sample_grads()), 8, 2000
    truth = float(torch.cov(rows.T).trace())
    squared_mean = float(rows.mean(0).square().sum())
    generator = torch.Generator().manual_seed(2)
    estimates = []
    for _ in range(num_draws):
        order = torch.randperm(NUM_SAMPLES, generator=generator)
        shares = rows[order].view(num_parts, -1, rows.shape[1]).mean(1) / num_parts
        squared = float(shares.square().sum())
        estimates.append(noise_of_shares(squared, squared_mean, num_parts, NUM_SAMPLES).variance)
    mean, deviation = float(torch.tensor(estimates).mean()), float(torch.tensor(estimates).std())
    # Four standard errors of the mean of independent draws.
    assert abs(mean - truth) < 4 * deviation / num_draws**0.5


def test_a_mean_that_is_a_little_off_hardly_matters():
    # As with sums in lower precision: S is off by the square of the error only.
    grads = sample_grads(noise=1e-3)
    mean = [grad.mean(0) + 1e-4 for grad in grads]
    sums = sums_of(grads, mean)
    noise = noise_of_samples(sums, float(squared_norm(mean)))
    error = 1e-4**2 * 42 * NUM_SAMPLES / (NUM_SAMPLES - 1)
    assert noise.variance == pytest.approx(noise_of(grads).variance + error, rel=1e-6)


def test_equal_gradients_have_no_noise_and_ask_for_nothing():
    grads = [grad[:1].expand(8, *grad.shape[1:]) for grad in sample_grads()]
    noise = noise_of(grads)
    for size in (norm_test_size, inner_product_test_size, orthogonality_test_size):
        # What rounding leaves: 1e-12 of the mean, over a tolerance of 0.1 squared.
        assert size(noise, 0.1) < 1e-9


def test_tests_ask_for_the_batch_at_which_they_hold():
    noise = GradientNoise(8, 4.0, 10.0, 3.0, 9.25)
    assert norm_test_size(noise, 0.5) == 10.0 / (0.25 * 4.0)
    assert inner_product_test_size(noise, 0.5) == 3.0 / (0.25 * 16.0)
    assert orthogonality_test_size(noise, 0.5) == 9.25 / (0.25 * 4.0)


def test_no_batch_is_large_enough_without_a_mean_and_any_is_with_an_infinite_tolerance():
    assert norm_test_size(GradientNoise(8, 0.0, 1.0), 0.1) == math.inf
    assert norm_test_size(GradientNoise(8, 0.0, 0.0), 0.1) == 0.0
    assert norm_test_size(GradientNoise(8, 1.0, 1.0), math.inf) == 0.0
