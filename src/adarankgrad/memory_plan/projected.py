"""What one projected weight costs: state, a gradient held in projection, temporaries."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adarankgrad.core.measurement import NUM_PROBES
from adarankgrad.core.memory import exact_svd_bytes, projected_gradient_bytes
from adarankgrad.core.projection import Layout
from adarankgrad.core.residual import STATELESS_RESIDUALS, stateless_residual
from adarankgrad.memory_plan.live_bytes import LiveBytes
from adarankgrad.memory_plan.trace import fake_tensors
from adarankgrad.optim.basis_refresh import oversampling_of
from adarankgrad.optim.budget import RankBudget, budget_bytes, claimant_of
from adarankgrad.optim.engine import SubspaceOptimizer
from adarankgrad.optim.matrix_state import layout_for
from adarankgrad.optim.options import (
    correction_bytes,
    matrix_bytes,
    num_moments,
    rank_bounds,
)
from adarankgrad.optim.report import named_parameters
from adarankgrad.optim.weight_rounding import CHUNK

Options = dict[str, Any]

STORING_BYTES = {"float32": 0, "bfloat16": 9, "int8": 21}
"""Temporaries and result for a value that is put back into its form after a step."""

_ROUNDING_BYTES = {"nearest": 0, "stochastic": 10, "corrected": 17}
"""The most for a bfloat16 weight that is read into float32 and written back (`core.rounding`)."""


@dataclass(frozen=True)
class ProjectedCost:
    """Bytes of one projected weight, but for the weight itself.

    Attributes:
        state: Basis, moments, and the correction of the weight where there is one.
        sketch: What a sketched basis keeps from one step to the next to be found.
        held_at_sketch: Its gradient in measurements, at the step before a refresh.
        held_at_refresh: The same at the step of a refresh.
        step_workspace: Temporaries of its step, refreshes included.
        backward_workspace: Temporaries when its gradient is projected in the backward pass.
    """

    state: int
    sketch: int
    held_at_sketch: int
    held_at_refresh: int
    step_workspace: int
    backward_workspace: int


def projected_costs(
    optimizer: SubspaceOptimizer, device: str, *, accumulates: bool, **changes: Any
) -> dict[str, ProjectedCost]:
    """Costs of each projected weight, by name.

    Args:
        optimizer: Its weights may be on the meta device.
        device: ``cuda`` or ``cpu``.
        accumulates: Whether gradients are projected in the backward pass.
        changes: Options to plan with in place of the optimizer's.
    """
    members = list(_members(optimizer, changes))
    ceiling_of = _budgeted_ranks(members)
    return {
        name: _cost(weight, options, ceiling_of(weight, options), device, accumulates)
        for name, weight, options in members
    }


def _members(
    optimizer: SubspaceOptimizer, changes: Options
) -> Iterator[tuple[str, Tensor, Options]]:
    for group in optimizer.param_groups:
        for name, weight in named_parameters(group, optimizer.param_groups):
            if optimizer.is_projected(weight, group):
                yield name, weight, {**group, **changes}


def _budgeted_ranks(
    members: list[tuple[str, Tensor, Options]],
) -> Callable[[Tensor, Options], int]:
    """Each weight's ceiling, or its share of a budget before any gradient has been seen."""
    budget = members[0][2]["memory_budget"] if members else None
    if budget is None:
        return lambda weight, options: rank_bounds(options, layout_for(weight, options))[1]
    claimants = [claimant_of(weight, {}, options) for _, weight, options in members]
    divided = RankBudget(claimants, budget_bytes(budget, [weight for _, weight, _ in members]))
    return lambda weight, options: divided.max_rank(weight)


def _cost(
    weight: Tensor, options: Options, rank: int, device: str, accumulates: bool
) -> ProjectedCost:
    layout = layout_for(weight, options)
    width = torch.promote_types(weight.dtype, torch.float32).itemsize
    _, ceiling = rank_bounds(options, layout)
    has_basis = options["basis"] != "none"
    short = min(layout.num_rows, layout.num_cols)
    num_columns = min(ceiling + oversampling_of(options, ceiling), short) if has_basis else 0
    held = functools.partial(projected_gradient_bytes, layout, bytes_per_element=width)
    space = _Workspace(layout, rank, num_columns, ceiling, weight.dtype, device, options)
    return ProjectedCost(
        state=matrix_bytes(weight, layout, rank, options) + correction_bytes(weight, options),
        sketch=layout.num_matrices * layout.num_rows * num_columns * width,
        # A basis that is kept in fewer bits is held in float32 until the step.
        held_at_sketch=held(
            rank, num_columns=num_columns, owns_basis=options["basis_dtype"] != "float32"
        ),
        held_at_refresh=held(num_columns, owns_basis=True),
        step_workspace=space.of_projected_step() if accumulates else space.of_step(),
        backward_workspace=space.in_backward(),
    )


