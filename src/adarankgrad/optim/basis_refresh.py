"""The basis of one projected weight: when it is replaced, by what, and what that changes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.carry import Moments, carry_moments
from ..core.generators import generator_for
from ..core.projection import Layout, project
from ..core.range_finder import Subspace, find_range, find_range_exactly
from ..core.rank import choose_rank
from ..core.refresh import (
    RefreshReason,
    RefreshRule,
    measured_reason,
    scheduled_reason,
    staggered_gap,
)
from .matrix_state import Options, State, with_own_strides
from .options import rank_bounds, refresh_rule

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

    @property
    def may_take_a_basis(self) -> bool:
        """Whether a common budget leaves it any bytes now."""
        return self.max_rank is None or self.max_rank() > 0


def coordinates(
    grad_matrix: Tensor, state: State, options: Options, layout: Layout, turn: Turn
) -> Tensor:
    """The gradient in the basis, which is replaced first where that is due."""
    if options["basis"] == "none":
        return project(grad_matrix, state["basis"])
    rule = rule_for(state["num_refreshes"], options, turn)
    coords = None
    age = state["steps_since_refresh"]
    reason = scheduled_reason(rule, age, has_basis=state["basis"].shape[-1] > 0)
    # Reading a norm waits for the device, so the gradient is consulted at multiples of min_gap.
    if reason is RefreshReason.NONE and rule.reads_gradient and age > 0 and age % rule.min_gap == 0:
        coords = project(grad_matrix, state["basis"])
        reason = _measured_reason(rule, grad_matrix, coords, state)
    if reason is not RefreshReason.NONE and turn.may_take_a_basis:
        refreshed = _refresh(grad_matrix, state, options, layout, turn, reason)
        coords = coords if refreshed is None else refreshed
    return project(grad_matrix, state["basis"]) if coords is None else coords


def rule_for(num_refreshes: int, options: Options, turn: Turn) -> RefreshRule:
    """The rule by which a basis is replaced, the first of ``num_refreshes`` or a later one."""
    rule = refresh_rule(options)
    if options["stagger"] and num_refreshes == 1:
        rule = rule._replace(max_gap=staggered_gap(rule.max_gap, turn.position))
    return rule


def _measured_reason(
    rule: RefreshRule, grad_matrix: Tensor, coords: Tensor, state: State
) -> RefreshReason:
    coords_energy = squared_norm(coords)
    total_energy = math.nan if rule.energy is None else squared_norm(grad_matrix)
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
    if not can_be_factorised(grad_matrix):
        state["num_skipped_refreshes"] += 1
        return None

    subspace = _find_subspace(grad_matrix, state, options, layout, turn.name)
    return adopt(subspace, state, options, layout, turn, reason)


def adopt(
    subspace: Subspace,
    state: State,
    options: Options,
    layout: Layout,
    turn: Turn,
    reason: RefreshReason,
) -> Tensor:
    """Choose a rank, take the basis over, carry the moments; return the coordinates in it."""
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
    basis = with_own_strides(subspace.basis[..., :rank])
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
    is_warm = options["warm_start"] and can_be_factorised(state["exp_avg"])
    _, max_rank = rank_bounds(options, layout)
    return _FINDERS[options["basis"]](
        grad_matrix,
        max_rank,
        oversampling=oversampling_of(options, max_rank),
        power_iterations=options["power_iterations"],
        start=state["exp_avg"] if is_warm else None,
        generator=generator_for(grad_matrix.device, options["seed"], name, state["num_refreshes"]),
    )


def oversampling_of(options: Options, max_rank: int) -> int:
    """Extra columns of a sketch."""
    oversampling: int | float = options["oversampling"]
    return round(oversampling * max_rank) if isinstance(oversampling, float) else oversampling


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
    state.update({name: with_own_strides(moment) for name, moment in moments._asdict().items()})
    if options["carry"] == "reset":
        state["step"] = 0
    if options["bias_correction"] == "global":
        state["seen"].fill_(1.0 - beta2 ** state["step"])


def can_be_factorised(matrix: Tensor) -> bool:
    """Tell whether a matrix is finite and not zero or empty."""
    if matrix.numel() == 0:
        return False
    size = float(torch.linalg.vector_norm(matrix))
    if not 0.0 < size < math.inf:  # squares may leave the range that the entries are in
        size = float(torch.linalg.vector_norm(matrix, math.inf))
    return 0.0 < size < math.inf


def squared_norm(tensor: Tensor) -> float:
    """Return the squared Frobenius norm, in float32 or wider. A device synchronisation."""
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    return float(torch.linalg.vector_norm(tensor, dtype=dtype)) ** 2
