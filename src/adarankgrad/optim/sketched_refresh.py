"""Refreshes from linear measurements, so that no gradient has to be kept (``basis="sketched"``).

One step sketches the range of its gradient; the next measures its own gradient inside that range
and reads rank, directions and coordinates there. So a basis holds what two gradients share: noise
of the first captures little of the second. All other steps measure coordinates, and every step the
size of what lies outside. A criterion that reads the gradient takes effect two steps later.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..core.generators import generator_for
from ..core.measurement import Measured, Measurement, draw_probes
from ..core.projection import Layout
from ..core.range_finder import Subspace, directions_within, orthonormalize, sketching_columns
from ..core.refresh import RefreshReason, measured_reason
from .basis_refresh import (
    Turn,
    adopt,
    can_be_factorised,
    oversampling_of,
    rule_for,
    squared_norm,
)
from .matrix_state import Options, State, with_own_strides
from .options import rank_bounds
from .projected_grad import ProjectedGrad


def plan_measurement(state: State, options: Options, layout: Layout, turn: Turn) -> Measurement:
    """What to measure of the gradients of the coming step; the same until that step is taken."""
    basis = orthonormalize(state["sketch"]) if _has_sketch(state) else state["basis"]
    num_refreshes = state["num_refreshes"] + _has_sketch(state)
    # Anew at every step that moves the weight.
    draw = f"{turn.name}/probes/{state['num_refreshes']}"
    generator = generator_for(basis.device, options["seed"], draw, state["step"])
    return Measurement(
        basis=basis,
        probes=draw_probes(basis, generator),
        columns=_columns(state, options, layout, turn.name, num_refreshes)
        if _needs_sketch(state, options, turn)
        else state["exp_avg"].new_zeros(*layout.batch_shape, layout.num_cols, 0),
    )


def coordinates_from(
    held: ProjectedGrad, state: State, options: Options, layout: Layout, turn: Turn
) -> Tensor:
    """The measured gradient in the basis, which is replaced first where a sketch waits for that.

    Measurements that are zero or not finite are never factorised: the refresh is put off, and
    counted.
    """
    measured = held.measured
    coords, is_skipped = measured.coords, False
    if _has_sketch(state):
        if can_be_factorised(measured.coords) and turn.may_take_a_basis:
            coords = _refresh(measured, held.measurement.basis, state, options, layout, turn)
        else:
            rotation = state["basis"].mT @ held.measurement.basis
            coords, is_skipped = rotation @ measured.coords, True
    else:
        _consult(measured, state, options, turn)
    if measured.sketch.shape[-1] > 0:
        if can_be_factorised(measured.sketch):
            state["sketch"] = with_own_strides(measured.sketch)
        else:
            is_skipped = True
    state["num_skipped_refreshes"] += is_skipped
    return coords


def _has_sketch(state: State) -> bool:
    return bool(state["sketch"].shape[-1] > 0)


def _needs_sketch(state: State, options: Options, turn: Turn) -> bool:
    """Whether the step after the coming one is to refresh the basis."""
    if _has_sketch(state):  # the coming step refreshes, and is the first of the new basis
        return rule_for(state["num_refreshes"] + 1, options, turn).max_gap <= 1
    if state["basis"].shape[-1] == 0 or state["next_reason"]:
        return True
    gap = rule_for(state["num_refreshes"], options, turn).max_gap
    return bool(state["steps_since_refresh"] + 1 >= gap)


def _columns(
    state: State, options: Options, layout: Layout, name: str, num_refreshes: int
) -> Tensor:
    """Columns to sketch with, from the first moment if that is allowed."""
    _, max_rank = rank_bounds(options, layout)
    num_columns = max_rank + oversampling_of(options, max_rank)
    is_warm = options["warm_start"] and can_be_factorised(state["exp_avg"])
    columns, _ = sketching_columns(
        state["exp_avg"],
        min(num_columns, layout.num_rows, layout.num_cols),
        start=state["exp_avg"] if is_warm else None,
        generator=generator_for(state["basis"].device, options["seed"], name, num_refreshes),
    )
    return columns


def _refresh(
    measured: Measured,
    range_basis: Tensor,
    state: State,
    options: Options,
    layout: Layout,
    turn: Turn,
) -> Tensor:
    """Take the strongest directions of the sketched range over, and carry the moments to them."""
    # Divided by the largest entry, since squares may leave the range that the entries are in.
    size = torch.linalg.vector_norm(measured.coords, math.inf)
    scaled = Measured(*(part / size for part in measured))
    _, max_rank = rank_bounds(options, layout)
    found = directions_within(range_basis, scaled.coords, max_rank, scaled.squared_norm())
    square = size.double().square()
    subspace = Subspace(
        found.basis, found.coords * size, found.energies * square, found.total * square
    )
    is_first = state["basis"].shape[-1] == 0
    reason = RefreshReason(state["next_reason"]) or RefreshReason.MAX_GAP
    coords = adopt(
        subspace, state, options, layout, turn, RefreshReason.FIRST if is_first else reason
    )
    state["sketch"] = state["sketch"][..., :0].clone()
    state["next_reason"] = int(RefreshReason.NONE)
    return coords


def _consult(measured: Measured, state: State, options: Options, turn: Turn) -> None:
    """Note whether a criterion asks for another basis, which is then sketched at the next step."""
    rule = rule_for(state["num_refreshes"], options, turn)
    age = state["steps_since_refresh"]
    if not rule.reads_gradient or state["next_reason"] or age == 0 or age % rule.min_gap:
        return
    total = math.nan if rule.energy is None else float(measured.squared_norm().sum())
    coords_energy = squared_norm(measured.coords)
    state["next_reason"] = int(
        measured_reason(rule, coords_energy, total, state["coords_energy_at_refresh"])
    )
