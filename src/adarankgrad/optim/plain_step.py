"""One step of plain AdamW, for the weights that are not projected."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from ..core.adam import SMALLEST_EPS, corrected_eps, weight_factors

Group = dict[str, Any]


def step_plain(group: Group, params: list[Tensor], states: list[Group]) -> None:
    """Update parameters in place by AdamW, in the convention of their group.

    Args:
        group: the parameter group.
        params: some of its parameters, each with a dense gradient.
        states: theirs; made at a parameter's first step, modified in place.
    """
    if not params:
        return
    for param, state in zip(params, states, strict=True):
        if not state:
            dtype = moments_dtype(param)
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(param, dtype=dtype)
            state["exp_avg_sq"] = torch.zeros_like(param, dtype=dtype)
    if group["adam_convention"] == "torch":
        _adamw(group, params, states, eps=group["eps"], weight_decay=group["weight_decay"])
        return
    _, beta2 = group["betas"]
    of_step: dict[int, list[int]] = defaultdict(list)
    for index, state in enumerate(states):
        of_step[int(state["step"]) + 1].append(index)
    for step, members in of_step.items():
        eps = corrected_eps(group["eps"], "transformers", step=step, beta2=beta2)
        _adamw(group, [params[i] for i in members], [states[i] for i in members], eps=eps)
    factor, _ = weight_factors(float(group["lr"]), group["weight_decay"], "transformers")
    if factor != 1.0:
        torch._foreach_mul_(params, factor)


def moments_dtype(param: Tensor) -> torch.dtype:
    """Of a plain weight's moments: its own, as torch's AdamW has them, but float32 for float16.

    Squares of ordinary gradients leave the range of float16, and eps vanishes in it.
    """
    return torch.float32 if param.dtype is torch.float16 else param.dtype


def _adamw(
    group: Group,
    params: list[Tensor],
    states: list[Group],
    *,
    eps: float,
    weight_decay: float = 0.0,
) -> None:
    """Torch's own AdamW on a list of parameters, in the dtype of their moments."""
    beta1, beta2 = group["betas"]
    working = [param.to(moments_dtype(param)) for param in params]
    adamw(
        working,
        [cast(Tensor, param.grad).to(moments_dtype(param)) for param in params],
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        [state["step"] for state in states],
        has_complex=any(param.is_complex() for param in params),
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=weight_decay,
        eps=max(eps, SMALLEST_EPS),
        maximize=False,
    )
    for param, updated in zip(params, working, strict=True):
        if updated is not param:
            param.copy_(updated)
