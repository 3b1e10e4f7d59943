"""How noisy a batch's gradient is, and how large a batch has to be for the noise to be small.

The tests of adaptive sampling (Byrd et al. 2012, Bollapragada et al. 2018) as AdAdaGrad (Lau et al.
2024, arXiv 2402.11215) uses them. Everything follows from a few sums over the samples of a batch,
which add up over chunks, micro-batches and workers, so that pooling is addition.

Notation: b samples with gradients g_i, their mean ḡ, G = ‖ḡ‖², and S = Σ‖g_i − ḡ‖²/(b−1), the
trace of their covariance over all weights together. All numbers are Python's, hence float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class SampleSums(NamedTuple):
    """Sums over samples that are enough for every test; those of two chunks are added by `pool`.

    Attributes:
        num_samples: b.
        squared_norms: Σ‖g_i‖².
        inner: Σ⟨g_i, ḡ⟩.
        squared_inner: Σ⟨g_i, ḡ⟩².
    """

    num_samples: int
    squared_norms: float
    inner: float
    squared_inner: float


class GradientNoise(NamedTuple):
    """Mean and spread of a batch's gradients.

    Attributes:
        num_samples: b, at least 1.
        squared_mean: G = ‖ḡ‖².
        variance: S, at least 0.
        inner_variance: the sample variance of ⟨g_i, ḡ⟩; None where only norms are known.
        orthogonal_variance: S of g_i − ⟨g_i, ḡ⟩ḡ/G; None likewise.
    """

    num_samples: int
    squared_mean: float
    variance: float
    inner_variance: float | None = None
    orthogonal_variance: float | None = None


def pool(first: SampleSums, second: SampleSums) -> SampleSums:
    """Add the sums of two chunks of one batch, taken with the batch's mean."""
    return SampleSums(
        first.num_samples + second.num_samples,
        first.squared_norms + second.squared_norms,
        first.inner + second.inner,
        first.squared_inner + second.squared_inner,
    )


def sums_of_samples(squared_norms: Tensor, inner: Tensor) -> SampleSums:
    """Sum up a chunk in float64.

    Args:
        squared_norms: ‖g_i‖², (b,).
        inner: ⟨g_i, ḡ⟩, (b,), with the mean of the whole batch, all weights together.
    """
    norms, products = squared_norms.double(), inner.double()
    return SampleSums(
        norms.numel(), float(norms.sum()), float(products.sum()), float(products.square().sum())
    )


def noise_of_samples(sums: SampleSums, squared_mean: float) -> GradientNoise:
    """Return mean and spread of the samples of a batch, for all tests.

    S is taken about the given ḡ: if that is off by e, S is by ‖e‖² at most, where the difference of
    norms alone would be off by about 2⟨ḡ, e⟩.

    Args:
        sums: of the whole batch, at least two samples.
        squared_mean: ‖ḡ‖² of the mean that the inner products were taken with.
    """
    count, squared_norms, inner, squared_inner = sums
    deviations = squared_norms - 2.0 * inner + count * squared_mean
    variance = max(deviations, 0.0) / (count - 1)
    inner_variance = max(squared_inner - inner * inner / count, 0.0) / (count - 1)
    along_mean = inner_variance / squared_mean if squared_mean > 0 else 0.0
    return GradientNoise(
        count, squared_mean, variance, inner_variance, max(variance - along_mean, 0.0)
    )


def noise_of_shares(
    squared_shares: float, squared_mean: float, num_parts: int, num_samples: int
) -> GradientNoise:
    """Return mean and spread from norms alone, of samples or of parts that hold several.

    A batch's gradient is the sum of its parts' shares, h_j = g_j/J for J parts of equal size. The
    spread of parts of b/J samples each is J/b of that of samples, so that S is estimated without
    bias from micro-batches or workers (DDP-Norm, arXiv 2412.21124) as from samples, J = b; only
    its own variance is larger, by about b/J.

    Args:
        squared_shares: Σ‖h_j‖², of the parts' shares in the mean gradient.
        squared_mean: ‖Σh_j‖².
        num_parts: J, at least 2.
        num_samples: b, at least J.
    """
    squared_parts = num_parts * num_parts * squared_shares
    spread = max(squared_parts - num_parts * squared_mean, 0.0) / (num_parts - 1)
    return GradientNoise(num_samples, squared_mean, spread * num_samples / num_parts)


def norm_test_size(noise: GradientNoise, eta: float) -> float:
    """Return the batch at which S/b = η²G, in samples, not rounded; the test holds from there on.

    Args:
        noise: of a batch.
        eta: tolerance, above 0, may be infinite.
    """
    return _ratio(noise.variance, eta * eta * noise.squared_mean)


def inner_product_test_size(noise: GradientNoise, theta: float) -> float:
    """Return the batch at which Var⟨g_i, ḡ⟩/b = θ²G², in samples, not rounded.

    Args:
        noise: of a batch, from `noise_of_samples`.
        theta: tolerance, above 0, may be infinite.
    """
    assert noise.inner_variance is not None
    return _ratio(noise.inner_variance, theta * theta * noise.squared_mean**2)


def orthogonality_test_size(noise: GradientNoise, nu: float) -> float:
    """Return the batch at which S⊥/b = ν²G, in samples, not rounded.

    Args:
        noise: of a batch, from `noise_of_samples`.
        nu: tolerance, above 0, may be infinite.
    """
    assert noise.orthogonal_variance is not None
    return _ratio(noise.orthogonal_variance, nu * nu * noise.squared_mean)


def squared_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return Σ‖t‖² over tensors, at least one, no axes, float64."""
    norms = [torch.linalg.vector_norm(each, dtype=_wide(each)) for each in tensors]
    return torch.stack([norm.double().square() for norm in norms]).sum()


def squared_norm_of_grads(params: Iterable[Tensor]) -> float:
    """Return ‖ḡ‖² over the gradients that are there, 0 without any; synchronises the device."""
    grads = [param.grad for param in params if param.grad is not None]
    return float(squared_norm(grads)) if grads else 0.0


def inner_product(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """Return Σ⟨s, t⟩ over pairs of tensors, at least one, no axes, float64."""
    pairs = zip(first, second, strict=True)
    products = [s.to(_wide(s)) * t.to(_wide(t)) for s, t in pairs]
    return torch.stack([each.sum(dtype=torch.float64) for each in products]).sum()


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _ratio(spread: float, allowed: float) -> float:
    """The batch that a test asks for; no spread asks for none, and none is enough without mean."""
    if spread == 0.0:
        return 0.0
    return spread / allowed if allowed > 0.0 else math.inf
