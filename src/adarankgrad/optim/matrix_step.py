"""One step inside a basis, and outside it, for one projected weight.

The state of a weight is tensors and plain numbers (`new_state`), so that it survives any
``torch.save`` and ``weights_only`` load. Ranks change it from refresh to refresh.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.adam import adam_direction, corrected_eps, weight_factors
from ..core.carry import Moments, carry_moments
from ..core.projection import Layout, layout_of, lift_into_, project
from ..core.range_finder import Subspace, find_range, find_range_exactly
from ..core.rank import choose_rank
from ..core.refresh import (
    RefreshReason,
    RefreshRule,
    measured_reason,
    scheduled_reason,
    staggered_gap,
)
from ..core.residual import (
    RESIDUALS,
    limit_growth,
    normalized,
    orthogonalized,
    outside_basis,
    scaled_like_adam,
    without_rounding,
)
from .options import num_moments, rank_bounds, refresh_rule

KEPT_ON_CPU = ("step", "energies")
"""Counters and spectra in a parameter's state, read by the host and not counted as its bytes."""

State = dict[str, Any]
Options = dict[str, Any]

_FINDERS = {"randomized": find_range, "exact": find_range_exactly}


class Turn(NamedTuple):
    """What a step of one weight depends on besides its gradient, state and options.

    Attributes:
        name: identifies the weight to the random generator.
        position: among all weights of the optimizer, which staggered refreshes depend on.
        max_rank: the highest rank that a common budget leaves it now; None without a budget.
    """

    name: str
    position: int
    max_rank: Callable[[], int] | None = None


def layout_for(weight: Tensor, options: Options) -> Layout:
    """Where the weight's matrix lies, from its shape and its group's options."""
    return layout_of(weight.shape, options["side"], is_stacked=options["stacked"])


