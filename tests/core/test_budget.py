"""A budget of bytes is divided by worth per byte, and never exceeded."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adarankgrad.core.budget import allocate_ranks, gains_before_any_gradient, gains_of

from .matrices import few_examples


@st.composite
def problems(draw: st.DrawFn):
    """A few matrices with falling gains, floors, and a budget that holds the floors."""
    gains, costs, floors = [], [], []
    for _ in range(draw(st.integers(1, 4))):
        ceiling = draw(st.integers(1, 5))
        values = draw(st.lists(st.floats(0.0, 10.0), min_size=ceiling, max_size=ceiling))
        gains.append(torch.tensor(sorted(values, reverse=True), dtype=torch.float64))
        costs.append(draw(st.integers(1, 9)))
        floors.append(draw(st.integers(0, ceiling)))
    reserved = sum(rank * cost for rank, cost in zip(floors, costs, strict=True))
    return gains, costs, floors, reserved + draw(st.integers(0, 60))


def bytes_of(ranks, costs):
    return sum(rank * cost for rank, cost in zip(ranks, costs, strict=True))


def worth_of(ranks, gains):
    return sum(float(gain[:rank].sum()) for rank, gain in zip(ranks, gains, strict=True))


@given(problem=problems())
@few_examples
def test_ranks_stay_within_budget_floors_and_ceilings(problem):
    gains, costs, floors, budget = problem
    ranks = allocate_ranks(gains, costs, floors, budget)
    assert bytes_of(ranks, costs) <= budget
    for rank, floor, gain in zip(ranks, floors, gains, strict=True):
        assert floor <= rank <= len(gain)


@given(problem=problems())
@few_examples
def test_no_division_of_the_same_bytes_is_worth_more(problem):
    """Against every division there is, at the bytes that were spent."""
    gains, costs, floors, budget = problem
    ranks = allocate_ranks(gains, costs, floors, budget)
    spent = bytes_of(ranks, costs)
    choices = [range(f, len(gain) + 1) for f, gain in zip(floors, gains, strict=True)]
    best = max(
        worth_of(other, gains)
        for other in itertools.product(*choices)
        if bytes_of(other, costs) <= spent
    )
    assert worth_of(ranks, gains) == pytest.approx(best)


def test_where_the_budget_holds_everything_all_get_their_ceiling():
    gains = [gains_before_any_gradient(5, 100), gains_before_any_gradient(2, 10)]
    assert allocate_ranks(gains, [7, 3], [1, 1], 5 * 7 + 2 * 3) == [5, 2]


def test_a_budget_below_the_floors_is_an_error_with_both_numbers():
    with pytest.raises(ValueError, match="budget of 9 bytes .* take 10"):
        allocate_ranks([torch.ones(3)], [5], [2], 9)


def test_directions_are_worth_their_share_times_the_weights_they_move():
    gains = gains_of(torch.tensor([3.0, 1.0]), total=8.0, num_weights=80)
    torch.testing.assert_close(gains, torch.tensor([30.0, 10.0]))
    assert gains_before_any_gradient(7, 40).sum().item() == pytest.approx(40)
