"""Matrices with known spectra, and the hypothesis settings that the tests of ``core`` share."""

from __future__ import annotations

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

few_examples = settings(max_examples=25, deadline=None, derandomize=True, database=None)

dtypes = st.sampled_from([torch.float32, torch.float64])
seeds = st.integers(0, 2**16)
kinds = st.sampled_from(["full", "graded", "deficient", "one direction", "zero row", "zero"])


def random_orthonormal(num_rows: int, num_columns: int, seed: int) -> Tensor:
    """Orthonormal columns in float64, uniformly distributed."""
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(num_rows, num_columns, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(gaussian).Q


def matrix_with_spectrum(num_rows: int, num_cols: int, values: Tensor, seed: int = 0) -> Tensor:
    """A float64 matrix with these singular values and random singular vectors."""
    left = random_orthonormal(num_rows, len(values), seed)
    right = random_orthonormal(num_cols, len(values), seed + 1)
    return left @ torch.diag(values.double()) @ right.mT


@st.composite
def matrices(draw: st.DrawFn, longest: int = 24) -> Tensor:
    """Matrices and stacks of every shape, conditioning and rank, float32 and float64."""
    num_rows = draw(st.integers(1, longest))
    num_cols = draw(st.integers(1, longest))
    num_matrices = draw(st.sampled_from([None, None, 2, 3]))
    kind, dtype, seed = draw(kinds), draw(dtypes), draw(seeds)
    scale = draw(st.sampled_from([1e-6, 1.0, 1e6]))
    matrix = torch.stack(
        [
            _matrix_of_kind(kind, num_rows, num_cols, seed + index)
            for index in range(num_matrices or 1)
        ]
    )
    matrix = (matrix if num_matrices else matrix[0]) * scale
    return matrix.to(dtype)


def _matrix_of_kind(kind: str, num_rows: int, num_cols: int, seed: int) -> Tensor:
    short_side = min(num_rows, num_cols)
    index = torch.arange(short_side, dtype=torch.float64)
    values = {
        "full": 1.0 / (1.0 + index),
        "graded": 10.0 ** (-12.0 * index / short_side),
        "deficient": (index < (short_side + 1) // 2).double(),
        "one direction": (index == 0).double(),
        "zero row": 1.0 / (1.0 + index),
        "zero": torch.zeros(short_side),
    }[kind]
    matrix = matrix_with_spectrum(num_rows, num_cols, values, seed)
    if kind == "zero row":
        matrix[0] = 0.0
    return matrix
