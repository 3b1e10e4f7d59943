"""What of an optimizer can be extrapolated, and how far."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Optimizer

from .config import ExtrapolationConfig


class Member(NamedTuple):
    """A trained weight.

    Attributes:
        number: of the weight in the optimizer, as in its saved state.
        param: the weight.
        step: γ̂ now; below 0 where the optimizer maximizes.
    """

    number: int
    param: Tensor
    step: float


def members_of(optimizer: Optimizer, config: ExtrapolationConfig) -> list[Member]:
    """Return the weights that an optimizer trains, frozen ones left out.

    Raises:
        ValueError: one is sharded.
    """
    members = []
    number = 0
    for group in optimizer.param_groups:
        step = config.step * (_lr_factor(group) if config.follow_lr else 1.0)
        step = -step if group.get("maximize") else step
        for param in group["params"]:
            if hasattr(param, "placements"):
                raise ValueError(
                    f"a weight {tuple(param.shape)} is sharded, and each worker sees a part of its "
                    "gradient only; extrapolate under DDP or on one worker"
                )
            if param.requires_grad:
                members.append(Member(number, param, step))
            number += 1
    return members


def refuse_closures(optimizer: Optimizer) -> None:
    """Refuse an optimizer that computes gradients itself.

    Raises:
        ValueError: its ``step`` needs a closure.
    """
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"{type(optimizer).__name__} evaluates the loss by a closure within its step, where no "
            "extrapolated gradient can be given to it; use another optimizer"
        )


def _lr_factor(group: dict[str, Any]) -> float:
    peak = float(group.get("initial_lr", group.get("lr", 1.0)))
    return min(1.0, float(group.get("lr", 1.0)) / peak) if peak > 0 else 1.0
