"""The optimizers optimize: a stated loss by a stated step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from .problems import random_tensor


def regression(dtype):
    """A two-layer network, inputs, and targets of mean square 1 from a teacher of its shape."""
    student = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 12))
    teacher = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 12))
    for model, key in ((student, "student"), (teacher, "teacher")):
        for name, param in model.named_parameters():
            with torch.no_grad():
                param.copy_(random_tensor(param.shape, key, name) / param.shape[-1] ** 0.5)
    inputs = random_tensor((128, 16), "inputs")
    with torch.no_grad():
        targets = teacher(inputs)
        targets /= targets.square().mean().sqrt()
    return student.to(dtype), inputs.to(dtype), targets.to(dtype)


def loss_after(optimizer, model, inputs, targets, num_steps):
    for _ in range(num_steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(inputs), targets).backward()
        optimizer.step()
    with torch.no_grad():
        return nn.functional.mse_loss(model(inputs).float(), targets.float()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_small_regression_is_learned_within_a_hundred_steps(case, dtype):
    model, inputs, targets = regression(dtype)
    optimizer = case.build(list(model.named_parameters()), lr=0.02)
    assert loss_after(optimizer, model, inputs, targets, num_steps=0) > 1.5
    # torch.optim.AdamW, which works at full rank, is below 0.05 here (checked below).
    assert loss_after(optimizer, model, inputs, targets, num_steps=100) < case.learned_loss


def test_the_small_regression_is_one_that_adamw_learns():
    model, inputs, targets = regression(torch.float32)
    adamw = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.0)
    assert loss_after(adamw, model, inputs, targets, num_steps=100) < 0.05
