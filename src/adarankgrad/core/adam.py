"""Adam's direction from a gradient and its moments (arXiv 1412.6980, Algorithm 1)."""

from __future__ import annotations

from torch import Tensor


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
    root = exp_avg_sq.sqrt().div_(seen.sqrt()).add_(eps).mul_(first_correction)
    return root.reciprocal_().mul_(exp_avg)
