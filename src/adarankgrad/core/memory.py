"""Arithmetic of optimizer state, before anything is allocated."""

from __future__ import annotations

from typing import Literal, get_args

from .projection import Layout
from .quantize import num_blocks

StateDtype = Literal["float32", "bfloat16", "int8"]
STATE_DTYPES: tuple[str, ...] = get_args(StateDtype)


def stored_bytes(
    num_rows: int, num_cols: int, dtype: StateDtype = "float32", bytes_per_element: int = 4
) -> int:
    """Bytes of state of this shape: in int8, each row has a float32 scale for every 256 columns.

    Args:
        num_rows: rows.
        num_cols: columns.
        dtype: the form that it is kept in.
        bytes_per_element: of float32 state; 8 under float64 weights.
    """
    if dtype == "int8":
        return num_rows * (num_cols + 4 * num_blocks(num_cols))
    return num_rows * num_cols * (2 if dtype == "bfloat16" else bytes_per_element)


def projected_state_bytes(
    layout: Layout,
    rank: int,
    bytes_per_element: int = 4,
    *,
    num_moments: int = 2,
    state_dtype: StateDtype = "float32",
    basis_dtype: StateDtype = "float32",
) -> int:
    """Bytes of a basis and the moments in it: m·r + 2·r·n + r elements a matrix for Adam.

    Proportional to the rank.

    Args:
        layout: how the weight is projected.
        rank: r, columns of the basis, at least 0.
        bytes_per_element: 4 for float32 state, 8 for float64.
        num_moments: 2, or 1 for an update without second moment.
        state_dtype: the form of the moments.
        basis_dtype: the form of the basis, whose columns are its rows here.
    """
    basis = stored_bytes(rank, layout.num_rows, basis_dtype, bytes_per_element)
    moment = stored_bytes(rank, layout.num_cols, state_dtype, bytes_per_element)
    seen = rank * bytes_per_element
    return layout.num_matrices * (basis + num_moments * moment + seen)


def adam_state_bytes(
    num_weights: int, bytes_per_element: int = 4, *, state_dtype: StateDtype = "float32"
) -> int:
    """Bytes of Adam's two full-size moments for this many weights.

    Args:
        num_weights: elements of the weight.
        bytes_per_element: torch keeps Adam's moments in the weight's dtype: 4, or 2 in bfloat16.
        state_dtype: the form of the moments.
    """
    return 2 * stored_bytes(1, num_weights, state_dtype, bytes_per_element)