@dataclass(frozen=True)
class _Workspace:
    """Temporaries of one weight, in bytes.

    Attributes:
        layout: Where its matrix lies, (m, n).
        rank: r, of the basis.
        num_columns: p, of a sketch.
        ceiling: k, directions that a refresh considers.
        dtype: Of weight and gradient.
        device: ``cuda`` or ``cpu``.
        options: The parameter group.
    """

    layout: Layout
    rank: int
    num_columns: int
    ceiling: int
    dtype: torch.dtype
    device: str
    options: Options

    def of_step(self) -> int:
        """A step from a dense gradient: coordinates, direction, and the residual's temporaries."""
        coords = self._elements(self.rank * self.layout.num_cols)
        plain = 2 * coords + self._residual() + self._rounded()
        return self._dequantized() + max(plain, self._refresh(), self._stored())

    def of_projected_step(self) -> int:
        """A step from measurements, whose residual has had its step before."""
        m, n, r, p, k = self._sizes()
        found = (p + NUM_PROBES) * n + k * (m + 2 * n)
        taken_over = r * (m + 3 * n)
        return self._elements(found + taken_over) + self._dequantized() + self._rounded()

    def in_backward(self) -> int:
        """Measuring one micro-batch, and its share of the residual's step."""
        m, n, r, p, _ = self._sizes()
        directions = max(r, p) + NUM_PROBES
        measuring = directions * (m + 2 * n)
        measured = directions * n + r * n
        residual = self._residual() + self._elements(measured) + self._rounded()
        return max(self._elements(measuring), residual)

    def _refresh(self) -> int:
        """A search for a basis, and the moments of old and new one."""
        m, n, r, p, k = self._sizes()
        if self.options["basis"] == "none":
            return 0
        copy = 0 if self.dtype.itemsize >= 4 else self._elements(m * n)
        if self.options["basis"] == "exact":
            return copy + exact_svd_bytes(self.layout)
        searching = 2 * p * (m + n) + 4 * p * p + k * (m + n)
        taking_over = k * (m + n) + r * (m + 4 * n)
        return copy + self._elements(max(searching, taking_over))

    def _residual(self) -> int:
        kind = self.options["residual"]
        m, n, r, _, _ = self._sizes()
        if kind == "none":
            return 0
        if kind not in STATELESS_RESIDUALS:
            return self.layout.num_matrices * m * n * self.dtype.itemsize
        return residual_bytes(kind, self.layout.num_matrices, m, n, r, self.dtype, self.device)

    def _dequantized(self) -> int:
        """Float32 copies of state that is kept in fewer bits."""
        m, n, r, _, _ = self._sizes()
        is_small = self.options["state_dtype"] != "float32"
        is_small_basis = self.options["basis_dtype"] != "float32"
        moments = num_moments(self.options) * n * is_small
        return self._elements(r * (moments + m * is_small_basis))

    def _stored(self) -> int:
        """What one moment is put back through."""
        num_values = self.layout.num_matrices * self.rank * self.layout.num_cols
        return num_values * STORING_BYTES[self.options["state_dtype"]]

    def _rounded(self) -> int:
        """What the weight is rounded through."""
        size = self.layout.num_matrices * self.layout.num_rows * self.layout.num_cols
        return rounding_bytes(size, self.dtype, self.options)

    def _sizes(self) -> tuple[int, int, int, int, int]:
        layout = self.layout
        return layout.num_rows, layout.num_cols, self.rank, self.num_columns, self.ceiling

    def _elements(self, num_elements: int) -> int:
        width = torch.promote_types(self.dtype, torch.float32).itemsize
        return int(self.layout.num_matrices * num_elements * width)


def rounding_bytes(num_weights: int, dtype: torch.dtype, options: Options) -> int:
    """Float32 values of one chunk of a weight, and temporaries to read and to round them."""
    is_rounded = dtype is torch.bfloat16
    return _ROUNDING_BYTES[options["weight_rounding"]] * min(CHUNK, num_weights) * is_rounded


@functools.cache
def residual_bytes(
    kind: str,
    num_matrices: int,
    num_rows: int,
    num_cols: int,
    rank: int,
    dtype: torch.dtype,
    device: str,
) -> int:
    """The most that a residual without state holds at once, its result included, as it is run."""
    with fake_tensors():
        grad = torch.empty(num_matrices, num_rows, num_cols, dtype=dtype, device=device)
        basis = torch.empty(num_matrices, num_rows, rank, device=device)
        coords = torch.empty(num_matrices, rank, num_cols, device=device)
        with LiveBytes([grad, basis, coords]) as counter:
            stateless_residual(kind, grad, basis, coords)
    return int(counter.peak)
