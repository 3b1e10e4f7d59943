"""Adam's direction: by hand, against torch, and in place where it says so."""

from __future__ import annotations

import pytest
import torch

from adarankgrad.core.adam import adam_direction


def test_the_first_direction_is_the_sign_of_the_gradient():
    """m̂ = g and √v̂ = |g|, whatever the betas."""
    grad = torch.tensor([[3.0, -4.0]], dtype=torch.float64)
    moments = torch.zeros_like(grad), torch.zeros_like(grad), torch.zeros_like(grad[:, :1])
    direction = adam_direction(grad, *moments, step=1, betas=(0.9, 0.999), eps=0.0)
    torch.testing.assert_close(direction, torch.tensor([[1.0, -1.0]], dtype=torch.float64))


def test_two_steps_by_hand():
    """β = (0.5, 0.75), g = 1 then 3, eps = 1.

    m = 0.5, 1.75, m̂ = 1.75/0.75; v = 0.25, 0.1875 + 2.25 = 2.4375, v̂ = 2.4375/0.4375.
    """
    exp_avg, exp_avg_sq, seen = (torch.zeros(1, dtype=torch.float64) for _ in range(3))
    for step, value in enumerate((1.0, 3.0), start=1):
        grad = torch.tensor([value], dtype=torch.float64)
        direction = adam_direction(
            grad, exp_avg, exp_avg_sq, seen, step=step, betas=(0.5, 0.75), eps=1.0
        )
    assert exp_avg.item() == pytest.approx(1.75)
    assert exp_avg_sq.item() == pytest.approx(2.4375)
    expected = (1.75 / 0.75) / ((2.4375 / 0.4375) ** 0.5 + 1.0)
    assert direction.item() == pytest.approx(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_torchs_adamw_to_rounding(dtype):
    """Each step rounds a handful of times; 50 steps of size lr add at most 50 · 10 roundings."""
    weight = torch.nn.Parameter(torch.zeros(6, 5, dtype=dtype))
    torch_adamw = torch.optim.AdamW([weight], lr=0.1, betas=(0.8, 0.95), eps=1e-3, weight_decay=0)
    ours = torch.zeros(6, 5, dtype=dtype)
    exp_avg, exp_avg_sq = torch.zeros_like(ours), torch.zeros_like(ours)
    seen = torch.zeros(6, 1, dtype=dtype)
    for step in range(1, 51):
        grad = torch.randn(6, 5, dtype=dtype)
        weight.grad = grad.clone()
        torch_adamw.step()
        ours -= 0.1 * adam_direction(
            grad, exp_avg, exp_avg_sq, seen, step=step, betas=(0.8, 0.95), eps=1e-3
        )
    tolerance = 0.1 * 50 * 10 * torch.finfo(dtype).eps
    torch.testing.assert_close(ours, weight.detach(), rtol=0, atol=tolerance)


def test_the_gradient_is_left_alone_and_the_moments_are_updated_in_place():
    grad = torch.full((2, 2), 2.0)
    exp_avg, exp_avg_sq, seen = torch.zeros(2, 2), torch.zeros(2, 2), torch.zeros(2, 1)
    direction = adam_direction(grad, exp_avg, exp_avg_sq, seen, step=1, betas=(0.5, 0.5), eps=1e-8)
    assert torch.all(grad == 2.0)
    assert torch.all(exp_avg == 1.0)
    assert torch.all(exp_avg_sq == 2.0)
    assert torch.all(seen == 0.5)
    assert direction.data_ptr() not in (grad.data_ptr(), exp_avg.data_ptr())


def test_a_zero_gradient_with_eps_moves_nothing():
    zero = torch.zeros(2, 2)
    direction = adam_direction(
        zero, zero.clone(), zero.clone(), zero[:, :1].clone(), step=1, betas=(0.9, 0.999), eps=1e-8
    )
    assert torch.all(direction == 0.0)


def test_each_row_corrects_its_bias_by_what_it_has_seen():
    """v = 0.1 · 4 and v = 1 · 4 mean the same 4, after 10 % and all of an average: |m̂| / 2."""
    grad = torch.full((2, 1), 2.0, dtype=torch.float64)
    exp_avg = torch.full((2, 1), 2.0, dtype=torch.float64)
    exp_avg_sq = torch.tensor([[0.4], [4.0]], dtype=torch.float64)
    seen = torch.tensor([[0.1], [1.0]], dtype=torch.float64)
    direction = adam_direction(
        grad, exp_avg, exp_avg_sq, seen, step=10**6, betas=(0.9, 0.999), eps=0.0
    )
    torch.testing.assert_close(direction, torch.ones(2, 1, dtype=torch.float64))
