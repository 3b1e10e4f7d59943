"""What each method holds besides weights and activations, from formulas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from adarankgrad.core.memory import adam_state_bytes, quantized_adam_state_bytes
from adarankgrad.memory_plan.projected import (
    STORING_BYTES,
    ProjectedCost,
    projected_costs,
    rounding_bytes,
)
from adarankgrad.optim.engine import SubspaceOptimizer
from adarankgrad.optim.options import correction_bytes, plain_bytes
from adarankgrad.optim.plain_step import is_chunked
from adarankgrad.optim.report import named_parameters
from adarankgrad.optim.weight_rounding import CHUNK

Group = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """What is held at one kind of optimizer step, in bytes.

    Attributes:
        held: Gradients between backward and step, by weight; a weight that is missing keeps its
            dense one.
        state: Optimizer state during forward and backward.
        state_in_step: The same at the end of the step.
    """

    held: Mapping[str, int]
    state: int
    state_in_step: int


@dataclass(frozen=True)
class Costs:
    """What a method holds, in bytes.

    Attributes:
        stages: Kinds of steps; the largest decides.
        step_workspace: Temporaries of the optimizer's step.
        backward_workspace: Temporaries beside a dense gradient as it becomes final, by weight.
    """

    stages: tuple[Stage, ...]
    step_workspace: int
    backward_workspace: Mapping[str, int] = field(default_factory=dict)


def adamw_costs(model: nn.Module, device: str) -> Costs:
    """AdamW as torch runs it by default: all weights at once on CUDA, one by one on a CPU."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    state = sum(adam_state_bytes(w.numel(), w.element_size()) for w in weights)
    return Costs((Stage({}, state, state),), _adamw_workspace(weights, device))


def quantized_adamw_costs(model: nn.Module) -> Costs:
    """AdamW with 8-bit moments as bitsandbytes holds them; its kernels need no temporaries."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    state = sum(quantized_adam_state_bytes(weight.numel()) for weight in weights)
    return Costs((Stage({}, state, state),), 0)


def subspace_costs(
    optimizer: Optimizer, device: str, *, accumulates: bool = False, **changes: Any
) -> Costs:
    """An optimizer of ours at its rank ceilings, or at its memory budget.

    Args:
        optimizer: Of `SubspaceOptimizer`; its weights may be on the meta device.
        device: ``cuda`` or ``cpu``, where it will run.
        accumulates: Whether gradients are projected in the backward pass.
        changes: Options to plan with in place of the optimizer's.
    """
    assert isinstance(optimizer, SubspaceOptimizer)
    projected = projected_costs(optimizer, device, accumulates=accumulates, **changes)
    plain_groups = _plain_groups(optimizer, set(projected))
    plain_state = sum(
        plain_bytes(weight, {**group, **changes}) + correction_bytes(weight, {**group, **changes})
        for group, weights in plain_groups
        for weight in weights
    )
    workspaces = [
        _plain_workspace(weights, {**group, **changes}, device) for group, weights in plain_groups
    ]
    return Costs(
        _stages(projected, plain_state, accumulates),
        max([*workspaces, *(cost.step_workspace for cost in projected.values())], default=0),
        {name: cost.backward_workspace for name, cost in projected.items()} if accumulates else {},
    )


def _stages(
    projected: Mapping[str, ProjectedCost], plain_state: int, accumulates: bool
) -> tuple[Stage, ...]:
    """Without accumulation all steps hold the same; with it, those of a refresh hold the most.

    All weights find their first basis at the same steps, staggered or not.
    """
    state = plain_state + sum(cost.state for cost in projected.values())
    if not accumulates:
        return (Stage({}, state, state),)
    sketches = sum(cost.sketch for cost in projected.values())
    sketching = {name: cost.held_at_sketch for name, cost in projected.items()}
    refreshing = {name: cost.held_at_refresh for name, cost in projected.items()}
    return (Stage(sketching, state, state + sketches), Stage(refreshing, state + sketches, state))


def _plain_groups(
    optimizer: SubspaceOptimizer, projected: set[str]
) -> list[tuple[Group, list[Tensor]]]:
    groups = []
    for group in optimizer.param_groups:
        named = named_parameters(group, optimizer.param_groups)
        groups.append((group, [weight for name, weight in named if name not in projected]))
    return groups


def _plain_workspace(weights: Sequence[Tensor], options: Group, device: str) -> int:
    """AdamW's, and what a chunk of weights needs where arithmetic is wider than what is kept."""
    at_once = [weight for weight in weights if not is_chunked(weight, options)]
    chunked = [_chunk_bytes(weight, options) for weight in weights if is_chunked(weight, options)]
    return max([_adamw_workspace(at_once, device), *chunked])


def _chunk_bytes(weight: Tensor, options: Group) -> int:
    """What a chunk of one weight is read into, stepped and put back through."""
    form = options["state_dtype"]
    values = 4 if weight.element_size() < 4 else 0  # and as much for the gradient
    moments = 0 if form == "float32" else 2 * 4
    roots = 2 * 4
    stepping = 2 * values + moments + roots
    storing = values + moments + STORING_BYTES[form]
    size = min(CHUNK, weight.numel())
    return max(size * max(stepping, storing), rounding_bytes(size, weight.dtype, options))


def _adamw_workspace(weights: Sequence[Tensor], device: str) -> int:
    """The root of the second moments, once, or twice for one weight at a time."""
    sizes = [weight.numel() * weight.element_size() for weight in weights]
    return sum(sizes) if device == "cuda" else 2 * max(sizes, default=0)