def new_state(weight: Tensor, layout: Layout, options: Options) -> State:
    """State before the first refresh: a basis with no columns yet.

    ``step`` counts the updates that the moments have seen, ``steps_since_refresh`` the steps of
    the present basis (m, r). The moments are (r, n), the second (r, 0) for an update that has none,
    and ``seen`` (r, 1) is the share of the second's average that each direction has lived through
    (`core.carry.Moments`). Fira adds ``residual_norm`` (1, 1). All are float32, or float64
    under float64 weights.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)

    def empty(*shape: int) -> Tensor:
        return torch.zeros((*layout.batch_shape, *shape), dtype=dtype, device=weight.device)

    residual_state = {}
    if options["residual"].startswith("fira"):
        residual_state["residual_norm"] = empty(1, 1).fill_(math.inf)
    return {
        "step": 0,
        "basis": empty(layout.num_rows, 0),
        "exp_avg": empty(0, layout.num_cols),
        "exp_avg_sq": empty(0, _second_moment_cols(layout, options)),
        "seen": empty(0, 1),
        "steps_since_refresh": 0,
        "num_refreshes": 0,
        "num_skipped_refreshes": 0,
        "refresh_reason": int(RefreshReason.NONE),
        "captured_energy": 0.0,
        "coords_energy_at_refresh": 0.0,
        **residual_state,
    }


def fits_matrix(state: State, layout: Layout, options: Options) -> bool:
    """Tell whether a saved state is from `new_state`, at any rank, for a weight of this layout."""
    if "basis" not in state:
        return False
    rank = state["basis"].shape[-1]
    shapes = {
        "basis": (layout.num_rows, rank),
        "exp_avg": (rank, layout.num_cols),
        "exp_avg_sq": (rank, _second_moment_cols(layout, options)),
        "seen": (rank, 1),
    }
    if options["residual"].startswith("fira"):
        shapes["residual_norm"] = (1, 1)
    return all(
        key in state and state[key].shape == (*layout.batch_shape, *shape)
        for key, shape in shapes.items()
    )


def step_matrix(weight: Tensor, grad: Tensor, state: State, options: Options, turn: Turn) -> None:
    """Project the gradient, refresh the basis if that is due, and update the weight in place.

    Args:
        weight: any shape with two axes or more; modified in place.
        grad: its dense gradient.
        state: from `new_state`; modified in place.
        options: the parameter group.
        turn: whose turn it is.
    """
    layout = layout_for(weight, options)
    grad_matrix = layout.view(grad)
    coords = _coordinates(grad_matrix, state, options, layout, turn)
    state["steps_since_refresh"] += 1

    direction = coords
    if coords.shape[-2] > 0:
        state["step"] += 1
        direction = _UPDATES[options["update"]](coords, state, options)
    residual = _residual_step(grad_matrix, coords, direction, state, options)
    _update_weight(weight, layout, state["basis"], direction, residual, options)


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


def _second_moment_cols(layout: Layout, options: Options) -> int:
    return layout.num_cols if num_moments(options) == 2 else 0


def _coordinates(
    grad_matrix: Tensor, state: State, options: Options, layout: Layout, turn: Turn
) -> Tensor:
    """The gradient in the basis, which is replaced first where that is due."""
    if options["basis"] == "none":
        return project(grad_matrix, state["basis"])
    rule = refresh_rule(options)
    if options["stagger"] and state["num_refreshes"] == 1:
        rule = rule._replace(max_gap=staggered_gap(rule.max_gap, turn.position))
    coords = None
    age = state["steps_since_refresh"]
    reason = scheduled_reason(rule, age, has_basis=state["basis"].shape[-1] > 0)
    # Reading a norm waits for the device, so the gradient is consulted at multiples of min_gap.
    if reason is RefreshReason.NONE and rule.reads_gradient and age > 0 and age % rule.min_gap == 0:
        coords = project(grad_matrix, state["basis"])
        reason = _measured_reason(rule, grad_matrix, coords, state)
    if reason is not RefreshReason.NONE:
        refreshed = _refresh(grad_matrix, state, options, layout, turn, reason)
        coords = coords if refreshed is None else refreshed
    return project(grad_matrix, state["basis"]) if coords is None else coords


def _measured_reason(
    rule: RefreshRule, grad_matrix: Tensor, coords: Tensor, state: State
) -> RefreshReason:
    coords_energy = _squared_norm(coords)
    total_energy = math.nan if rule.energy is None else _squared_norm(grad_matrix)
    return measured_reason(rule, coords_energy, total_energy, state["coords_energy_at_refresh"])


def _refresh(
    grad_matrix: Tensor,
    state: State,
    options: Options,
    layout: Layout,
    turn: Turn,
    reason: RefreshReason,
) -> Tensor | None:
    """Find a new basis, carry the moments to it, and return the gradient's coordinates in it.

    A gradient that is zero or not finite is never factorised: the old basis stays, the skip is
    counted, the refresh is tried again at the next step, and None is returned.
    """
    grad_matrix = grad_matrix.to(state["basis"].dtype)
    if not _can_be_factorised(grad_matrix):
        state["num_skipped_refreshes"] += 1
        return None

    subspace = _find_subspace(grad_matrix, state, options, layout, turn.name)
    old_rank = state["basis"].shape[-1]
    min_rank, max_rank = rank_bounds(options, layout)
    if turn.max_rank is not None:
        max_rank = min(max_rank, turn.max_rank())
        _note_energies(state, subspace)
    rank = choose_rank(
        subspace.energies,
        subspace.total,
        energy=options["energy"],
        min_rank=min_rank,
        max_rank=max_rank,
        previous_rank=old_rank or None,
        monotone=options["monotone"],
        rank_multiple=options["rank_multiple"],
        rounding=torch.finfo(subspace.coords.dtype).eps,
    )
    # Copies, so that the memory of the directions that are not kept is released.
    basis = subspace.basis[..., :rank].contiguous()
    coords = subspace.coords[..., :rank, :].contiguous()
    _carry(basis, state, options)

    coords_energy = subspace.energies[..., :rank].sum().item()
    state["basis"] = basis
    state["steps_since_refresh"] = 0
    state["num_refreshes"] += 1
    state["refresh_reason"] = int(reason)
    state["coords_energy_at_refresh"] = coords_energy
    state["captured_energy"] = min(1.0, coords_energy / subspace.total.sum().item())
    return coords


def _find_subspace(
    grad_matrix: Tensor,
    state: State,
    options: Options,
    layout: Layout,
    name: str,
) -> Subspace:
    """Search, from the first moment if it may: an average of the gradient's rows, at hand."""
    is_warm = options["warm_start"] and _can_be_factorised(state["exp_avg"])
    _, max_rank = rank_bounds(options, layout)
    oversampling = options["oversampling"]
    if isinstance(oversampling, float):
        oversampling = round(oversampling * max_rank)
    return _FINDERS[options["basis"]](
        grad_matrix,
        max_rank,
        oversampling=oversampling,
        power_iterations=options["power_iterations"],
        start=state["exp_avg"] if is_warm else None,
        generator=_generator(grad_matrix.device, options["seed"], name, state["num_refreshes"]),
    )


