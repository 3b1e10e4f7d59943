"""Thresholds of gates, by hand."""

from __future__ import annotations

import pytest
import torch

from adarankgrad.core.threshold import dead_zone_threshold, soft_threshold

# Multiples of the amount 0.25, all exact in binary.
VALUES = torch.tensor([-1.0, -0.5, -0.375, -0.25, -0.125, 0.0, 0.125, 0.25, 0.375, 0.5, 1.0])


def test_the_soft_threshold_moves_by_the_amount_and_stops_at_zero():
    expected = torch.tensor([-0.75, -0.25, -0.125, 0, 0, 0, 0, 0, 0.125, 0.25, 0.75])
    assert torch.equal(soft_threshold(VALUES, 0.25), expected)


def test_the_official_threshold_has_a_dead_zone_of_twice_the_amount_and_keeps_the_amount_itself():
    expected = torch.tensor([-0.75, -0.25, 0, -0.25, 0, 0, 0, 0.25, 0, 0.25, 0.75])
    assert torch.equal(dead_zone_threshold(VALUES, 0.25), expected)


@pytest.mark.parametrize("threshold", [soft_threshold, dead_zone_threshold])
def test_an_amount_of_zero_changes_nothing(threshold):
    assert torch.equal(threshold(VALUES, 0.0), VALUES)
