"""The gradient of the nuclear norm, by hand and by autograd."""

from __future__ import annotations

import pytest
import torch

from adarankgrad.core.nuclear_norm import nuclear_norm_gradient


def test_of_a_diagonal_matrix_it_is_the_signs():
    matrix = torch.diag(torch.tensor([3.0, -0.5]))
    torch.testing.assert_close(nuclear_norm_gradient(matrix), torch.diag(torch.tensor([1.0, -1])))


@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (6, 6)])
def test_it_is_what_autograd_gives(shape):
    matrix = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(torch.linalg.svdvals(matrix).sum(), matrix)
    torch.testing.assert_close(nuclear_norm_gradient(matrix.detach()), expected)


def test_directions_that_the_matrix_does_not_have_get_none():
    matrix = torch.outer(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0, 0.0]))
    expected = torch.tensor([[0.0, 0.6, 0.0], [0.0, 0.8, 0.0]])
    # Singular vectors of float32, of a matrix of two rows.
    torch.testing.assert_close(nuclear_norm_gradient(matrix), expected, rtol=0, atol=1e-6)
    assert torch.equal(nuclear_norm_gradient(torch.zeros(2, 3)), torch.zeros(2, 3))
