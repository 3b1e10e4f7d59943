"""Sides, views and the product that lifts: every shape is a matrix with its basis on the left."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adarankgrad.core.projection import SIDES, layout_of, lift_into_, project

from .matrices import few_examples, random_orthonormal, seeds

shapes = st.lists(st.integers(1, 6), min_size=2, max_size=5).map(torch.Size)
sides = st.sampled_from(SIDES)


@pytest.mark.parametrize(
    ("shape", "side", "num_rows", "is_transposed"),
    [
        ((6, 4), "short", 4, True),  # tall: the columns are the short side, as in GaLore
        ((6, 4), "long", 6, False),
        ((6, 4), "left", 6, False),
        ((6, 4), "right", 4, True),
        ((4, 6), "short", 4, False),
        ((4, 6), "long", 6, True),
        ((4, 6), "left", 4, False),
        ((4, 6), "right", 6, True),
        ((5, 5), "short", 5, True),  # square counts as tall, as in GaLore
        ((5, 5), "long", 5, False),
    ],
)
def test_the_side_is_decided_by_the_shape(shape, side, num_rows, is_transposed):
    layout = layout_of(torch.Size(shape), side)
    assert layout.num_rows == num_rows
    assert layout.num_cols == shape[0] * shape[1] // num_rows
    assert layout.is_transposed is is_transposed
    assert layout.num_matrices == 1
    assert layout.batch_shape == ()
    assert layout.view(torch.zeros(shape)).shape == (layout.num_rows, layout.num_cols)


def test_a_convolution_is_one_matrix_of_filters():
    """(out 8, in 3, 2, 2): 8 × 12; the short side is the 8 filters."""
    layout = layout_of(torch.Size((8, 3, 2, 2)))
    assert (layout.num_rows, layout.num_cols, layout.num_matrices) == (8, 12, 1)
    weight = torch.randn(8, 3, 2, 2)
    assert torch.equal(layout.view(weight), weight.reshape(8, 12))


def test_stacked_experts_are_matrices_of_their_own():
    layout = layout_of(torch.Size((3, 8, 5)), is_stacked=True)
    assert (layout.num_rows, layout.num_cols, layout.num_matrices) == (5, 8, 3)
    assert layout.batch_shape == (3,)
    weight = torch.randn(3, 8, 5)
    assert torch.equal(layout.view(weight), weight.mT)


def test_two_axes_are_never_a_stack():
    assert layout_of(torch.Size((3, 8)), is_stacked=True) == layout_of(torch.Size((3, 8)))


@few_examples
@given(shape=shapes, side=sides, is_stacked=st.booleans())
def test_views_share_memory_and_have_the_shape_that_the_layout_says(shape, side, is_stacked):
    layout = layout_of(shape, side, is_stacked=is_stacked)
    weight = torch.randn(shape)
    matrix = layout.view(weight)
    assert matrix.shape == (*layout.batch_shape, layout.num_rows, layout.num_cols)
    assert matrix.data_ptr() == weight.data_ptr()
    matrix.fill_(3.0)
    assert torch.all(weight == 3.0)


@few_examples
@given(shape=shapes, is_stacked=st.booleans())
def test_short_and_long_are_the_two_sides(shape, is_stacked):
    short = layout_of(shape, "short", is_stacked=is_stacked)
    long = layout_of(shape, "long", is_stacked=is_stacked)
    assert short.num_rows == long.num_cols == min(short.num_rows, short.num_cols)
    assert short.is_transposed is not long.is_transposed


@few_examples
@given(shape=shapes, side=sides, is_stacked=st.booleans(), rank=st.integers(1, 4), seed=seeds)
def test_projecting_and_lifting_are_the_explicit_formulas(shape, side, is_stacked, rank, seed):
    """W ← decay W − step Q QᵀG, matrix by matrix, to the rounding of sums of six products."""
    layout = layout_of(shape, side, is_stacked=is_stacked)
    rank = min(rank, layout.num_rows)
    bases = [
        random_orthonormal(layout.num_rows, rank, seed + i) for i in range(layout.num_matrices)
    ]
    basis = torch.stack(bases) if layout.is_stacked else bases[0]
    generator = torch.Generator().manual_seed(seed)
    weight, grad = torch.randn(2, *shape, generator=generator, dtype=torch.float64).unbind()
    expected = []
    matrices = layout.view(weight).reshape(-1, layout.num_rows, layout.num_cols)
    grads = layout.view(grad).reshape(-1, layout.num_rows, layout.num_cols)
    for matrix, its_grad, its_basis in zip(matrices, grads, bases, strict=True):
        expected.append(0.9 * matrix - 0.5 * its_basis @ (its_basis.T @ its_grad))

    coords = project(layout.view(grad), basis)
    matrix = layout.view(weight)
    lift_into_(matrix, basis, coords, decay=0.9, step=0.5)
    torch.testing.assert_close(
        layout.view(weight).reshape(-1, layout.num_rows, layout.num_cols), torch.stack(expected)
    )


def test_projection_and_lift_by_hand():
    """basis e₂: the second row is seen and moved; W = 0.5 W − 2 e₂ (3 4)."""
    basis = torch.tensor([[0.0], [1.0]])
    grad = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    coords = project(grad, basis)
    assert coords.tolist() == [[3.0, 4.0]]
    weight = torch.tensor([[2.0, 2.0], [2.0, 2.0]])
    lift_into_(weight, basis, coords, decay=0.5, step=2.0)
    assert weight.tolist() == [[1.0, 1.0], [-5.0, -7.0]]


def test_a_half_precision_gradient_gives_coordinates_in_the_bases_dtype():
    """bfloat16 has 8 bits: each factor is off by 2^-9, sums of 16 by little more."""
    basis = random_orthonormal(16, 3, 0).float()
    grad = torch.randn(16, 20, dtype=torch.bfloat16)
    coords = project(grad, basis)
    assert coords.dtype == torch.float32
    exact = basis.double().mT @ grad.double()
    bound = 3 * 2.0**-9 * basis.double().abs().mT @ grad.double().abs()
    assert torch.all((coords.double() - exact).abs() <= bound)


@pytest.mark.parametrize("num_matrices", [None, 2])
def test_a_half_precision_weight_is_lifted_in_its_own_dtype(num_matrices):
    shape = (8, 6) if num_matrices is None else (num_matrices, 8, 6)
    layout = layout_of(torch.Size(shape), "left", is_stacked=True)
    weight = torch.randn(shape, dtype=torch.bfloat16)
    before = weight.clone()
    basis = torch.randn(*shape[:-2], 8, 2)
    coords = torch.randn(*shape[:-2], 2, 6)
    lift_into_(layout.view(weight), basis, coords, decay=1.0, step=0.1)
    expected = before.double() - 0.1 * basis.double() @ coords.double()
    magnitude = before.double().abs() + 0.1 * basis.double().abs() @ coords.double().abs()
    assert weight.dtype == torch.bfloat16
    assert torch.all((weight.double() - expected).abs() <= 4 * 2.0**-9 * magnitude)


def test_a_rank_of_zero_moves_nothing_but_the_decay():
    weight = torch.ones(3, 4)
    lift_into_(weight, torch.zeros(3, 0), torch.zeros(0, 4), decay=0.5, step=1.0)
    assert torch.all(weight == 0.5)


def test_an_unknown_side_and_a_vector_are_refused():
    with pytest.raises(ValueError, match="side must be one of short, long, left, right, got 'top'"):
        layout_of(torch.Size((3, 4)), "top")
    with pytest.raises(ValueError, match=r"at least two axes, got shape \(3,\)"):
        layout_of(torch.Size((3,)))
