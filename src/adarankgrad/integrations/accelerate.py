"""`SubspaceOptimizer.accumulate_in_backward` for training loops with accelerate."""

from __future__ import annotations

from typing import Any

from torch import nn

from adarankgrad.optim.accumulation import BackwardAccumulation
from adarankgrad.optim.engine import SubspaceOptimizer


def accumulate_in_backward(
    accelerator: Any, optimizer: Any, model: nn.Module
) -> BackwardAccumulation:
    """Project gradients in the backward pass, over the accelerator's micro-batches.

    Args:
        accelerator: an ``accelerate.Accelerator``; its ``gradient_accumulation_steps`` is the
            number of micro-batches.
        optimizer: one of this package, as it is or as ``accelerator.prepare`` returns it.
        model: as it is or as ``accelerator.prepare`` returns it, in one process.

    Returns:
        A handle whose ``remove()`` ends it.

    Raises:
        ValueError: if the optimizer is of another package, or cannot do it
            (`SubspaceOptimizer.accumulate_in_backward`).

    Example:
        >>> model, optimizer = accelerator.prepare(model, optimizer)  # doctest: +SKIP
        >>> accumulate_in_backward(accelerator, optimizer, model)  # doctest: +SKIP
    """
    count = accelerator.gradient_accumulation_steps
    return unwrapped(optimizer).accumulate_in_backward(model, num_micro_batches=count)


def unwrapped(optimizer: Any) -> SubspaceOptimizer:
    """Return the optimizer in accelerate's wrappers.

    Raises:
        ValueError: if it is of another package.
    """
    inner = optimizer
    while not isinstance(inner, SubspaceOptimizer):
        if not hasattr(inner, "optimizer"):
            raise ValueError(
                "this needs a projecting optimizer of adarankgrad, got "
                f"{type(inner).__module__}.{type(inner).__name__}"
            )
        inner = inner.optimizer
    return inner
