"""The refresh rule: each reason alone, their order, and what NaN does."""

from __future__ import annotations

import math

import pytest

from adarankgrad.core.refresh import (
    RefreshReason,
    RefreshRule,
    measured_reason,
    scheduled_reason,
    staggered_gap,
)


def measured(rule, *, coords=1.0, total=1.0, at_refresh=1.0):
    return measured_reason(rule, coords, total, at_refresh)


def test_without_a_basis_the_first_step_finds_one_whatever_the_gap():
    rule = RefreshRule(max_gap=1)
    assert scheduled_reason(rule, 0, has_basis=False) is RefreshReason.FIRST
    assert scheduled_reason(rule, 99, has_basis=False) is RefreshReason.FIRST


def test_the_maximum_gap_counts_steps_taken_with_the_basis():
    rule = RefreshRule(max_gap=3)
    reasons = [scheduled_reason(rule, steps, has_basis=True) for steps in range(5)]
    assert reasons == [RefreshReason.NONE] * 3 + [RefreshReason.MAX_GAP] * 2


def test_the_papers_criterion_is_a_norm_at_or_below_the_threshold():
    """‖Ĝ‖ <= ς, given ‖Ĝ‖² = 4: fires for ς = 2 and above."""
    for threshold, expected in [(1.99, "NONE"), (2.0, "NORM"), (2.01, "NORM")]:
        rule = RefreshRule(max_gap=10, norm=threshold)
        assert measured(rule, coords=4.0).name == expected


def test_the_relative_criterion_compares_with_the_norm_at_the_last_refresh():
    """Half the norm is a quarter of the energy: 25 of 100."""
    rule = RefreshRule(max_gap=10, relative_norm=0.5)
    assert measured(rule, coords=25.0, at_refresh=100.0) is RefreshReason.NORM
    assert measured(rule, coords=25.1, at_refresh=100.0) is RefreshReason.NONE


def test_the_energy_criterion_fires_strictly_below_its_share():
    rule = RefreshRule(max_gap=10, energy=0.5)
    assert measured(rule, coords=5.0, total=10.0) is RefreshReason.NONE
    assert measured(rule, coords=4.9, total=10.0) is RefreshReason.ENERGY


def test_convergence_is_named_before_lost_energy():
    rule = RefreshRule(max_gap=10, norm=1.0, energy=0.5)
    assert measured(rule, coords=0.5, total=10.0) is RefreshReason.NORM
    assert measured(rule, coords=2.0, total=10.0) is RefreshReason.ENERGY


def test_a_rule_without_thresholds_asks_for_nothing_and_reads_nothing():
    rule = RefreshRule(max_gap=10)
    assert not rule.reads_gradient
    assert measured(rule, coords=0.0, total=0.0, at_refresh=0.0) is RefreshReason.NONE
    for name in ("norm", "relative_norm", "energy"):
        assert RefreshRule(max_gap=10, **{name: 0.5}).reads_gradient


@pytest.mark.parametrize("broken", ["coords", "total", "at_refresh"])
def test_a_broken_gradient_asks_for_nothing(broken):
    rules = {
        "coords": RefreshRule(max_gap=10, norm=1.0, relative_norm=1.0, energy=0.9),
        "total": RefreshRule(max_gap=10, energy=0.9),
        "at_refresh": RefreshRule(max_gap=10, relative_norm=1.0),
    }
    values = {"coords": 1e-6, "total": 1.0, "at_refresh": 1.0}
    assert measured(rules[broken], **values) is not RefreshReason.NONE
    assert measured(rules[broken], **{**values, broken: math.nan}) is RefreshReason.NONE


def test_reasons_are_integers_that_state_can_hold_and_keep_their_values():
    """Saved checkpoints hold these numbers."""
    assert {reason.name: int(reason) for reason in RefreshReason} == {
        "NONE": 0,
        "FIRST": 1,
        "MAX_GAP": 2,
        "NORM": 3,
        "ENERGY": 4,
    }


@pytest.mark.parametrize("max_gap", [1, 2, 7, 50, 200])
@pytest.mark.parametrize("num_weights", [1, 3, 56, 400])
def test_staggered_first_periods_spread_the_refreshes_evenly(max_gap, num_weights):
    """By the three-gap theorem multiples of the golden ratio leave gaps of three sizes, the largest
    less than 1.9 times the mean: no step gets more than two above its share, rounded up.
    """
    gaps = [staggered_gap(max_gap, position) for position in range(num_weights)]
    assert min(gaps) >= 1 and max(gaps) == gaps[0] == max_gap
    busiest = max(gaps.count(gap) for gap in set(gaps))
    assert busiest <= math.ceil(num_weights / max_gap) + 2
