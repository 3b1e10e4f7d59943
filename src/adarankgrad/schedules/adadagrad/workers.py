"""Sums of squared shares over the workers of data parallel training."""

from __future__ import annotations

import torch
import torch.distributed as dist


def add_over_workers(
    squared_shares: float,
    num_micro_batches: int,
    device: torch.device,
    group: dist.ProcessGroup | None,
) -> tuple[float, int]:
    """Add Σ‖h_j‖² over workers, whose gradients are averaged afterwards; one process adds nothing.

    Args:
        squared_shares: of this worker's parts, before its gradient is averaged with the others'.
        num_micro_batches: that this worker took.
        device: of the numbers that are sent, three.
        group: of the workers; None: the default one, if there is any.

    Returns:
        Σ‖h_j/W‖² over all workers' parts, and the number of workers W.

    Raises:
        ValueError: workers took different numbers of micro-batches.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return squared_shares, 1
    num_workers = dist.get_world_size(group)
    # With the square, every worker sees whether all agree: the mean of squares is a mean squared.
    mine = [squared_shares, float(num_micro_batches), float(num_micro_batches) ** 2]
    numbers = torch.tensor(mine, dtype=torch.float64, device=device)
    dist.all_reduce(numbers, group=group)
    total, count, squared = numbers.tolist()
    if squared * num_workers != count * count:
        raise ValueError(
            f"workers took different numbers of micro-batches, this one {num_micro_batches}: the "
            "tests need the same of each"
        )
    return total / num_workers**2, num_workers
