"""Adam's direction from a gradient and its moments (arXiv 1412.6980, Algorithm 1)."""

from __future__ import annotations

import math
from typing import Literal, get_args

from torch import Tensor

AdamConvention = Literal["torch", "transformers"]
ADAM_CONVENTIONS: tuple[str, ...] = get_args(AdamConvention)
SMALLEST_EPS = 1e-22
"""Taken for a smaller eps: the square of a gradient below it is zero in float32."""


def corrected_eps(eps: float, convention: AdamConvention, *, step: int, beta2: float) -> float:
    """Return the eps that `adam_direction` needs for a convention.

    Conventions:
        ``torch``: eps is added to the bias-corrected root √v̂, as in ``torch.optim.AdamW``.
        ``transformers``: to the root √v before its correction, as in the AdamW that transformers
            had and that GaLore's and Fira's packages copy. On the corrected root it weighs
            1/√(1 − β₂^t) times as much.

    Args:
        eps: at least 0, in units of the gradient.
        convention: one of the above.
        step: updates that the moments will have seen, at least 1.
        beta2: decay rate of the second moment, in [0, 1).
    """
    return eps if convention == "torch" else eps / math.sqrt(1.0 - beta2**step)


def weight_factors(
    lr: float, weight_decay: float, convention: AdamConvention
) -> tuple[float, float]:
    """Return the factors on weight and update, in that order, of one decoupled-decay step.

    torch decays the weight before the update is subtracted, transformers afterwards, so that the
    update decays with it.
    """
    decay = 1.0 - lr * weight_decay
    return decay, lr if convention == "torch" else lr * decay


def adam_direction(
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    seen: Tensor,
    *,
    step: int,
    betas: tuple[float, float],
    eps: float,
) -> Tensor:
    """Update both moments and return the bias-corrected direction m̂ / (√v̂ + eps).

    Same arithmetic as ``torch.optim.AdamW`` (eps is added to the corrected root), but for the
    second moment's bias correction, which each row has for itself: ``seen`` is the running
    average of ones, 1 − β₂^t after t updates from zero.

    Args:
        grad: gradient, any shape, float32 or float64.
        exp_avg: first moment, same shape; modified in place.
        exp_avg_sq: second moment, same shape, not negative; modified in place.
        seen: (..., 1) in [0, 1], share of the second moment's average seen so far, broadcast over
            rows; modified in place.
        step: updates the first moment will have seen after this one, at least 1.
        betas: decay rates, each in [0, 1).
        eps: at least 0, in units of the gradient.

    Returns:
        The direction, newly allocated, shaped as ``grad``; its entries are of order 1.

    Memory: one temporary, the result.
    """
    beta1, beta2 = betas
    exp_avg.lerp_(grad, 1.0 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
    seen.mul_(beta2).add_(1.0 - beta2)
    first_correction = 1.0 - beta1**step
    root = exp_avg_sq.sqrt().div_(seen.sqrt()).add_(max(eps, SMALLEST_EPS)).mul_(first_correction)
    return root.reciprocal_().mul_(exp_avg)
