"""One step inside a basis, and outside it, for one projected weight."""

from __future__ import annotations

import functools
import math

from torch import Tensor

from ..core.adam import adam_direction, corrected_eps, weight_factors
from ..core.projection import Layout, lift_into_, norm_of, project
from ..core.residual import (
    RESIDUALS,
    STATELESS_RESIDUALS,
    limit_growth,
    orthogonalized,
    outside_basis,
    scaled_like_adam,
    stateless_residual,
)
from .basis_refresh import Turn, coordinates
from .matrix_state import Options, State, layout_for
from .projected_grad import ProjectedGrad
from .sketched_refresh import coordinates_from, plan_measurement
from .stored_state import opened
from .weight_rounding import change_matrix


def step_matrix(weight: Tensor, grad: Tensor, state: State, options: Options, turn: Turn) -> None:
    """Project the gradient, refresh the basis if that is due, and update the weight in place.

    Args:
        weight: any shape with two axes or more; modified in place.
        grad: its gradient, dense or held in projection. The residual of the latter has had its
            step in the backward pass (`step_outside`).
        state: from `new_state`; modified in place.
        options: the parameter group.
        turn: whose turn it is.
    """
    with opened(state, options, turn.name) as computed:
        _step(weight, grad, computed, options, turn)


def _step(weight: Tensor, grad: Tensor, state: State, options: Options, turn: Turn) -> None:
    layout = layout_for(weight, options)
    if options["basis"] == "sketched":
        held = grad
        if not isinstance(held, ProjectedGrad):
            plan = functools.partial(plan_measurement, state, options, layout, turn)
            held = ProjectedGrad(grad, layout, plan)
            held.add_dense(grad)
        coords = coordinates_from(held, state, options, layout, turn)
        inside = held.measurement.basis, held.measured.coords
    else:
        coords = coordinates(layout.view(grad), state, options, layout, turn)
        inside = state["basis"], coords
    state["steps_since_refresh"] += 1

    direction = coords
    if coords.shape[-2] > 0:
        state["step"] += 1
        direction = _UPDATES[options["update"]](coords, state, options)
    residual = None
    if not isinstance(grad, ProjectedGrad):
        residual = _residual_step(layout.view(grad), inside, coords, direction, state, options)
    _update_weight(weight, layout, state, direction, residual, options, turn.name)


def step_outside(
    weight: Tensor,
    state: State,
    options: Options,
    name: str,
    share: float,
    held: ProjectedGrad,
    grad: Tensor,
) -> None:
    """Update the weight in place by the residual of one micro-batch, within the backward pass.

    Only rules without state that do not depend on the gradient's size (`STATELESS_RESIDUALS`). A
    residual that is not finite takes no step, whatever ``nonfinite`` says: a loss scaler may yet
    skip the optimizer's step. Where that step is taken, what is broken comes in by its coordinates.

    Args:
        weight: modified in place.
        state: of the weight; only a ``correction`` of it is modified.
        options: the parameter group.
        name: identifies the weight to the random generator.
        share: of the step that this micro-batch takes.
        held: the projected gradient that the micro-batch's is added to.
        grad: that gradient, dense.
    """
    basis = held.measurement.basis
    if options["residual"] == "none" or basis.shape[-1] == 0:
        return
    layout = held.matrix_layout
    grad_matrix = layout.view(grad)
    residual = stateless_residual(
        options["residual"], grad_matrix, basis, project(grad_matrix, basis)
    )
    decay, lr = weight_factors(
        float(options["lr"]), options["weight_decay"], options["adam_convention"]
    )
    # Divided by the decay, which the step applies afterwards.
    size = lr * options["residual_scale"] * share / decay
    # As the step will see it, squares out of range included; on the device, no synchronisation.
    is_finite = norm_of(grad).isfinite()
    residual.nan_to_num_(0.0, 0.0, 0.0).mul_(is_finite)

    def change(matrix: Tensor, rows: slice) -> None:
        matrix.sub_(residual[..., rows, :], alpha=size)

    draw = f"{_moment_of(state, name)}/outside", held.num_added
    change_matrix(weight, layout, state, options, draw, change)


def _adam_update(coords: Tensor, state: State, options: Options) -> Tensor:
    eps = corrected_eps(
        options["eps"],
        options["adam_convention"],
        step=state["step"],
        beta2=options["betas"][1],
    )
    return adam_direction(
        coords,
        state["exp_avg"],
        state["exp_avg_sq"],
        state["seen"],
        step=state["step"],
        betas=options["betas"],
        eps=eps,
    )


def _orthogonalized_update(coords: Tensor, state: State, options: Options) -> Tensor:
    """Muon's step inside the basis, as in SUMO: of the first moment, which needs no second."""
    beta1, _ = options["betas"]
    return orthogonalized(state["exp_avg"].lerp_(coords, 1.0 - beta1))


_UPDATES = {"adam": _adam_update, "orthogonalized": _orthogonalized_update}


def _residual_step(
    grad_matrix: Tensor,
    inside: tuple[Tensor, Tensor],
    coords: Tensor,
    direction: Tensor,
    state: State,
    options: Options,
) -> Tensor | None:
    """The step outside the basis, shaped as the gradient's matrix, or None."""
    kind = options["residual"]
    was_never_fit = coords.shape[-2] == 0 and options["basis"] != "none"
    if kind == "none" or was_never_fit:  # for a basis to be found
        return None
    if kind in STATELESS_RESIDUALS:
        return stateless_residual(kind, grad_matrix, *inside)
    if kind not in RESIDUALS:
        raise ValueError(f"residual must be one of {', '.join(RESIDUALS)}, got {kind!r}")
    factor = options["scale"] if kind == "fira_official" else 1.0
    residual = outside_basis(grad_matrix, state["basis"], coords, factor=factor)
    beta1, beta2 = options["betas"]
    correction = math.sqrt(1.0 - beta2 ** state["step"]) / (1.0 - beta1 ** state["step"])
    scaled_like_adam(residual, coords, direction)
    return limit_growth(residual, state["residual_norm"], unit=correction)


def _update_weight(
    weight: Tensor,
    layout: Layout,
    state: State,
    direction: Tensor,
    residual: Tensor | None,
    options: Options,
    name: str,
) -> None:
    decay, lr = weight_factors(
        float(options["lr"]), options["weight_decay"], options["adam_convention"]
    )

    def change(matrix: Tensor, rows: slice) -> None:
        basis = state["basis"][..., rows, :]
        lift_into_(matrix, basis, direction, decay=decay, step=lr * options["scale"])
        if residual is not None:
            matrix.add_(residual[..., rows, :], alpha=-lr * options["residual_scale"])

    change_matrix(weight, layout, state, options, (_moment_of(state, name), 0), change)


def _moment_of(state: State, name: str) -> str:
    """Weight and step, to draw random numbers that no other step draws."""
    return f"{name}/{state['num_refreshes']}/{state['steps_since_refresh']}"