def _note_energies(state: State, subspace: Subspace) -> None:
    """Keep what a common budget is divided by; a stack counts as one matrix."""
    energies = subspace.energies.double().reshape(-1, subspace.energies.shape[-1])
    state["energies"] = energies.sum(0).to("cpu", state["basis"].dtype)
    state["total_energy"] = float(subspace.total.double().sum())


def _carry(basis: Tensor, state: State, options: Options) -> None:
    """Rotate the moments of ``state`` from its basis to a new one."""
    beta1, beta2 = options["betas"]
    moments = carry_moments(
        Moments(state["exp_avg"], state["exp_avg_sq"], state["seen"]),
        basis.mT @ state["basis"],
        options["carry"],
        first_correction=1.0 - beta1 ** max(1, state["step"]),
    )
    state.update(moments._asdict())
    if options["carry"] == "reset":
        state["step"] = 0
    if options["bias_correction"] == "global":
        state["seen"].fill_(1.0 - beta2 ** state["step"])


def _residual_step(
    grad_matrix: Tensor, coords: Tensor, direction: Tensor, state: State, options: Options
) -> Tensor | None:
    """The step outside the basis, shaped as the gradient's matrix, or None."""
    kind = options["residual"]
    was_never_fit = coords.shape[-2] == 0 and options["basis"] != "none"
    if kind == "none" or was_never_fit:  # for a basis to be found
        return None
    factor = options["scale"] if kind == "fira_official" else 1.0
    residual = outside_basis(grad_matrix, state["basis"], coords, factor=factor)
    if kind == "orthogonalized":
        return orthogonalized(without_rounding(residual, coords))
    if kind == "normalized":
        return normalized(without_rounding(residual, coords, dim=-2))
    if kind not in ("fira", "fira_official"):
        raise ValueError(f"residual must be one of {', '.join(RESIDUALS)}, got {kind!r}")
    beta1, beta2 = options["betas"]
    correction = math.sqrt(1.0 - beta2 ** state["step"]) / (1.0 - beta1 ** state["step"])
    scaled_like_adam(residual, coords, direction)
    return limit_growth(residual, state["residual_norm"], unit=correction)


def _update_weight(
    weight: Tensor,
    layout: Layout,
    basis: Tensor,
    direction: Tensor,
    residual: Tensor | None,
    options: Options,
) -> None:
    decay, lr = weight_factors(
        float(options["lr"]), options["weight_decay"], options["adam_convention"]
    )
    matrix = layout.view(weight)
    lift_into_(matrix, basis, direction, decay=decay, step=lr * options["scale"])
    if residual is not None:
        matrix.add_(residual, alpha=-lr * options["residual_scale"])
    if matrix.data_ptr() != weight.data_ptr():  # strides that no matrix can share: channels_last
        weight.copy_((matrix.mT if layout.is_transposed else matrix).reshape(weight.shape))


def _generator(device: torch.device, seed: int, name: str, count: int) -> torch.Generator:
    """A generator of its own for every refresh of every weight; the global one is never touched."""
    digest = hashlib.blake2b(f"{seed}/{name}/{count}".encode(), digest_size=7).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "big"))


def _can_be_factorised(matrix: Tensor) -> bool:
    """Tell whether a matrix is finite and not zero or empty."""
    if matrix.numel() == 0:
        return False
    size = float(torch.linalg.vector_norm(matrix))
    if not 0.0 < size < math.inf:  # squares may leave the range that the entries are in
        size = float(torch.linalg.vector_norm(matrix, math.inf))
    return 0.0 < size < math.inf


def _squared_norm(tensor: Tensor) -> float:
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    return float(torch.linalg.vector_norm(tensor, dtype=dtype)) ** 2
