"""One budget of state for many matrices: who gets how many directions.

Ours; the paper gives every matrix a ceiling of its own. A direction of a matrix is worth the share
of the matrix's gradient energy that it captures, times the matrix's size, since Adam moves every
weight by about the same. It costs bytes. Directions are bought in order of worth per byte until the
budget is spent, which is optimal up to the last direction, as worths fall within a matrix.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def allocate_ranks(
    gains: Sequence[Tensor],
    bytes_per_direction: Sequence[int],
    min_ranks: Sequence[int],
    budget: int,
) -> list[int]:
    """Divide a budget of bytes over matrices.

    Args:
        gains: for each matrix what every direction is worth, (ceiling,), falling, on the CPU.
        bytes_per_direction: for each matrix what a direction costs, at least 1.
        min_ranks: for each matrix the directions that it gets in any case.
        budget: bytes, at least those of ``min_ranks``.

    Returns:
        A rank for each matrix, from ``min_ranks`` up to its ceiling, whose bytes together do not
        exceed the budget.

    Raises:
        ValueError: if the budget does not hold the minimum ranks.
    """
    reserved = sum(rank * cost for rank, cost in zip(min_ranks, bytes_per_direction, strict=True))
    if reserved > budget:
        raise ValueError(
            f"a memory_budget of {budget} bytes does not hold the minimum ranks, which take "
            f"{reserved}; raise it, or lower min_rank"
        )
    if not gains:
        return []
    offered = [
        gain[min_rank:] / cost
        for gain, min_rank, cost in zip(gains, min_ranks, bytes_per_direction, strict=True)
    ]
    owner = torch.cat([torch.full((len(part),), i) for i, part in enumerate(offered)])
    # Worths fall within a matrix, and a stable sort keeps them in that order where they are equal.
    order = torch.cat(offered).sort(descending=True, stable=True).indices
    owner = owner[order]
    costs = torch.tensor(bytes_per_direction, dtype=torch.float64)[owner]
    num_bought = int((costs.cumsum(0) <= budget - reserved).sum())
    bought = torch.bincount(owner[:num_bought], minlength=len(gains))
    return [rank + int(more) for rank, more in zip(min_ranks, bought, strict=True)]


def gains_of(energies: Tensor, total: float, num_weights: int) -> Tensor:
    """What each direction of a matrix is worth.

    Args:
        energies: (ceiling,), energy along each principal direction, falling.
        total: ‖G‖²_F, greater than 0.
        num_weights: elements of the matrix, or of all matrices of a stack.
    """
    return energies * (num_weights / total)


def gains_before_any_gradient(ceiling: int, num_weights: int) -> Tensor:
    """The same for a matrix that has shown no gradient: falling as 1/i, and summing to its size."""
    falling = 1.0 / torch.arange(1, ceiling + 1, dtype=torch.float64)
    return falling * (num_weights / falling.sum())
