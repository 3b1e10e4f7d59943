"""What a step asks of all gradients together: that they are dense and finite, and not too long."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .projected_grad import EXPIRED, ProjectedGrad

Nonfinite = Literal["skip", "raise", "ignore"]
NONFINITE: tuple[str, ...] = get_args(Nonfinite)
REAL_DTYPES = {torch.float32, torch.bfloat16, torch.float16, torch.float64}
"""Of weights that can be projected; complex ones are trained by AdamW."""
_DTYPES = REAL_DTYPES | {torch.complex64, torch.complex128}


class NamedGrad(NamedTuple):
    """A gradient, dense or held in projection, and the name of its parameter."""

    name: str
    grad: Tensor


def check_usable(name: str, grad: Tensor) -> None:
    """Refuse a gradient that is sparse, of a dtype that cannot be trained in, or used already.

    Raises:
        ValueError: naming the parameter and what to do.
        RuntimeError: the same, of a gradient that has expired.
    """
    if isinstance(grad, ProjectedGrad) and grad.has_expired:
        raise RuntimeError(f"{name}: {EXPIRED}")
    if grad.layout is not torch.strided:
        raise ValueError(
            f"the gradient of {name} {tuple(grad.shape)} is sparse; only dense gradients are "
            "supported: build the embedding with sparse=False, or give it to torch.optim.SparseAdam"
        )
    if grad.dtype not in _DTYPES:
        raise ValueError(
            f"{name} {tuple(grad.shape)} is of {grad.dtype}; weights can be trained in float32, "
            "bfloat16, float16, float64, complex64 or complex128: convert it, or freeze it"
        )


def norms_of(grads: Sequence[NamedGrad]) -> list[Tensor]:
    """Return ‖G‖ of each gradient, no axes, in float32 or wider, on its device.

    Infinite for a finite gradient whose squares leave the range of that dtype: Adam's second moment
    would be infinite as well.
    """
    return [_norm(grad) for _, grad in grads]


def total_norm(norms: Sequence[Tensor]) -> float:
    """Return the norm of all gradients together. A device synchronisation."""
    if not norms:
        return 0.0
    dtype = torch.float32
    for norm in norms:
        dtype = torch.promote_types(dtype, norm.dtype)
    together = torch.stack([norm.to(norms[0].device, dtype) for norm in norms])
    return float(torch.linalg.vector_norm(together))


def clip_to(grads: Sequence[NamedGrad], norm: float, max_norm: float) -> None:
    """Scale gradients in place so that their common norm is at most ``max_norm``.

    As ``torch.nn.utils.clip_grad_norm_`` does: times max_norm / (norm + 1e-6), where below 1.

    Args:
        grads: all gradients.
        norm: their common norm, finite.
        max_norm: at least 0.
    """
    factor = max_norm / (norm + 1e-6)
    if factor < 1.0:
        for _, grad in grads:
            grad.mul_(factor)


def broken_step(grads: Sequence[NamedGrad], norms: Sequence[Tensor]) -> FloatingPointError:
    """The error of a step that is refused, since the norm of its gradients is not finite.

    Args:
        grads: all gradients.
        norms: theirs, from `norms_of`.
    """
    steps_outside = any(
        isinstance(grad, ProjectedGrad) and grad.on_dense is not None for _, grad in grads
    )
    untouched = "nothing was changed"
    if steps_outside:
        untouched += " by the step; residual steps taken in the backward pass are not undone"
    return FloatingPointError(
        f"the norm of the gradients is {total_norm(norms)}, from {_names_of_broken(grads, norms)}; "
        f"{untouched}. Lower lr, clip with max_grad_norm, or let nonfinite='skip' leave such steps "
        "out"
    )


def _names_of_broken(grads: Sequence[NamedGrad], norms: Sequence[Tensor]) -> str:
    """Up to three gradients whose norms are not finite; all together where each one is."""
    names = [g.name for g, norm in zip(grads, norms, strict=True) if not math.isfinite(norm)]
    if not names:
        return "all of them together"
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _norm(grad: Tensor) -> Tensor:
    wide = None if grad.is_complex() else torch.promote_types(grad.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(grad, dtype=wide)
    return norm
