"""What is kept of one projected weight: tensors and plain numbers, so that it survives any save.

Ranks change it from refresh to refresh.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..core.projection import Layout, layout_of
from ..core.quantize import num_blocks
from ..core.refresh import RefreshReason
from .gradient_checks import REAL_DTYPES
from .options import num_moments
from .stored_state import forms_of, is_stored_as, stored
from .weight_rounding import fits_correction, new_correction

State = dict[str, Any]
Options = dict[str, Any]

KEPT_ON_CPU = ("step", "energies")
"""Counters and spectra in a parameter's state, read by the host and not counted as its bytes."""


def layout_for(weight: Tensor, options: Options) -> Layout:
    """Where the weight's matrix lies, from its shape and its group's options."""
    return layout_of(weight.shape, options["side"], is_stacked=options["stacked"])


def is_matrix_to_project(param: Tensor, options: Options) -> bool:
    """Tell whether a weight is a matrix that its group projects."""
    if not options["project"] or param.dim() < 2 or param.dtype not in REAL_DTYPES:
        return False
    layout = layout_for(param, options)
    return min(layout.num_rows, layout.num_cols) > 1


def new_state(weight: Tensor, layout: Layout, options: Options) -> State:
    """State before the first refresh: a basis with no columns yet.

    ``step`` counts the updates that the moments have seen, ``steps_since_refresh`` the steps of
    the present basis (m, r). The moments are (r, n), the second (r, 0) for an update that has none,
    and ``seen`` (r, 1) is the share of the second's average that each direction has lived through
    (`core.carry.Moments`). Fira adds ``residual_norm`` (1, 1), and a sketched basis
    the ``sketch`` (m, p) from which the next step takes its range, for one step. All are float32,
    or float64 under float64 weights, but for basis and moments in a compact form (`stored_state`).
    A weight of 24 bits adds its ``correction`` (`weight_rounding`).
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)

    def empty(*shape: int) -> Tensor:
        return torch.zeros((*layout.batch_shape, *shape), dtype=dtype, device=weight.device)

    more = new_correction(weight, options)
    if options["residual"].startswith("fira"):
        more["residual_norm"] = empty(1, 1).fill_(math.inf)
    if options["basis"] == "sketched":
        more |= {"sketch": empty(layout.num_rows, 0), "next_reason": int(RefreshReason.NONE)}
    state: State = {
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
        **more,
    }
    for key, form in forms_of(options).items():
        state |= stored(state[key], key, form)
    return state


def with_own_strides(tensor: Tensor) -> Tensor:
    """A copy in row-major order, also of sides of one element, where ``contiguous()`` keeps any.

    Not every way to save a tensor keeps strides, and the order of sums depends on them.
    """
    return tensor.clone(memory_format=torch.contiguous_format)


def fits_matrix(state: State, weight: Tensor, options: Options) -> bool:
    """Tell whether a saved state is from `new_state`, at any rank, for a weight like this one."""
    layout = layout_for(weight, options)
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
    if options["basis"] == "sketched":
        num_columns = state["sketch"].shape[-1] if "sketch" in state else 0
        shapes["sketch"] = (layout.num_rows, num_columns)
    has_shapes = all(
        key in state and state[key].shape == (*layout.batch_shape, *shape)
        for key, shape in shapes.items()
    )
    return (
        has_shapes
        and all(
            is_stored_as(state, key, form, (*layout.batch_shape, rank, num_blocks(length)))
            for key, form, length in (
                ("basis", options["basis_dtype"], layout.num_rows),
                ("exp_avg", options["state_dtype"], layout.num_cols),
                ("exp_avg_sq", options["state_dtype"], _second_moment_cols(layout, options)),
            )
        )
        and fits_correction(state, weight, options)
    )


def _second_moment_cols(layout: Layout, options: Options) -> int:
    return layout.num_cols if num_moments(options) == 2 else 0
