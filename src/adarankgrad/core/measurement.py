"""What an optimizer needs of a gradient G (m, n), as linear measurements.

Each is a thin product with G, so that the measurements of micro-batches add up to those of their
sum, and scaling them scales the gradient: the gradient itself need never be kept.

- ``basis.mT @ G``, its coordinates;
- ``probes.mT @ G``, a few random combinations of the rows outside the basis, which estimate how
  much energy lies there (Hutchinson's estimator, as in Hutch++, arXiv 2010.09649);
- ``G @ columns``, the sketch that the next basis is found from (`range_finder.sketching_columns`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .projection import project

NUM_PROBES = 8
"""Probes outside the basis. The relative standard deviation of the energy that they estimate is
1/√(4·d) where it is spread over d directions evenly, and a half where one has it all."""


class Measurement(NamedTuple):
    """What to measure. Any part may have no columns.

    Attributes:
        basis: (*batch, m, k), orthonormal.
        probes: (*batch, m, s), from `draw_probes`.
        columns: (*batch, n, p).
    """

    basis: Tensor
    probes: Tensor
    columns: Tensor


class Measured(NamedTuple):
    """What was measured, of one gradient or a sum of several.

    Attributes:
        coords: (*batch, k, n), ``basis.mT @ G``.
        outside: (*batch, s, n), ``probes.mT @ G``.
        sketch: (*batch, m, p), ``G @ columns``.
    """

    coords: Tensor
    outside: Tensor
    sketch: Tensor

    def squared_norm(self) -> Tensor:
        """Estimate ‖G‖²_F, (*batch,): exact inside the basis, unbiased outside."""
        inside = torch.linalg.vector_norm(self.coords, dim=(-2, -1))
        outside = torch.linalg.vector_norm(self.outside, dim=(-2, -1))
        squared: Tensor = inside.square() + outside.square()
        return squared


def nothing_measured(measurement: Measurement) -> Measured:
    """Measurements of a gradient of zero."""
    basis, probes, columns = measurement
    num_rows, num_cols = basis.shape[-2], columns.shape[-2]
    batch_shape = basis.shape[:-2]
    return Measured(
        basis.new_zeros(*batch_shape, basis.shape[-1], num_cols),
        basis.new_zeros(*batch_shape, probes.shape[-1], num_cols),
        basis.new_zeros(*batch_shape, num_rows, columns.shape[-1]),
    )


def draw_probes(basis: Tensor, generator: torch.Generator, num_probes: int = NUM_PROBES) -> Tensor:
    """Draw random signs over √s, less their share of the basis: (*batch, m, s), s = num_probes."""
    shape = (*basis.shape[:-1], num_probes)
    coins = torch.randint(2, shape, generator=generator, device=basis.device)
    signs = coins.to(basis.dtype).mul_(2.0).sub_(1.0).div_(num_probes**0.5)
    return signs - basis @ (basis.mT @ signs)


def measure(matrix: Tensor, measurement: Measurement) -> Measured:
    """Measure a gradient.

    Args:
        matrix: (*batch, m, n), any floating dtype. Products run in it, but for float16.
        measurement: what to measure; float32 or float64.

    Returns:
        The measurements in the dtype of ``measurement``, newly allocated.
    """
    basis, probes, columns = measurement
    if matrix.dtype is torch.float16:
        matrix = matrix.to(basis.dtype)
    rows = project(matrix, torch.cat([basis, probes], dim=-1))
    num_coords = basis.shape[-1]
    sketch = (matrix @ columns.to(matrix.dtype)).to(columns.dtype)
    # Copies, since the two grow and shrink apart.
    return Measured(rows[..., :num_coords, :].clone(), rows[..., num_coords:, :].clone(), sketch)
