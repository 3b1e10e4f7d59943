"""The search for a learning rate: which rates it tries, and when it ends."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adarankgrad.compare.tune import MAX_RUNS, next_rates


def search(loss_of, start, num_runs=MAX_RUNS):
    losses = {}
    while rates := next_rates(losses, start, num_runs):
        for rate in rates:
            assert rate not in losses
            losses[rate] = loss_of(rate)
    return losses


def valley(best):
    return lambda rate: abs(math.log(rate / best))


@given(best=st.floats(1e-4, 1e-1), start=st.floats(1e-4, 1e-1))
def test_no_search_takes_more_than_eight_runs_or_one_rate_twice(best, start):
    assert 3 <= len(search(valley(best), start)) <= MAX_RUNS


@given(best=st.floats(1e-3, 1e-2), factor=st.floats(1 / 8, 8))
def test_a_valley_within_eight_times_of_the_start_is_found(best, factor):
    losses = search(valley(best), best * factor)
    found = min(losses, key=losses.get)
    # Three runs reach twice the start, two more eight times it, one beyond brackets; the refining
    # runs halve a factor of two. 0.2 % are for rounding rates to three digits.
    assert max(found / best, best / found) <= math.sqrt(2) * 1.01


def test_a_found_rate_has_worse_ones_at_both_sides_and_close_by():
    losses = search(valley(3e-3), 2e-3)
    found = min(losses, key=losses.get)
    assert min(losses) < found < max(losses)
    assert any(found < rate <= found * 1.42 for rate in losses)
    assert any(found > rate >= found / 1.42 for rate in losses)


def test_where_everything_diverges_the_rate_falls_fast():
    losses = search(lambda rate: math.inf if rate > 1e-4 else rate, 1.0)
    assert any(rate <= 1e-4 for rate in losses)


@pytest.mark.parametrize("num_runs", [1, 2, 3, 5])
def test_fewer_runs_can_be_asked_for(num_runs):
    losses = search(valley(1.0), 1e-3, num_runs)
    assert len(losses) == num_runs
    assert 1e-3 in losses
