"""The rank rule: the smallest rank that captures enough, and bounds in a fixed order."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adarankgrad.core.range_finder import find_range_exactly
from adarankgrad.core.rank import choose_rank, energy_from_residual

from .matrices import few_examples, matrix_with_spectrum, seeds

descending_energies = st.lists(st.floats(0.0, 1e3), min_size=1, max_size=12).map(
    lambda values: torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
)
fractions = st.floats(0.01, 1.0)


def choose(energies, total=None, **options):
    defaults = {"energy": 1.0, "min_rank": 1, "max_rank": 1000}
    total = energies.sum(-1) if total is None else total
    return choose_rank(energies, total, **{**defaults, **options})


def test_two_directions_by_hand():
    """Energies 16 and 9 of 25: one direction holds 0.64."""
    energies = torch.tensor([16.0, 9.0])
    assert choose(energies, energy=0.60) == 1
    assert choose(energies, energy=0.64) == 1
    assert choose(energies, energy=0.65) == 2
    assert choose(energies, energy=1.0) == 2


@few_examples
@given(energies=descending_energies, energy=fractions, outside=st.floats(0.0, 100.0))
def test_it_is_the_smallest_rank_that_reaches_the_threshold(energies, energy, outside):
    """Brute force over every rank; the slack is that of sums of k numbers."""
    total = energies.sum() + outside
    slack = 1.0 - len(energies) * torch.finfo(torch.float64).eps
    reaching = [
        rank
        for rank in range(1, len(energies) + 1)
        if energies[:rank].cumsum(0)[-1] >= energy * slack * total
    ]
    expected = reaching[0] if reaching else len(energies)
    assert choose(energies, total, energy=energy) == expected


@few_examples
@given(energies=descending_energies, lower=fractions, higher=fractions)
def test_more_energy_never_takes_fewer_directions(energies, lower, higher):
    lower, higher = sorted((lower, higher))
    assert choose(energies, energy=lower) <= choose(energies, energy=higher)


def test_the_share_is_of_the_whole_matrix_and_not_of_the_sketch():
    """Two directions of energy 1 inside a matrix of energy 8: half of it is out of reach."""
    energies, total = torch.ones(2), torch.tensor(8.0)
    assert choose(energies, total, energy=0.125) == 1
    assert choose(energies, total, energy=0.25) == 2
    assert choose(energies, total, energy=0.5) == 2


@few_examples
@given(
    energies=descending_energies,
    energy=fractions,
    min_rank=st.integers(1, 15),
    max_rank=st.integers(1, 15),
    previous_rank=st.one_of(st.none(), st.integers(1, 15)),
    monotone=st.booleans(),
    rank_multiple=st.integers(1, 5),
)
def test_bounds_decide_in_the_order_multiple_monotone_floor_ceiling_width(
    energies, energy, min_rank, max_rank, previous_rank, monotone, rank_multiple
):
    options = {"min_rank": min_rank, "max_rank": max_rank, "rank_multiple": rank_multiple}
    rank = choose(
        energies, energy=energy, previous_rank=previous_rank, monotone=monotone, **options
    )
    wanted = math.ceil(choose(energies, energy=energy) / rank_multiple) * rank_multiple
    if monotone and previous_rank is not None:
        wanted = min(wanted, previous_rank)
    wanted = max(wanted, min_rank)
    wanted = min(wanted, max_rank)
    assert rank == min(wanted, len(energies))


def test_the_floor_lifts_what_monotone_would_hold_down():
    energies = torch.ones(8)
    assert choose(energies, energy=1.0, previous_rank=3, monotone=True) == 3
    assert choose(energies, energy=1.0, previous_rank=3, monotone=True, min_rank=5) == 5
    assert choose(energies, energy=0.25, previous_rank=3, monotone=True) == 2
    assert choose(energies, energy=1.0, previous_rank=3) == 8
    assert choose(energies, energy=1.0, previous_rank=None, monotone=True) == 8


def test_ranks_are_rounded_up_to_a_multiple_until_the_ceiling_cuts_them():
    energies = torch.ones(10)
    assert choose(energies, energy=0.3, rank_multiple=4) == 4
    assert choose(energies, energy=0.5, rank_multiple=4) == 8
    assert choose(energies, energy=0.9, rank_multiple=4) == 10
    assert choose(energies, energy=0.5, rank_multiple=4, max_rank=6) == 6


@few_examples
@given(rank=st.integers(1, 8), dtype=st.sampled_from([torch.float32, torch.float64]), seed=seeds)
def test_full_energy_of_a_deficient_matrix_is_its_rank(rank, dtype, seed):
    """Rounding leaves the sum a little short of the total; that must not ask for all columns."""
    matrix = matrix_with_spectrum(12, 8, torch.ones(rank), seed).to(dtype)
    subspace = find_range_exactly(matrix, 8)
    rounding = torch.finfo(dtype).eps
    assert choose(subspace.energies, subspace.total, energy=1.0, rounding=rounding) == rank


def test_a_stack_shares_one_rank_read_from_its_summed_energy():
    """Shares of the sum (9 + 1, 1 + 1, 0 + 1 of 13): 10/13 = 0.77, 12/13 = 0.92."""
    energies = torch.tensor([[9.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    assert choose(energies, energy=0.76) == 1
    assert choose(energies, energy=0.78) == 2
    assert choose(energies, energy=0.93) == 3


def test_a_zero_matrix_gets_the_floor():
    assert choose(torch.zeros(5)) == 1
    assert choose(torch.zeros(5), min_rank=3) == 3


def test_a_published_residual_threshold_is_an_energy():
    """ξ = ‖G − G_r‖_F/‖G‖_F = 0.2 loses 4 % of the energy."""
    assert energy_from_residual(0.2) == pytest.approx(0.96)
    assert energy_from_residual(0.0) == 1.0
    values = torch.tensor([1.0, 0.5, 0.25, 0.125, 0.0625])
    matrix = matrix_with_spectrum(9, 7, values)
    subspace = find_range_exactly(matrix, 5)
    for residual in (0.1, 0.2, 0.4, 0.8):
        rank = choose(subspace.energies, subspace.total, energy=energy_from_residual(residual))
        losses = [
            torch.linalg.vector_norm(values[kept:]) / torch.linalg.vector_norm(values)
            for kept in range(6)
        ]
        assert rank == next(kept for kept in range(1, 6) if losses[kept] <= residual)


@pytest.mark.parametrize("residual", [-0.1, 1.0, 2.0, math.nan])
def test_an_impossible_residual_is_refused(residual):
    with pytest.raises(ValueError, match=r"residual must be in \[0, 1\)"):
        energy_from_residual(residual)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"energy": 0.0}, r"energy must be in \(0, 1\], got 0.0"),
        ({"energy": 1.1}, r"energy must be in \(0, 1\], got 1.1"),
        ({"energy": math.nan}, r"energy must be in \(0, 1\], got nan"),
        ({"min_rank": 0}, "min_rank must be at least 1, got 0"),
        ({"max_rank": 0}, "max_rank must be at least 1, got 0"),
        ({"rank_multiple": 0}, "rank_multiple must be at least 1, got 0"),
    ],
)
def test_impossible_options_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        choose(torch.ones(3), **options)
