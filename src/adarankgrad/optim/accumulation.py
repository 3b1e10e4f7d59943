"""Gradients that are projected in the backward pass and never pile up."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..core.residual import STATELESS_RESIDUALS
from .basis_refresh import Turn
from .matrix_state import layout_for
from .matrix_step import step_outside
from .projected_grad import ProjectedGrad
from .report import named_parameters
from .sketched_refresh import plan_measurement
from .stored_state import as_computed

if TYPE_CHECKING:
    from .engine import SubspaceOptimizer


class _Member(NamedTuple):
    """A projected weight and what its measurements depend on."""

    group: dict[str, Any]
    turn: Turn


class BackwardAccumulation:
    """Hooks that replace each projected weight's gradient by measurements as it becomes final.

    Made by `SubspaceOptimizer.accumulate_in_backward`; ``remove()`` takes the hooks away.

    Args:
        optimizer: whose weights, and whose state the measurements depend on.
        model: only its weights get hooks.
        num_micro_batches: backward passes of a step, for residuals; None without one.

    Raises:
        ValueError: if an option of a group needs whole gradients, or the model has no projected
            weight of the optimizer.
    """

    def __init__(
        self, optimizer: SubspaceOptimizer, model: nn.Module, num_micro_batches: int | None
    ) -> None:
        _check_options(optimizer.param_groups, num_micro_batches)
        self._optimizer = optimizer
        self._share = 1.0 / (num_micro_batches or 1)
        members = _projected_members(optimizer)
        self._members = {p: members[p] for p in model.parameters() if p in members}
        if not self._members:
            raise ValueError(
                "the model has no projected weight of this optimizer; build the optimizer from the "
                "same model, after it was moved and wrapped"
            )
        self._handles: list[RemovableHandle] = [
            param.register_post_accumulate_grad_hook(self._hold)  # type: ignore[no-untyped-call]
            for param in self._members
        ]

    def remove(self) -> None:
        """Leave gradients alone from now on."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @torch.no_grad()
    def _hold(self, param: nn.Parameter) -> None:
        """Put measurements in the place of a dense gradient; later ones are added by autograd."""
        grad = param.grad
        if grad is None or isinstance(grad, ProjectedGrad) or grad.layout is not torch.strided:
            return
        group, turn = self._members[param]
        layout = layout_for(param, group)
        state = self._optimizer.state_of(param, group)
        computed = as_computed(state, group)
        held = ProjectedGrad(grad, layout, plan_measurement(computed, group, layout, turn))
        if group["residual"] != "none":
            held.on_dense = functools.partial(
                step_outside, param, state, group, turn.name, self._share
            )
        param.grad = None
        held.add_dense(grad)
        param.grad = held


def _projected_members(optimizer: SubspaceOptimizer) -> dict[nn.Parameter, _Member]:
    members: dict[nn.Parameter, _Member] = {}
    position = 0
    for group in optimizer.param_groups:
        for name, param in named_parameters(group, optimizer.param_groups):
            if optimizer.is_projected(param, group):
                members[cast(nn.Parameter, param)] = _Member(group, Turn(name, position))
            position += 1
    return members


def _check_options(groups: Iterable[dict[str, Any]], num_micro_batches: int | None) -> None:
    is_count = isinstance(num_micro_batches, int) and not isinstance(num_micro_batches, bool)
    if num_micro_batches is not None and not (is_count and num_micro_batches >= 1):
        raise ValueError(
            f"num_micro_batches must be an int of at least 1, got {num_micro_batches!r}"
        )
    for group in groups:
        if not group["project"]:
            continue
        if group["basis"] != "sketched":
            raise ValueError(
                f"accumulate_in_backward needs basis='sketched', got {group['basis']!r}: every "
                "other search for a basis needs whole gradients"
            )
        residual = group["residual"]
        if residual != "none" and residual not in STATELESS_RESIDUALS:
            raise ValueError(
                f"residual={residual!r} needs the whole gradient and Adam's step at once, which "
                "accumulate_in_backward does not keep; use residual='none' or one of "
                f"{', '.join(STATELESS_RESIDUALS)}"
            )
        if residual != "none" and num_micro_batches is None:
            raise ValueError(
                f"residual={residual!r} is of whole gradients; with accumulate_in_backward each "
                "micro-batch takes its share of that step in its own backward pass. Say how many "
                "make a step with num_micro_batches=..., or use residual='none'"
            )
