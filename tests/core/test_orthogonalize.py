"""Newton-Schulz brings every singular value near one and leaves the singular vectors alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adarankgrad.core.orthogonalize import QUINTIC, orthogonalize

from .matrices import few_examples, seeds


def scalar_iteration(value: torch.Tensor, num_iterations: int) -> torch.Tensor:
    """What the iteration does to one singular value."""
    linear, cubic, quintic = QUINTIC
    for _ in range(num_iterations):
        value = linear * value + cubic * value**3 + quintic * value**5
    return value


def test_five_iterations_bring_values_above_a_hundredth_near_one():
    values = torch.logspace(-2, 0, 10_000, dtype=torch.float64)
    after = scalar_iteration(values, 5)
    assert 0.67 < after.min() and after.max() < 1.21


@given(
    rows=st.integers(1, 12),
    cols=st.integers(1, 12),
    batch=st.sampled_from([(), (1,), (3,)]),
    num_iterations=st.integers(1, 6),
    seed=seeds,
)
@few_examples
def test_singular_vectors_stay_and_values_follow_the_scalar_iteration(
    rows, cols, batch, num_iterations, seed
):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(*batch, rows, cols, generator=generator, dtype=torch.float64)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    norms = values.square().sum(-1, keepdim=True).sqrt()
    expected = left * scalar_iteration(values / norms, num_iterations).unsqueeze(-2) @ right
    result = orthogonalize(matrix, num_iterations=num_iterations)
    # Roundings grow with the iteration's slope, 3.4445 a round at most.
    tolerance = 100 * QUINTIC[0] ** num_iterations * torch.finfo(torch.float64).eps
    torch.testing.assert_close(result, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_the_size_of_a_matrix_does_not_matter(dtype, size):
    matrix = torch.randn(6, 9)
    if torch.tensor(size).to(dtype) in (0.0, torch.inf):
        pytest.skip(f"{size} is out of range of {dtype}")
    scaled = (matrix * size).to(dtype)
    result = orthogonalize(scaled)
    assert result.dtype is dtype
    # The same rounded entries in float64; float32 and the slope 3.4445⁵ = 485 stand between, and
    # the result's own rounding.
    expected = orthogonalize(scaled.double() / size)
    tolerance = 485 * 54**0.5 * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("shape", [(2, 3, 4), (4, 40)])
def test_zero_stays_zero(shape):
    assert torch.equal(orthogonalize(torch.zeros(shape)), torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(4, 64), (64, 4), (3, 5, 90)])
@pytest.mark.parametrize("rank", [2, 4])
@pytest.mark.parametrize("size", [1e-42, 1e-4, 1.0, 1e30])
def test_long_matrices_come_out_as_their_short_sides_say(dtype, shape, rank, size, monkeypatch):
    if torch.tensor(size).to(dtype) in (0.0, torch.inf):
        pytest.skip(f"{size} is out of range of {dtype}")
    matrix = (torch.randn(*shape[:-1], rank) @ torch.randn(*shape[:-2], rank, shape[-1])).double()
    matrix = (matrix * size).to(dtype)
    exact = matrix.double() / matrix.double().abs().max()
    left, values, right = torch.linalg.svd(exact, full_matrices=False)
    norms = values.square().sum(-1, keepdim=True).sqrt()
    expected = left * scalar_iteration(values / norms, 5).unsqueeze(-2) @ right
    monkeypatch.setattr("adarankgrad.core.orthogonalize._CHUNK", 50)  # several parts
    result = orthogonalize(matrix)
    assert result.dtype is dtype
    # An error in the Gram matrix, one rounding of each of its entries, grows with the slope of its
    # root, 3.4445⁵ = 485, twice where it stands in a factor and in the next round's matrix; then
    # the result's own rounding.
    working = torch.promote_types(dtype, torch.float32)
    tolerance = 2 * 485 * 5 * torch.finfo(working).eps + torch.finfo(dtype).eps
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=tolerance)


def test_more_rounds_than_a_gram_matrix_bears_are_done_on_the_matrix():
    matrix = torch.randn(16, 3) @ torch.randn(3, 256)
    expected = orthogonalize(matrix.double(), num_iterations=12)
    result = orthogonalize(matrix, num_iterations=12)
    # Rounding outside the three directions grows by 3.4445 a round, to one at most; it takes
    # twelve rounds to bring 6e-8 to 0.17.
    assert (result.double() - expected).abs().max() < QUINTIC[0] ** 12 * torch.finfo().eps


def test_each_matrix_of_a_stack_is_taken_by_itself():
    stack = torch.randn(3, 5, 4, dtype=torch.float64) * torch.tensor([1e-6, 1.0, 1e6]).view(3, 1, 1)
    single = torch.stack([orthogonalize(matrix) for matrix in stack])
    torch.testing.assert_close(orthogonalize(stack), single)
