"""Arithmetic of optimizer state, before anything is allocated."""

from __future__ import annotations

from .projection import Layout


def projected_state_bytes(
    layout: Layout, rank: int, bytes_per_element: int = 4, *, num_moments: int = 2
) -> int:
    """Bytes of a basis and the moments in it: m·r + 2·r·n + r elements a matrix for Adam.

    Args:
        layout: how the weight is projected.
        rank: r, columns of the basis, at least 0.
        bytes_per_element: 4 for float32 state, 8 for float64.
        num_moments: 2, or 1 for an update without second moment.
    """
    elements = rank * (layout.num_rows + num_moments * layout.num_cols + 1)
    return layout.num_matrices * elements * bytes_per_element


def adam_state_bytes(num_weights: int, bytes_per_element: int = 4) -> int:
    """Bytes of Adam's two full-size moments for this many weights.

    Args:
        num_weights: elements of the weight.
        bytes_per_element: torch keeps Adam's moments in the weight's dtype: 4, or 2 in bfloat16.
    """
    return 2 * num_weights * bytes_per_element
