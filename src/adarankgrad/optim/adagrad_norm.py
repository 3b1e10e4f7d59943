"""AdaGradNorm (Ward et al. 2018, arXiv 1806.01811): one step size for all weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..core.checks import check_number
from .gradient_checks import NamedGrad, check_usable, norms_of, total_norm
from .report import named_parameters

_ACCUMULATOR = "sum_of_squares"


class AdaGradNorm(Optimizer):
    """SGD whose step size falls with the norms of all gradients so far.

    v ← v + ‖ḡ‖² over all weights together, x ← x − lr·ḡ/√v: the optimizer of AdAdaGrad's theory.
    The first step has the length lr.

    Differs from the authors' code: v is one number, as in the theory, where theirs is one for each
    output row; weight decay is decoupled, x ← (1 − lr·decay)·x, and acts without a gradient's
    size, where theirs multiplies the gradient. It is not divided by √v: with a constant rate it
    stays as strong while steps shrink.

    Args:
        params: parameters, named parameters or groups of either.
        lr: length of the first step, at least 0; may be set per group.
        weight_decay: decoupled, multiplied by ``lr``, at least 0; may be set per group.
        initial_sum: v before the first step, at least 0.

    Raises:
        ValueError: an option is out of range, or at a step if a gradient is sparse.

    Memory: one number. A step reads every gradient once more, and waits for the device. A step
    whose gradients have a norm that is not finite is left out and counted, since v would never
    recover.

    Example:
        >>> import torch
        >>> from adarankgrad import AdaGradNorm
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> AdaGradNorm([weight], lr=0.5).step()
        >>> weight.tolist()  # 0.5 / 5 times the gradient
        [-0.30000001192092896, -0.4000000059604645]
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1.0,
        weight_decay: float = 0.0,
        *,
        initial_sum: float = 0.0,
    ) -> None:
        check_number("initial_sum", initial_sum, low=0.0)
        defaults = {"lr": lr, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        # Every group has the number, so that groups can be added and reordered in a saved state.
        for group in self.param_groups:
            group[_ACCUMULATOR] = float(initial_sum)
            group["num_skipped_steps"] = 0

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; it shares the sum of squares.

        Raises:
            ValueError: an option is out of range.
        """
        for name in ("lr", "weight_decay"):
            check_number(name, param_group.get(name, self.defaults[name]), low=0.0)
        super().add_param_group(param_group)
        first, added = self.param_groups[0], self.param_groups[-1]
        for name in (_ACCUMULATOR, "num_skipped_steps"):
            if name in first:
                added[name] = first[name]

    @property
    def sum_of_squares(self) -> float:
        """v: the initial sum, and ‖ḡ‖² of every step so far."""
        return float(self.param_groups[0][_ACCUMULATOR])

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient.

        Args:
            closure: re-evaluates the model and returns the loss.

        Returns:
            The closure's loss, or None without one.

        Raises:
            ValueError: a gradient is sparse, or of a dtype that cannot be trained in.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        norm = self._grad_norm()
        total = self.sum_of_squares + norm * norm
        if not math.isfinite(total):
            for group in self.param_groups:
                group["num_skipped_steps"] += 1
            return loss
        for group in self.param_groups:
            group[_ACCUMULATOR] = total
            _step_group(group, math.sqrt(total))
        return loss

    def _grad_norm(self) -> float:
        grads = [
            NamedGrad(name, param.grad)
            for group in self.param_groups
            for name, param in named_parameters(group, self.param_groups)
            if param.grad is not None
        ]
        for name, grad in grads:
            check_usable(name, grad)
        return total_norm(norms_of(grads))


def _step_group(group: dict[str, Any], root: float) -> None:
    rate = float(group["lr"])
    for param in group["params"]:
        if param.grad is None:
            continue
        if group["weight_decay"]:
            param.mul_(1.0 - rate * group["weight_decay"])
        if root > 0:
            param.add_(param.grad, alpha=-rate / root)
