"""Arithmetic of optimizer memory, before anything is allocated."""

from __future__ import annotations

from typing import Literal, get_args

from .measurement import NUM_PROBES
from .projection import Layout
from .quantize import num_blocks

StateDtype = Literal["float32", "bfloat16", "int8"]
STATE_DTYPES: tuple[str, ...] = get_args(StateDtype)

_SMALLEST_QUANTIZED = 4096
"""bitsandbytes keeps the moments of smaller weights in float32."""


def stored_bytes(
    num_rows: int, num_cols: int, dtype: StateDtype = "float32", bytes_per_element: int = 4
) -> int:
    """Bytes of state of this shape: in int8, each row has a float32 scale for every 256 columns.

    Args:
        num_rows: rows.
        num_cols: columns.
        dtype: the form that it is kept in.
        bytes_per_element: of float32 state; 8 under float64 weights.

    Raises:
        ValueError: if ``dtype`` is unknown.
    """
    if dtype not in STATE_DTYPES:
        raise ValueError(f"state is kept in one of {', '.join(STATE_DTYPES)}, got {dtype!r}")
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


def quantized_adam_state_bytes(num_weights: int) -> int:
    """Bytes of the two moments of bitsandbytes' 8-bit Adam: a weight is one row of blocks.

    Args:
        num_weights: elements of the weight; below 4096 they are float32.
    """
    is_small = num_weights < _SMALLEST_QUANTIZED
    return 2 * stored_bytes(1, num_weights, "float32" if is_small else "int8")


def projected_gradient_bytes(
    layout: Layout,
    num_directions: int,
    *,
    num_columns: int = 0,
    owns_basis: bool = False,
    bytes_per_element: int = 4,
) -> int:
    """Bytes of a gradient held in measurements (`core.measurement`), with what they are of.

    (k + s)·n measurements of k directions and s probes, and the probes themselves, m·s. A sketch
    for the next basis adds p·(m + n), and at the step that finds a basis the k directions of its
    range are not the state's: m·k more.

    Args:
        layout: how the weight is projected.
        num_directions: k.
        num_columns: p, at steps after which the basis is replaced.
        owns_basis: whether the directions are the gradient's own.
        bytes_per_element: 4 for float32 state, 8 for float64.
    """
    m, n = layout.num_rows, layout.num_cols
    elements = (num_directions + NUM_PROBES) * n + NUM_PROBES * m + num_columns * (m + n)
    if owns_basis:
        elements += num_directions * m
    return layout.num_matrices * elements * bytes_per_element


def exact_svd_bytes(layout: Layout) -> int:
    """Bytes that a full singular value decomposition of one gradient needs beside it, in float32.

    A copy of the matrix, its factors, and LAPACK's workspace (divide and conquer), which is about
    four squares of the short side. Stacked matrices are decomposed together.
    """
    short, long = sorted((layout.num_rows, layout.num_cols))
    return 4 * layout.num_matrices * (2 * long * short + short * short) + 4 * 4 * short * short
