"""Linear measurements of a gradient: they add up, scale, and tell how large it is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adarankgrad.core.measurement import Measured, Measurement, draw_probes, measure

from .matrices import few_examples, random_orthonormal, seeds


def measurement(num_rows, num_cols, rank, num_sketched, *, seed=0, num_probes=8):
    basis = random_orthonormal(num_rows, rank, seed)
    generator = torch.Generator().manual_seed(seed)
    columns = torch.randn(num_cols, num_sketched, generator=generator, dtype=torch.float64)
    return Measurement(basis, draw_probes(basis, generator, num_probes), columns)


def random_matrix(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@few_examples
@given(
    num_rows=st.integers(2, 9),
    num_cols=st.integers(1, 9),
    num_sketched=st.integers(0, 4),
    num_parts=st.integers(1, 5),
    seed=seeds,
)
def test_measurements_of_parts_add_up_to_that_of_their_sum(
    num_rows, num_cols, num_sketched, num_parts, seed
):
    what = measurement(num_rows, num_cols, num_rows // 2, num_sketched, seed=seed)
    parts = random_matrix(num_parts, num_rows, num_cols, seed=seed)
    added = [sum(entries) for entries in zip(*(measure(part, what) for part in parts), strict=True)]
    for ours, whole in zip(added, measure(parts.sum(0), what), strict=True):
        torch.testing.assert_close(ours, whole, rtol=0, atol=1e-12)


def test_what_is_measured_is_what_it_says():
    what = measurement(7, 5, 3, 2)
    matrix = random_matrix(7, 5)
    coords, outside, sketch = measure(matrix, what)
    torch.testing.assert_close(coords, what.basis.mT @ matrix)
    torch.testing.assert_close(outside, what.probes.mT @ matrix)
    torch.testing.assert_close(sketch, matrix @ what.columns)
    assert torch.dist(what.basis.mT @ what.probes, torch.zeros(3, 8)) < 1e-13


def test_the_norm_is_exact_inside_the_basis():
    what = measurement(9, 6, 4, 0)
    inside = what.basis @ random_matrix(4, 6)
    assert measure(inside, what).squared_norm() == pytest.approx(
        inside.square().sum().item(), rel=1e-12
    )


@pytest.mark.parametrize(("num_directions", "deviation"), [(30, 30 / 120**0.5), (1, 0.5)])
def test_outside_it_is_unbiased_and_as_accurate_as_stated(num_directions, deviation):
    """400 draws: the mean is within three standard errors, the deviation within a fifth."""
    mixed = random_orthonormal(40, 40, 3)
    basis, outside = mixed[:, :10], mixed[:, 10 : 10 + num_directions]
    matrix = basis @ random_matrix(10, num_directions) + outside
    generator = torch.Generator().manual_seed(0)
    no_columns = matrix.new_zeros(num_directions, 0)
    estimates = torch.stack(
        [
            measure(
                matrix, Measurement(basis, draw_probes(basis, generator), no_columns)
            ).squared_norm()
            for _ in range(400)
        ]
    )
    exact = matrix.square().sum().item()
    assert estimates.mean() == pytest.approx(exact, abs=3 * deviation / 400**0.5)
    assert 0.5 * deviation < estimates.std() < 1.2 * deviation


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gradients_are_measured_in_float32(dtype):
    basis = random_orthonormal(16, 4, 0).float()
    what = Measurement(basis, draw_probes(basis, torch.Generator()), torch.randn(12, 3))
    matrix = 300 * torch.randn(16, 12)
    measured = measure(matrix.to(dtype), what)
    for ours, exact in zip(measured, measure(matrix, what), strict=True):
        assert ours.dtype == torch.float32
        # Entries and bases are rounded to 2**-9 of their size, sums of 16 of them likewise.
        assert torch.dist(ours, exact) < 3 * 2**-8 * torch.linalg.vector_norm(exact)


def test_measured_parts_own_their_memory():
    measured = measure(random_matrix(7, 5), measurement(7, 5, 3, 2))
    assert isinstance(measured, Measured)
    for part in measured:
        assert part.untyped_storage().nbytes() == part.numel() * part.element_size()
