"""Which entries are the least important, by hand."""

from __future__ import annotations

import torch

from adarankgrad.core.pruning import least_important


def test_the_smallest_share_of_each_row_is_marked_and_ties_go_left():
    importance = torch.tensor([[3.0, 1.0, 2.0, 1.0], [0.0, 0.0, 0.0, 5.0]])
    marks = least_important(importance, 0.5)
    expected = torch.tensor([[False, True, False, True], [True, True, False, False]])
    assert torch.equal(marks, expected)


def test_the_number_of_marks_is_rounded_down_but_not_for_a_rounding_of_the_share():
    row = torch.arange(100.0).unsqueeze(0)
    # 0.29 * 100 is 28.999999999999996 in floating point.
    assert least_important(row, 0.29).sum() == 29
    assert least_important(row[:, :3], 0.5).sum() == 1
