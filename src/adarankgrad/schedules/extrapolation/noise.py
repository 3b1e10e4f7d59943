"""Random directions to extrapolate by."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .config import Noise, Scale


def scaled_noise(
    param: Tensor,
    noise: Noise,
    scale: float | Scale,
    past: Tensor | None,
    generator: torch.Generator,
) -> Tensor | None:
    """Draw ζ for a weight.

    Args:
        param: the weight, any shape.
        noise: the distribution.
        scale: the standard deviation, or what it is measured by (`ExtrapolationConfig`).
        past: root mean square of the weight's past gradient, no axes; for scale ``"gradient"``.
        generator: on the weight's device.

    Returns:
        Float32 (float64 under a float64 weight), of the weight's shape; None where there is no past
        gradient to measure by.
    """
    drawn = _unit_noise(param, noise, generator)
    if scale == "gradient":
        return None if past is None else drawn.mul_(past)
    if scale == "layer":
        return drawn.mul_(root_mean_square(param))
    if scale == "filter":
        values = param.to(drawn.dtype)
        axes = tuple(range(1, param.dim())) if param.dim() > 1 else None
        return drawn.mul_(values.square().mean(dim=axes, keepdim=True).sqrt_())
    return drawn.mul_(scale)


def root_mean_square(values: Tensor) -> Tensor:
    """Return √mean(values²), no axes, float32 (float64 of float64 values)."""
    wide = torch.promote_types(values.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(values, dtype=wide)
    return norm / math.sqrt(max(values.numel(), 1))


def _unit_noise(param: Tensor, noise: Noise, generator: torch.Generator) -> Tensor:
    dtype = torch.promote_types(param.dtype, torch.float32)
    drawn = torch.empty(param.shape, dtype=dtype, device=param.device)
    if noise == "gaussian":
        return drawn.normal_(generator=generator)
    bound = math.sqrt(3.0)  # of variance 1
    return drawn.uniform_(-bound, bound, generator=generator)
