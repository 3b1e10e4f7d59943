"""The range finder: orthonormal for every matrix, honest about energy, near the best possible."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adarankgrad.core.range_finder import find_range, find_range_exactly, orthonormalize

from .matrices import few_examples, matrices, matrix_with_spectrum, random_orthonormal, seeds

FINDERS = [find_range, find_range_exactly]


def orthonormality_error(basis):
    identity = torch.eye(basis.shape[-1], dtype=torch.float64)
    return (basis.double().mT @ basis.double() - identity).abs().max().item()


def orthonormality_tolerance(dtype):
    """What `orthonormalize` promises: a hundred units of rounding."""
    return 100 * torch.finfo(dtype).eps


def energy_tolerance(matrix):
    """Relative to the total energy.

    Each entry of the small Gram matrix is a sum of n products, so it is off by at most n units of
    rounding of ‖B‖²_F; the eigenvalue solver adds about k more, the projection m.
    """
    return 2 * sum(matrix.shape[-2:]) * torch.finfo(matrix.dtype).eps


def polynomial_spectrum(length, power):
    return torch.arange(1, length + 1, dtype=torch.float64) ** -power


@few_examples
@given(matrix=matrices(), num_directions=st.integers(1, 12), seed=seeds)
@pytest.mark.parametrize("finder", FINDERS)
def test_basis_is_orthonormal_whatever_the_shape_and_rank(finder, matrix, num_directions, seed):
    generator = torch.Generator().manual_seed(seed)
    subspace = finder(matrix, num_directions, oversampling=3, generator=generator)
    num_kept = min(num_directions, *matrix.shape[-2:])
    assert subspace.basis.shape == (*matrix.shape[:-1], num_kept)
    assert subspace.coords.shape == (*matrix.shape[:-2], num_kept, matrix.shape[-1])
    assert subspace.energies.shape == (*matrix.shape[:-2], num_kept)
    assert subspace.total.shape == matrix.shape[:-2]
    assert subspace.basis.dtype == subspace.coords.dtype == matrix.dtype
    assert subspace.energies.dtype == subspace.total.dtype == torch.float64
    assert orthonormality_error(subspace.basis) < orthonormality_tolerance(matrix.dtype)


@few_examples
@given(matrix=matrices(), num_directions=st.integers(1, 12), seed=seeds)
@pytest.mark.parametrize("finder", FINDERS)
def test_energies_are_true_for_every_rank_at_once(finder, matrix, num_directions, seed):
    generator = torch.Generator().manual_seed(seed)
    subspace = finder(matrix, num_directions, generator=generator)
    total = matrix.double().square().sum((-2, -1))
    tolerance = energy_tolerance(matrix)
    assert torch.all((subspace.total.double() - total).abs() <= tolerance * total)
    assert torch.all(subspace.energies >= 0)
    assert torch.all(subspace.energies.diff(dim=-1) <= 0)
    for rank in range(1, subspace.basis.shape[-1] + 1):
        basis = subspace.basis[..., :rank].double()
        captured = (basis.mT @ matrix.double()).square().sum((-2, -1))
        claimed = subspace.energies[..., :rank].double().sum(-1)
        assert torch.all((claimed - captured).abs() <= tolerance * total)


@few_examples
@given(matrix=matrices(), seed=seeds)
@pytest.mark.parametrize("finder", FINDERS)
def test_coordinates_are_the_matrix_in_the_basis(finder, matrix, seed):
    subspace = finder(matrix, 6, generator=torch.Generator().manual_seed(seed))
    expected = subspace.basis.double().mT @ matrix.double()
    scale = torch.linalg.vector_norm(matrix.double(), dim=(-2, -1)).max().item()
    error = (subspace.coords.double() - expected).abs().max().item()
    assert error <= energy_tolerance(matrix) * scale


@few_examples
@given(matrix=matrices(), seed=seeds)
def test_a_sketch_as_wide_as_the_matrix_captures_everything(matrix, seed):
    short_side = min(matrix.shape[-2:])
    subspace = find_range(matrix, short_side, generator=torch.Generator().manual_seed(seed))
    lost = subspace.total.double() - subspace.energies.double().sum(-1)
    assert torch.all(lost.abs() <= energy_tolerance(matrix) * subspace.total.double())


@few_examples
@given(matrix=matrices(), seed=seeds)
def test_the_exact_finder_is_never_beaten(matrix, seed):
    exact = find_range_exactly(matrix, 6)
    values = torch.linalg.svdvals(matrix.double())[..., : exact.energies.shape[-1]]
    total = values.square().sum(-1)
    tolerance = energy_tolerance(matrix) * exact.total.double()
    best = values.square().cumsum(-1)
    assert torch.all((exact.energies.double().cumsum(-1) - best).abs() <= tolerance.unsqueeze(-1))
    sketched = find_range(matrix, 6, generator=torch.Generator().manual_seed(seed))
    assert torch.all(sketched.energies.double().sum(-1) <= total + tolerance)


def test_a_diagonal_matrix_by_hand():
    """diag(3, 4): the second axis is the stronger; energies 16 and 9 of 25."""
    matrix = torch.diag(torch.tensor([3.0, 4.0], dtype=torch.float64))
    for finder in FINDERS:
        subspace = finder(matrix, 2)
        swapped = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
        torch.testing.assert_close(subspace.basis.abs(), swapped, atol=1e-14, rtol=0)
        torch.testing.assert_close(
            subspace.energies, torch.tensor([16.0, 9.0], dtype=torch.float64)
        )
        assert subspace.total.item() == pytest.approx(25.0)


def test_total_is_of_the_whole_matrix_and_not_of_the_sketch():
    """The identity of size 8: any one direction holds an eighth."""
    for finder in FINDERS:
        subspace = finder(torch.eye(8, dtype=torch.float64), 1, oversampling=0)
        assert subspace.total.item() == pytest.approx(8.0)
        assert subspace.energies.sum().item() == pytest.approx(1.0)


def test_columns_are_ordered_by_energy_where_raw_sketch_columns_are_not():
    """σ_i = 0.8^i, 64×64: the first column of a raw sketch holds a fraction of the first direction.

    Best share of one direction: (1 − 0.8²)/(1 − 0.8^128) = 0.36.
    """
    values = 0.8 ** torch.arange(64, dtype=torch.float64)
    matrix = matrix_with_spectrum(64, 64, values)
    generator = torch.Generator().manual_seed(0)
    subspace = find_range(matrix, 16, generator=generator)
    raw = torch.linalg.qr(matrix @ torch.randn(64, 16, dtype=torch.float64)).Q[:, :1]
    raw_share = ((raw.mT @ matrix).square().sum() / subspace.total).item()
    first_share = (subspace.energies[0] / subspace.total).item()
    assert first_share == pytest.approx(0.36, abs=1e-3)
    assert raw_share < 0.75 * first_share


@pytest.mark.parametrize("spectrum", ["slow", "fast"])
def test_expected_error_is_within_the_bound_of_halko_martinsson_and_tropp(spectrum):
    """E‖A − A_k‖² <= (1 + k/(p − 1)) · tail² for a sketch of k + p columns without iterations.

    Theorem 10.5 bounds ‖(I − QQᵀ)A‖; keeping the best k directions of the sketch obeys the same
    bound, since ‖A − Q[QᵀA]_k‖² <= ‖A − QQᵀA_k‖² = tail² + ‖(I − QQᵀ)A_k‖² and the proof of the
    theorem bounds the last term by tail² · k/(p − 1) in mean. The lower side is Eckart and Young.
    """
    num_directions, oversampling, num_draws = 5, 6, 200
    decay = {"slow": polynomial_spectrum(30, 0.5), "fast": 0.7 ** torch.arange(30).double()}
    matrix = matrix_with_spectrum(40, 30, decay[spectrum])
    tail = decay[spectrum][num_directions:].square().sum().item()
    errors = []
    for seed in range(num_draws):
        subspace = find_range(
            matrix,
            num_directions,
            oversampling=oversampling,
            power_iterations=0,
            generator=torch.Generator().manual_seed(seed),
        )
        errors.append((subspace.total - subspace.energies.sum()).item())
    mean_error = sum(errors) / num_draws
    assert min(errors) >= tail * (1 - 1e-12)
    assert mean_error <= (1 + num_directions / (oversampling - 1)) * tail


def test_power_iterations_sharpen_a_slowly_decaying_spectrum():
    matrix = matrix_with_spectrum(60, 50, polynomial_spectrum(50, 0.5))
    captured = [
        find_range(
            matrix,
            8,
            oversampling=2,
            power_iterations=rounds,
            generator=torch.Generator().manual_seed(1),
        ).energies.sum()
        for rounds in (0, 1, 3, 10)
    ]
    best = polynomial_spectrum(50, 0.5)[:8].square().sum()
    assert captured[0] < captured[1] < captured[2] < captured[3] <= best * (1 + 1e-12)
    assert captured[3] > 0.98 * best


def test_a_warm_start_beats_a_cold_one_of_the_same_cost():
    """A warm start counts as one power iteration; cold, the same products are those of none."""
    before = matrix_with_spectrum(60, 50, polynomial_spectrum(50, 0.5))
    drift = 0.05 * torch.randn(60, 50, dtype=torch.float64) / 50**0.5
    matrix = before + drift
    start = find_range_exactly(before, 10).basis.mT @ matrix

    def captured(seed, power_iterations, start):
        generator = torch.Generator().manual_seed(seed)
        return find_range(
            matrix,
            8,
            oversampling=4,
            power_iterations=power_iterations,
            start=start,
            generator=generator,
        ).energies.sum()

    best = find_range_exactly(matrix, 8).energies.sum()
    for seed in range(10):
        warm, cold, dearer = (
            captured(seed, 1, start),
            captured(seed, 0, None),
            captured(seed, 1, None),
        )
        assert cold < dearer < warm <= best * (1 + 1e-12)
        assert warm > 0.99 * best


def test_a_warm_start_finds_directions_that_it_did_not_have():
    """The old basis misses the only direction there is; the random columns find it."""
    matrix = matrix_with_spectrum(20, 20, torch.ones(1, dtype=torch.float64))
    start = torch.zeros(3, 20, dtype=torch.float64)
    subspace = find_range(matrix, 2, oversampling=4, start=start)
    assert subspace.energies[0].item() == pytest.approx(1.0)
    assert orthonormality_error(subspace.basis) < orthonormality_tolerance(torch.float64)


@pytest.mark.parametrize("rows", ["parallel", "one zero", "all zero"])
def test_a_start_of_dependent_rows_is_worth_a_cold_one(rows):
    """Equal singular values: what a sketch of dependent columns misses shows in the energy."""
    matrix = matrix_with_spectrum(48, 40, torch.ones(16, dtype=torch.float64))
    direction = torch.randn(1, 40, dtype=torch.float64)
    start = torch.randn(16, 1, dtype=torch.float64) @ direction
    if rows != "parallel":
        start = find_range(matrix, 16).coords.clone()
        start[3 if rows == "one zero" else slice(None)] = 0.0
    subspace = find_range(matrix, 16, start=start)
    assert subspace.energies.sum().item() == pytest.approx(16.0)


@pytest.mark.parametrize("start_size", [1e-44, 1e-30, 1e-15, 1.0, 1e15, 1e30])
@pytest.mark.parametrize("matrix_size", [1e-30, 1.0, 1e25])
def test_a_warm_start_helps_at_any_size(start_size, matrix_size):
    matrix = matrix_with_spectrum(48, 40, torch.ones(16, dtype=torch.float64)).float()
    start = find_range(matrix, 16).coords * start_size
    subspace = find_range(matrix * matrix_size, 16, oversampling=0, start=start)
    share = subspace.energies.sum().item() / matrix_size**2
    # Denormal rows keep one digit or two, which is enough of a start, or are set aside.
    assert share == pytest.approx(16.0, rel=1e-4)


@pytest.mark.parametrize("size", [0.0, 1e-44, 1e-39, 1e-30, 1e-21, 1e-15, 1e15, 1e25])
@pytest.mark.parametrize("is_warm", [False, True])
def test_a_matrix_of_any_size_has_its_directions_in_a_stack_with_moderate_ones(size, is_warm):
    first = matrix_with_spectrum(30, 20, polynomial_spectrum(20, 1.0)).float()
    alone = find_range_exactly(first.double(), 4).energies
    stack = torch.stack([first, first * size])
    start = first[:6].expand(2, -1, -1) if is_warm else None
    subspace = find_range(stack, 4, power_iterations=3, start=start)
    for basis in subspace.basis:
        assert orthonormality_error(basis) < orthonormality_tolerance(torch.float32)
    torch.testing.assert_close(subspace.energies[0], alone, rtol=1e-3, atol=0)
    # Denormal numbers around 1e-44 have a digit or less.
    if size >= 1e-39:
        torch.testing.assert_close(subspace.energies[1] / size**2, alone, rtol=1e-3, atol=0)


@few_examples
@given(matrix=matrices(), num_old=st.integers(1, 30), seed=seeds)
def test_a_warm_start_of_any_width_leaves_the_basis_orthonormal(matrix, num_old, seed):
    old = random_orthonormal(matrix.shape[-2], min(num_old, matrix.shape[-2]), seed)
    start = old.to(matrix.dtype).mT @ matrix
    generator = torch.Generator().manual_seed(seed)
    subspace = find_range(matrix, 5, start=start, generator=generator)
    assert orthonormality_error(subspace.basis) < orthonormality_tolerance(matrix.dtype)


@pytest.mark.parametrize("is_warm", [False, True])
def test_an_own_generator_leaves_the_global_one_untouched_and_repeats_itself(is_warm):
    matrix = torch.randn(12, 9)
    start = torch.randn(3, 9) if is_warm else None
    global_state = torch.get_rng_state()
    first, again, other = (
        find_range(matrix, 4, start=start, generator=torch.Generator().manual_seed(seed))
        for seed in (7, 7, 8)
    )
    assert torch.equal(torch.get_rng_state(), global_state)
    for one, two in zip(first, again, strict=True):
        assert torch.equal(one, two)
    assert not torch.equal(first.basis, other.basis)


def test_without_a_generator_the_global_one_is_used():
    matrix = torch.randn(12, 9)
    global_state = torch.get_rng_state()
    find_range(matrix, 4)
    assert not torch.equal(torch.get_rng_state(), global_state)


@pytest.mark.parametrize("finder", FINDERS)
def test_a_stack_is_the_matrices_one_by_one(finder):
    """A full sketch has one answer, up to signs, so each matrix can be checked against its own."""
    stack = torch.stack(
        [matrix_with_spectrum(6, 9, 2.0 ** -torch.arange(6), seed) for seed in range(3)]
    )
    together = finder(stack, 6)
    for index, matrix in enumerate(stack):
        alone = finder(matrix, 6)
        torch.testing.assert_close(together.energies[index], alone.energies)
        aligned = (together.basis[index].mT @ alone.basis).abs()
        torch.testing.assert_close(aligned, torch.eye(6, dtype=torch.float64), atol=1e-10, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("condition", [1e0, 1e1, 1e2, 1e4, 1e8, 1e14])
def test_orthonormalize_keeps_the_span_at_every_condition_number(dtype, condition):
    """Every column lies in the span of the result, to the rounding of its own length."""
    values = torch.logspace(0, -math.log10(condition), 12, dtype=torch.float64)
    columns = matrix_with_spectrum(80, 12, values).to(dtype)
    basis = orthonormalize(columns)
    assert orthonormality_error(basis) < orthonormality_tolerance(dtype)
    wide = columns.double()
    outside = wide - basis.double() @ (basis.double().mT @ wide)
    column_norms = torch.linalg.vector_norm(wide, dim=0)
    assert torch.all(
        torch.linalg.vector_norm(outside, dim=0) <= 100 * torch.finfo(dtype).eps * column_norms
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_columns", [4, 8, 16, 32])
def test_orthonormalize_is_not_deceived_by_columns_with_harmless_pivots(dtype, num_columns):
    """A Kahan-like matrix: every Cholesky pivot is 0.4, and the condition number grows with k.

    Pivots are distances from the span of the columns *before*; they do not bound the smallest
    singular value: it is 1/27 for k = 4, 1/36000 for 16 and 1/23 million for 32.
    """
    pivot = 0.4
    triangular = torch.zeros(num_columns, num_columns, dtype=torch.float64)
    triangular[0, 0] = 1.0
    for column in range(1, num_columns):
        triangular[:column, column] = -math.sqrt((1 - pivot**2) / column)
        triangular[column, column] = pivot
    columns = random_orthonormal(64, num_columns, 0) @ triangular
    basis = orthonormalize(columns.to(dtype))
    assert orthonormality_error(basis) < orthonormality_tolerance(dtype)


@pytest.mark.parametrize("size", [1e-44, 1e-41, 1e-30, 1e-22, 1e-15, 1e15, 1e25])
@pytest.mark.parametrize("is_one_column", [False, True])
def test_orthonormalize_takes_columns_of_any_length(size, is_one_column):
    columns = torch.randn(80, 12)
    columns[:, 3 if is_one_column else slice(None)] *= size
    assert orthonormality_error(orthonormalize(columns)) < orthonormality_tolerance(torch.float32)


def test_orthonormalize_completes_a_deficient_set():
    columns = torch.zeros(6, 3, dtype=torch.float64)
    columns[0, 0] = columns[0, 1] = 2.0
    basis = orthonormalize(columns)
    assert orthonormality_error(basis) < orthonormality_tolerance(torch.float64)
    assert basis[0, 0].abs().item() == pytest.approx(1.0)


@pytest.mark.parametrize("finder", FINDERS)
@pytest.mark.parametrize("size", [1e18, 1e25, 1e-18, 1e-25, 1e-30])
def test_a_finite_float32_gradient_of_any_size_has_the_directions_of_a_moderate_one(finder, size):
    """Squares leave float32 beyond 1e19 and below 1e-23; the entries themselves are in range."""
    values = 2.0 ** -torch.arange(10)
    moderate = matrix_with_spectrum(12, 10, values).float()
    subspace = finder(moderate * size, 3, generator=torch.Generator().manual_seed(0))
    assert torch.all(torch.isfinite(subspace.basis))
    assert orthonormality_error(subspace.basis) < orthonormality_tolerance(torch.float32)
    strongest = find_range_exactly(moderate.double(), 3).basis
    overlap = (strongest.mT @ subspace.basis.double()).square().sum().item()
    assert overlap > 2.9  # 3 when the spans agree; a sketch of 10 of 10 columns is exact


@pytest.mark.parametrize("finder", FINDERS)
def test_impossible_counts_are_refused_by_name(finder):
    matrix = torch.eye(3)
    with pytest.raises(ValueError, match="num_directions must be at least 1, got 0"):
        finder(matrix, 0)
    with pytest.raises(ValueError, match="oversampling must not be negative, got -1"):
        finder(matrix, 1, oversampling=-1)
    with pytest.raises(ValueError, match="power_iterations must not be negative, got -2"):
        finder(matrix, 1, power_iterations=-2)
