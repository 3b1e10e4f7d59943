"""Rules for the part of a gradient outside the basis, each against its formula."""

from __future__ import annotations

import math

import pytest
import torch

from adarankgrad.core.residual import (
    ADAM_RMS,
    NORM_GROWTH,
    limit_growth,
    normalized,
    orthogonalized,
    outside_basis,
    scaled_like_adam,
    without_rounding,
)

SHAPES = [(6, 9), (9, 6), (2, 6, 9)]


def gradient_and_basis(shape, rank=3):
    gradient = torch.randn(shape, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(*shape[:-1], rank, dtype=torch.float64)).Q
    return gradient, basis, basis.mT @ gradient


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_outside_has_no_coordinates_and_completes_the_gradient(shape):
    gradient, basis, coords = gradient_and_basis(shape)
    residual = outside_basis(gradient, basis, coords)
    torch.testing.assert_close(basis.mT @ residual, torch.zeros_like(coords))
    torch.testing.assert_close(residual + basis @ coords, gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(40, 60), (3, 20, 30)])
def test_a_gradient_inside_the_basis_leaves_nothing_outside(dtype, shape):
    """And one with a tenth of its energy outside keeps all of that."""
    basis_dtype = torch.promote_types(dtype, torch.float32)
    basis = torch.linalg.qr(torch.randn(*shape[:-1], 6, dtype=torch.float64)).Q
    inside = basis @ torch.randn(*shape[:-2], 6, shape[-1], dtype=torch.float64)
    outside = torch.randn(shape, dtype=torch.float64)
    outside -= basis @ (basis.mT @ outside)
    outside *= inside.norm() / outside.norm() / 3
    for gradient, is_empty in ((inside, True), (inside + outside, False)):
        gradient = gradient.to(dtype)
        coords = basis.to(basis_dtype).mT @ gradient.to(basis_dtype)
        residual = outside_basis(gradient, basis.to(basis_dtype), coords)
        before = residual.clone()
        assert before.count_nonzero() > 0
        result = without_rounding(residual, coords)
        assert torch.equal(result, torch.zeros_like(before) if is_empty else before)


def test_columns_inside_the_basis_leave_nothing_outside_beside_columns_that_do():
    gradient = torch.zeros(8, 6)
    gradient[:2, :3] = torch.randn(2, 3)
    gradient[4:, 3:] = 1e-3 * torch.randn(4, 3)
    basis = torch.eye(8)[:, :2]
    noisy = gradient + 1e-3 * gradient.abs().amax() * torch.eye(8, 6)  # rounding, exaggerated
    residual = outside_basis(noisy, basis, basis.mT @ noisy)
    kept = without_rounding(residual.clone(), basis.mT @ noisy, dim=-2)
    assert kept[:, :3].count_nonzero() == 0
    assert torch.equal(kept[:, 3:], residual[:, 3:])


def test_with_no_basis_all_of_the_gradient_is_outside():
    gradient = torch.randn(4, 5)
    residual = outside_basis(gradient, torch.zeros(4, 0), torch.zeros(0, 5))
    assert torch.equal(residual, gradient)
    assert residual.data_ptr() != gradient.data_ptr()


@pytest.mark.parametrize("shape", SHAPES)
def test_fira_scales_each_column_as_adam_did_inside(shape):
    gradient, basis, coords = gradient_and_basis(shape)
    direction = torch.randn_like(coords)
    residual = outside_basis(gradient, basis, coords)
    before = residual.clone()
    scaled_like_adam(residual, coords, direction)
    for column in range(shape[-1]):
        factor = direction[..., column].norm(dim=-1) / (coords[..., column].norm(dim=-1) + 1e-8)
        expected = before[..., column] * factor.unsqueeze(-1)
        torch.testing.assert_close(residual[..., column], expected)


def test_the_norm_grows_by_one_percent_a_step_at_most():
    last = torch.full((1, 1), math.inf, dtype=torch.float64)
    sizes = []
    for size in (1.0, 100.0, 0.5, 0.504, 7.0):
        matrix = torch.randn(4, 5, dtype=torch.float64)
        limited = limit_growth(matrix * (size / matrix.norm()), last)
        sizes.append(limited.norm().item())
        assert last.item() == pytest.approx(sizes[-1])
    expected = [1.0, NORM_GROWTH, 0.5, 0.504, 0.504 * NORM_GROWTH]
    assert sizes == pytest.approx(expected)


def test_after_a_step_without_gradient_the_norm_is_free_again():
    last = torch.full((1, 1), math.inf)
    limit_growth(torch.ones(2, 2), last)
    assert torch.equal(limit_growth(torch.zeros(2, 2), last), torch.zeros(2, 2))
    assert torch.equal(limit_growth(torch.ones(2, 2), last), torch.ones(2, 2))


def test_a_first_norm_out_of_range_limits_nothing():
    matrix = torch.full((3, 3), 1e30)
    last = torch.full((1, 1), math.inf)
    assert torch.equal(limit_growth(matrix.clone(), last), matrix)


def test_each_matrix_of_a_stack_has_a_limit_of_its_own():
    last = torch.full((2, 1, 1), math.inf)
    limit_growth(torch.ones(2, 3, 4), last)
    stack = torch.ones(2, 3, 4)
    stack[0] *= 10
    limited = limit_growth(stack, last)
    torch.testing.assert_close(limited[0], torch.full((3, 4), NORM_GROWTH))
    torch.testing.assert_close(limited[1], torch.ones(3, 4))


@pytest.mark.parametrize("shape", SHAPES)
def test_normalized_columns_have_adams_size(shape):
    residual = torch.randn(shape, dtype=torch.float64)
    residual[..., 2] = 0.0
    result = normalized(residual.clone())
    sizes = result.square().mean(-2).sqrt()
    expected = torch.full_like(sizes, ADAM_RMS)
    expected[..., 2] = 0.0
    torch.testing.assert_close(sizes, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_columns_of_any_size_are_normalized_and_zero_ones_stay_zero(dtype):
    """A thousand rows, whose factor over the smallest normal number would be infinite."""
    residual = torch.randn(1000, 4).clamp(-3, 3) * torch.tensor([0.0, 1e-30, 1.0, 1e30])
    residual = residual.nan_to_num().clamp(-6e4, 6e4) if dtype is torch.float16 else residual
    is_kept = residual.to(dtype).abs().amax(0) > 0
    result = normalized(residual.to(dtype)).float()
    assert result.isfinite().all()
    sizes = result.square().mean(0).sqrt()
    # A thousand entries, each rounded to the dtype three times.
    expected = torch.where(is_kept, ADAM_RMS, 0.0)
    torch.testing.assert_close(sizes, expected, rtol=4 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("shape", [(64, 64), (32, 96), (96, 32)])
def test_an_orthogonalized_residual_has_adams_size(shape):
    result = orthogonalized(torch.randn(shape))
    rms = result.square().mean().sqrt().item()
    # Singular values between 0.67 and 1.21 in place of one.
    assert 0.67 * ADAM_RMS < rms < 1.21 * ADAM_RMS
    assert orthogonalized(torch.zeros(shape)).count_nonzero() == 0
