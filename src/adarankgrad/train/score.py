"""What tells the better of two evaluations, whether of one run or of several."""

from __future__ import annotations

from collections.abc import Mapping

LOSS = "loss"


def is_higher_better(metric: str) -> bool:
    """Tell the direction of a metric: every one but the loss is a share or a correlation."""
    return metric != LOSS


def score_of(metrics: Mapping[str, float], metric: str) -> list[float]:
    """Return what evaluations are compared by, first number first; higher is better.

    Args:
        metrics: Of one evaluation, with ``loss`` among them, which decides between equals.
        metric: What it is judged by.
    """
    loss = -metrics[LOSS]
    return [metrics[metric], loss] if is_higher_better(metric) else [loss]
