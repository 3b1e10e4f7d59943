"""Thresholds by the share of weights below them."""

from __future__ import annotations

import math

import pytest
import torch

from adarankgrad.core.magnitude import count_below, is_below, magnitude_threshold


def test_entries_are_counted_by_size_and_the_threshold_itself_is_not_below():
    tensors = [torch.tensor([0.5, -0.25]), torch.tensor([[0.0], [-1.0]])]
    assert count_below(tensors, 0.5) == 2


def test_half_precision_is_compared_without_rounding_the_threshold():
    # 1.001 rounds down to 1 in bfloat16.
    assert is_below(torch.ones(1, dtype=torch.bfloat16), 1.001).all()


@pytest.mark.parametrize("share", [0.001, 0.05, 0.5, 0.999, 1.0])
def test_the_threshold_is_the_smallest_with_the_share_below(share):
    tensors = [torch.randn(70, 11), torch.randn(230)]
    threshold = magnitude_threshold(tensors, share)
    wanted = math.ceil(share * 1000)
    assert count_below(tensors, threshold) == wanted
    below = torch.nextafter(torch.tensor(threshold), torch.tensor(0.0))
    assert count_below(tensors, float(below)) == wanted - 1


def test_equal_entries_come_together():
    threshold = magnitude_threshold([torch.zeros(9)], 0.1)
    assert count_below([torch.zeros(9), torch.ones(1)], threshold) == 9
